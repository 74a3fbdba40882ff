"""How long would a sweep take on 1, 8, 64 or 512 GPUs? A simulation from what each point of a real sweep cost.

Each rank takes a while to start. Then its processes compile one point each at a time, and its device measures the
compiled points one after the other. As in `calibrate/ranks/rank_sweep.py`, points are dealt out largest first, and
every rank measures the repeats. The first point of each process takes long to compile, because its caches are empty.
Loading a point takes longer for every pair of its dimensions that its machine has not tuned kernels for. The ranks of a
machine share what has been tuned. All costs come from the journal of one sweep (benchmarks/data/*.csv).

Run it: python benchmarks/scaling.py [--ranks 1 8 64 512]    (docs/many-gpus.md says what it means)
A journal's costs: python benchmarks/scaling.py --journal JOURNAL > benchmarks/data/nvidia-h200-costs.csv
"""

from __future__ import annotations

import argparse
import csv
import heapq
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
from tabulate import tabulate

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.sweep.journal import content_of
from fp8gate.filter.contract.shapes import LinearShape

COSTS = Path(__file__).parent / "data" / "nvidia-h200-costs.csv"
COLUMNS = ("m", "k", "n", "repeat", "compiling_s", "loading_s", "settling_s", "timing_s")
STARTING_S = 4.0
"""For imports, workers and the device. A sweep takes 22 s until it measures its first point; compiling that point takes
the rest."""
WORKERS, PER_MACHINE = 14, 8  # compiling processes on each rank, ranks on each machine


@dataclass(frozen=True, slots=True)
class Cost:
    """The seconds that one point takes: compiling on a core, then loading (with tuning) and measuring on the device.

    repeat: whether every rank measures it.
    """

    shape: LinearShape
    repeat: bool
    compiling_s: float
    loading_s: float
    measuring_s: float


@dataclass(frozen=True, slots=True)
class Loading:
    """Loading a point takes base_s, and pair_s more for each pair of dimensions that is new to the machine."""

    base_s: float
    pair_s: float


@dataclass(frozen=True, slots=True)
class SimulatedSweep:
    """How long the sweep takes, which share of it the devices idle, and how long each rank measures the repeats."""

    total_s: float
    idle: float
    repeats_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--costs", type=Path, default=COSTS)
    parser.add_argument("--journal", type=Path, help="write this journal's costs instead")
    arguments = parser.parse_args()
    if arguments.journal:
        write_costs(arguments.journal)
    else:
        print(report(read_costs(arguments.costs), arguments.ranks))


def report(costs: list[Cost], ranks: list[int]) -> str:
    """The simulated sweeps as a Markdown table."""
    loading = fit_loading(costs)
    sweeps = {count: simulate(costs, loading, count) for count in ranks}
    alone_s = simulate(costs, loading, 1).total_s
    rows = [
        (
            count,
            f"{sweep.total_s:.0f} s",
            f"{alone_s / sweep.total_s:.1f}",
            f"{alone_s / sweep.total_s / count:.0%}",
            f"{sweep.idle:.0%}",
            f"{sweep.repeats_s:.0f} s",
        )
        for count, sweep in sweeps.items()
    ]
    headers = ("ranks", "sweep", "faster by", "efficiency", "device idle", "of it what every rank measures")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def simulate(costs: list[Cost], loading: Loading, ranks: int) -> SimulatedSweep:
    """Workers take the next point as soon as they are free. Each device measures points in the order they are ready."""
    costs, cold_s = without_cold_starts(costs)
    points = sorted((cost for cost in costs if not cost.repeat), key=lambda cost: -cost.shape.flop)
    compiling_s = {cost.shape: cost.compiling_s for cost in points}  # that of a repeat was short: it was in the cache
    repeats = [replace(c, compiling_s=compiling_s.get(c.shape, c.compiling_s)) for c in costs if c.repeat]
    repeats_left = [list(repeats) for _ in range(ranks)]
    known: list[set[tuple[str, int, int]]] = [set() for _ in range(-(-ranks // PER_MACHINE))]
    free_at, busy_s = [STARTING_S] * ranks, [0.0] * ranks
    compiled: list[tuple[float, int, int, Cost]] = []  # when it is ready, its order, its rank, the point
    order = 0

    def compile_next(rank: int, now: float, extra_s: float = 0.0) -> None:
        nonlocal order
        cost = repeats_left[rank].pop() if repeats_left[rank] else points.pop(0) if points else None
        if cost:
            order += 1
            heapq.heappush(compiled, (now + cost.compiling_s + extra_s, order, rank, cost))

    for _ in range(WORKERS):
        for rank in range(ranks):
            compile_next(rank, STARTING_S, cold_s)
    while compiled:
        ready_at, _, rank, cost = heapq.heappop(compiled)
        machine = known[rank // PER_MACHINE]
        new = pairs(cost.shape) - machine
        machine |= new
        on_device_s = loading.base_s + loading.pair_s * len(new) + cost.measuring_s
        free_at[rank] = max(free_at[rank], ready_at) + on_device_s
        busy_s[rank] += on_device_s
        compile_next(rank, free_at[rank])
    total_s = max(free_at)
    every_rank_s = sum(loading.base_s + cost.measuring_s for cost in repeats)
    return SimulatedSweep(total_s, 1 - sum(busy_s) / (total_s * ranks), every_rank_s)


def without_cold_starts(costs: list[Cost]) -> tuple[list[Cost], float]:
    """The costs as if no point were the first of its process, and how much longer a first point takes to compile."""
    first, later = costs[:WORKERS], [cost.compiling_s for cost in costs[WORKERS:] if not cost.repeat]
    if not later:
        return costs, 0.0
    usual_s = median(later)
    cold_s = max(0.0, median(cost.compiling_s for cost in first) - usual_s)
    return [*(replace(c, compiling_s=min(c.compiling_s, usual_s)) for c in first), *costs[WORKERS:]], cold_s


def fit_loading(costs: list[Cost]) -> Loading:
    """Fit the seconds to the number of new pairs by least squares, in the order of the journal."""
    known: set[tuple[str, int, int]] = set()
    counts = []
    for cost in costs:
        counts.append(len(pairs(cost.shape) - known))
        known |= pairs(cost.shape)
    pair_s, base_s = np.polyfit(counts, [cost.loading_s for cost in costs], 1)
    return Loading(float(base_s), float(pair_s))


def pairs(shape: LinearShape) -> set[tuple[str, int, int]]:
    """The sizes of the three operands, each a pair of dimensions: cast kernels depend on them."""
    return {("mk", shape.m, shape.k), ("kn", shape.k, shape.n), ("mn", shape.m, shape.n)}


def read_costs(path: Path) -> list[Cost]:
    with open(path, newline="") as file:
        return [
            Cost(
                LinearShape(int(row["m"]), int(row["k"]), int(row["n"])),
                row["repeat"] == "True",
                float(row["compiling_s"]),
                float(row["loading_s"]),
                float(row["settling_s"]) + float(row["timing_s"]),
            )
            for row in csv.DictReader(file)
        ]


def write_costs(journal: Path) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in journal.read_bytes().splitlines()[1:]:
        record = msgspec.json.decode(content_of(line), type=PointRecord)
        seconds = (getattr(record.stages, name) for name in COLUMNS[4:])
        writer.writerow([record.m, record.k, record.n, record.repeat, *seconds])


if __name__ == "__main__":
    main()
