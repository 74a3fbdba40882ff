"""Does this harness reproduce speedups measured before, by other code, on the same kind of GPU?

Nine linears on one NVIDIA H200 (torch 2.11.0, torchao 0.18.0, triton 3.6.0), default Inductor settings for every
recipe; the figures below are medians of paired, interleaved CUDA-graph replays with a cold L2. Agreement within 2 %
means a working timer. Also compares eager with compiled bf16, both captured: the sweep compiles only float8.

Run it: python benchmarks/known_speedups.py --out DIR
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import msgspec
import torch
from tabulate import tabulate

from fp8gate.calibrate.compilation import compiled_linear, eager_linear
from fp8gate.calibrate.linears import Operands
from fp8gate.calibrate.sweep import make_setup, sweep
from fp8gate.calibrate.timing import CudaTimer, balanced_orders
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES, Grid

KNOWN = {  # (m, k, n): speedups in the order of RECIPES
    (8192, 4096, 4096): (1.32, 0.88, 1.05),
    (8192, 4096, 1024): (0.96, 0.51, 0.72),
    (8192, 4096, 14336): (1.52, 1.18, 1.24),
    (8192, 14336, 4096): (1.51, 1.01, 1.13),
    (8192, 8192, 128): (0.51, 0.18, 0.35),
    (8192, 8192, 1024): (1.05, 0.49, 0.77),
    (8192, 1024, 8192): (1.05, 0.72, 1.02),
    (2048, 4096, 14336): (1.21, 0.77, 1.00),
    (32768, 4096, 14336): (1.63, 1.41, 1.34),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    out = parser.parse_args().out
    device = torch.device("cuda")
    print(compare_speedups(device, out))
    print(compare_bf16(device))


def compare_speedups(device: torch.device, out: Path) -> str:
    setup = make_setup(device)
    default = {r: msgspec.structs.replace(p, inductor={}) for r, p in setup.protocols.items()}
    setup = msgspec.structs.replace(setup, protocols=default)
    shapes = [LinearShape(*sizes) for sizes in KNOWN]
    result = sweep(Grid(), shapes, recipes=RECIPES, device=device, setup=setup, out=out)
    rows = []
    for recipe, table in zip(RECIPES, result.tables.values(), strict=True):
        for point in table.points:
            known = KNOWN[point.m, point.k, point.n][RECIPES.index(recipe)]
            difference = "none" if point.speedup is None else f"{point.speedup / known - 1:+.1%}"
            rows.append((recipe, point.shape, known, point.speedup, difference, point.status))
    return tabulate(rows, headers=("recipe", "(m, k, n)", "known", "here", "difference", "status"))


def compare_bf16(device: torch.device) -> str:
    """Median bf16 time, compiled over eager, of forward and of backward."""
    timer, rows = CudaTimer(device), []
    for sizes in KNOWN:
        torch._dynamo.reset()
        shape = LinearShape(*sizes)
        linears = compiled_linear(None, shape, {}, "cuda"), eager_linear(None, shape)
        operands = Operands.random(shape, device)
        arms = [timer.prepare(linear.over(operands)) for linear in linears]
        rounds = timer.rounds(arms, balanced_orders(2, 16, random.Random(0)))
        ratios = [(one.fwd_us / other.fwd_us, one.bwd_us / other.bwd_us) for one, other in rounds]
        fwd, bwd = (statistics.median(column) for column in zip(*ratios, strict=True))
        rows.append((sizes, f"{fwd - 1:+.2%}", f"{bwd - 1:+.2%}"))
    return tabulate(rows, headers=("(m, k, n)", "compiled / eager bf16, fwd", "bwd"))


if __name__ == "__main__":
    main()
