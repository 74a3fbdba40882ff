"""This sweep beside torchao's own benchmark script: the same shapes on the same GPU, one tool after the other.

torchao's script is `benchmarks/float8/float8_roofline.py`, taken from your checkout. Check out the tag that fits the
installed torchao, and install `fire` and `tqdm`, which the script needs. It sums the GPU time of kernels over 5
profiled iterations, with bf16 compiled and with warm caches. Both tools run several times, each time in a fresh
process. The first run of a tool compiles, and later runs find its compile cache.

Run it: python benchmarks/against_torchao_sweep.py --checkout ~/ao --out DIR
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tabulate import tabulate

from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.sweep.run_sweep import sweep
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid

SHAPES = [LinearShape(*s) for s in ((2048, 4096, 1024), (8192, 4096, 4096), (8192, 8192, 1024), (16384, 4096, 16384))]
TOOLS = ("torchao's script", "fp8gate")
Speedups = dict[tuple[LinearShape, Recipe], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of pytorch/ao")
    parser.add_argument("--out", type=Path, required=True, help="folder for what the runs leave")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)  # run this tool once, in this process
    arguments = parser.parse_args()
    if arguments.tool:
        measure = run_torchao if arguments.tool == TOOLS[0] else run_fp8gate
        report(measure(arguments.recipes, arguments.checkout, arguments.out), arguments.out)
        return
    runs = {tool: [start(tool, arguments, run) for run in range(arguments.runs)] for tool in TOOLS}
    print(compare_costs(runs, len(arguments.recipes)), "\n")
    print(compare_speedups(runs))


def run_torchao(recipes: list[Recipe], checkout: Path, out: Path) -> Speedups:
    """Call the script's own `run` for SHAPES, on a GPU that the script may not know."""
    from torchao.testing.training import roofline_utils

    sys.path.insert(0, str(checkout / "benchmarks" / "float8"))
    script: Any = importlib.import_module("float8_roofline")
    specs = roofline_utils.gpu_name_to_specs  # the script models some columns from it, which are not used here
    specs.setdefault(torch.cuda.get_device_name(0), specs["NVIDIA H100"])
    script.get_name_to_shapes_iter = lambda *_: [(str(shape), (shape.m, shape.k, shape.n)) for shape in SHAPES]
    speedups: Speedups = {}
    for recipe in recipes:
        script.run(str(out / "roofline.csv"), float8_recipe_name=recipe)
        columns = pd.read_csv(out / "roofline.csv")[["fwd_M", "fwd_K", "fwd_N", "b_fp8_e2e_spdp"]]
        for m, k, n, speedup in columns.to_numpy().tolist():
            speedups[LinearShape(int(m), int(k), int(n)), recipe] = speedup
    return speedups


def run_fp8gate(recipes: list[Recipe], checkout: Path, out: Path) -> Speedups:
    device = torch.device("cuda")
    setup = make_setup(device)
    result = sweep(Grid(), SHAPES, recipes=recipes, device=device, setup=setup, out=out, fresh=True)
    tables = zip(recipes, result.tables.values(), strict=True)
    return {(p.shape, recipe): p.speedup for recipe, table in tables for p in table.points if p.speedup}


def report(speedups: Speedups, out: Path) -> None:
    """Leave the speedups in the folder, for the process that started this one."""
    rows = [(shape.m, shape.k, shape.n, recipe, speedup) for (shape, recipe), speedup in speedups.items()]
    (out / "speedups.json").write_text(json.dumps(rows))


def start(tool: str, arguments: argparse.Namespace, run: int) -> tuple[float, Speedups]:
    """Run a tool once in a fresh process. Returns its seconds and its speedups.

    All runs of a tool share a compile cache.
    """
    out = arguments.out / f"{TOOLS.index(tool)}-{run}"
    out.mkdir(parents=True, exist_ok=True)
    cache = str(arguments.out / f"cache-{TOOLS.index(tool)}")
    command = [sys.executable, __file__, "--checkout", arguments.checkout, "--out", out, "--tool", tool]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    begin = time.monotonic()
    with open(out / "output.txt", "w") as output:
        subprocess.run(
            [*command, "--recipes", *arguments.recipes], check=True, env=environment, stdout=output, stderr=output
        )
    seconds = time.monotonic() - begin
    rows = json.loads((out / "speedups.json").read_text())
    return seconds, {(LinearShape(m, k, n), recipe): speedup for m, k, n, recipe, speedup in rows}


def compare_costs(runs: dict[str, list[tuple[float, Speedups]]], recipes: int) -> str:
    """The seconds for each point and recipe, and how far each speedup is from that of the run before, as Markdown."""
    rows = []
    for tool, results in runs.items():
        seconds = [total / len(SHAPES) / recipes for total, _ in results]
        apart = [
            abs(later[key] / earlier[key] - 1)
            for (_, earlier), (_, later) in itertools.pairwise(results)
            for key in earlier
        ]
        warm = f"{statistics.mean(seconds[1:]):.1f} s"
        rows.append((tool, f"{seconds[0]:.1f} s", warm, f"{statistics.median(apart):.2%}", f"{max(apart):.2%}"))
    headers = ("", "a point and recipe, cold", "warm", "runs apart, median", "worst")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def compare_speedups(runs: dict[str, list[tuple[float, Speedups]]]) -> str:
    """The median speedups of both tools side by side, as Markdown."""
    found: dict[tuple[LinearShape, Recipe], dict[str, float]] = defaultdict(dict)
    for tool, results in runs.items():
        for key in results[0][1]:
            found[key][tool] = statistics.median(speedups[key] for _, speedups in results)
    rows = [
        (shape, recipe, f"{by[TOOLS[0]]:.3f}", f"{by[TOOLS[1]]:.3f}", f"{by[TOOLS[1]] / by[TOOLS[0]] - 1:+.1%}")
        for (shape, recipe), by in sorted(found.items())
    ]
    headers = ("(m, k, n)", "recipe", *TOOLS, "difference")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


if __name__ == "__main__":
    main()
