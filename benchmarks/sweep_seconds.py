"""Where the seconds of a sweep go: on the device by stage, and on the cores that compile.

The costs of each measurement are from the journal of one sweep (`python benchmarks/scaling.py --journal JOURNAL`). What
they leave out is the start of the program, and the device waiting for compilers; `calibrate` prints these at its end.

Run it: python benchmarks/sweep_seconds.py [benchmarks/data/nvidia-h100-80gb-hbm3-costs.csv]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from tabulate import tabulate

COSTS = Path(__file__).parent / "data" / "nvidia-h100-80gb-hbm3-costs.csv"
STAGES = {
    "loading_s": "loading, tuning",
    "settling_s": "settling",
    "timing_s": "timing",
    "compiling_s": "compiling, all cores",
}
ON_DEVICE = ("loading_s", "settling_s", "timing_s")
LARGE_FLOP = 6 * 4096**3
"""From here on an H100 in bf16 takes about 0.6 ms, forward and backward, and most points reach its power limit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", nargs="?", type=Path, default=COSTS)
    print(report(read_costs(parser.parse_args().costs)))


def read_costs(file: Path = COSTS) -> pd.DataFrame:
    return pd.read_csv(file)


def report(costs: pd.DataFrame) -> str:
    """Seconds by stage, for points and for repeats, as Markdown."""
    is_large = 6 * costs.m * costs.k * costs.n >= LARGE_FLOP
    parts = {
        "points below 4096 x 4096 x 4096": costs[~costs.repeat & ~is_large],
        "points from there on": costs[~costs.repeat & is_large],
        "repeats": costs[costs.repeat],
        "all": costs,
    }
    rows = [
        (
            name,
            len(part),
            *(f"{part[stage].sum():.0f}" for stage in STAGES),
            f"{part[list(ON_DEVICE)].to_numpy().sum():.0f}",
        )
        for name, part in parts.items()
    ]
    headers = ("measurements", "number", *STAGES.values(), "on the device")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


if __name__ == "__main__":
    main()
