"""What a decision costs: importing and loading, the first answer for a shape, the same answer again, a large MoE model.

The largest committed table is used. Each time is the least of several, because other processes can only add to it.

Run it: python benchmarks/decision_cost.py
"""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tabulate import tabulate

from fp8gate import FilterWarning, Parallel, auto_filter, read_table
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.model.model_config import BUNDLED, linear_roles
from fp8gate.filter.model.parallel import Shards

THRESHOLDS = Path(__file__).parents[1] / "thresholds"
TOKENS, DEGREES = (2048, 8192, 12288), (1, 2, 4, 8)
EXPERT_LAYERS, EXPERTS = 50, 66  # three linears each: 9900 of the 10 000 linears, attention makes up the rest
RECIPE: Recipe = "rowwise"
LOAD = """
import time
start = time.perf_counter()
import fp8gate
fp8gate.read_table({path!r})
print(time.perf_counter() - start)
"""


class LinearConfig:
    """A linear as a config describes it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features, self.out_features = in_features, out_features


def main() -> None:
    warnings.simplefilter("ignore", FilterWarning)
    path = max(THRESHOLDS.glob(f"*/{RECIPE}.yaml"), key=lambda path: len(read_table(path).points))
    first_us, again_us = decision_us(path)
    rows = [
        ("import fp8gate, load a table", f"{load_ms(path):.0f} ms", "60 ms"),
        ("the same in a process with torch", f"{load_ms(path, 'import torch'):.0f} ms", "60 ms"),
        ("first answer for a shape, median", f"{statistics.median(first_us):.1f} us", "20 us"),
        ("first answer for a shape, worst", f"{max(first_us):.1f} us", "20 us"),
        ("the same layer again, median", f"{statistics.median(again_us):.2f} us", "2 us"),
        ("10 000 linears of a large MoE model", f"{moe_s(path):.2f} s", "0.5 s"),
    ]
    print(f"{path.relative_to(THRESHOLDS)}: {len(read_table(path).points)} points")
    print(tabulate(rows, headers=("", "takes", "goal"), tablefmt="github", disable_numparse=True))


def load_ms(path: Path, before: str = "") -> float:
    """The time in a fresh process, once the interpreter has started. before: code that runs first and is not timed."""
    command = [sys.executable, "-c", before + LOAD.format(path=str(path))]
    return min(float(subprocess.check_output(command)) for _ in range(5)) * 1e3


def decision_us(path: Path) -> tuple[list[float], list[float]]:
    """The first and the second answer for every layer of the bundled models, under several degrees and tokens."""
    first, again = [], []
    for tokens, tp in itertools.product(TOKENS, DEGREES):
        parallel = Parallel(tp=tp, plan="transformers")
        layers = {
            Shards(parallel, tokens).local_shape(role.fqn, role.in_features, role.out_features): role
            for config in BUNDLED.values()
            for role in linear_roles(config)
        }
        asks = [(LinearConfig(role.in_features, role.out_features), role.fqn) for role in layers.values()]
        pairs = zip(*(_ask_twice(path, tokens, parallel, asks) for _ in range(7)), strict=True)
        for runs in pairs:
            first.append(min(first_s for first_s, _ in runs) * 1e6)
            again.append(min(again_s for _, again_s in runs) * 1e6)
    return first, again


def _ask_twice(
    path: Path, tokens: int, parallel: Parallel, asks: list[tuple[LinearConfig, str]]
) -> list[tuple[float, float]]:
    wants_float8 = auto_filter(RECIPE, tokens=tokens, parallel=parallel, tables=path)
    return [(_seconds(partial(wants_float8, *ask)), _seconds(partial(wants_float8, *ask))) for ask in asks]


def moe_s(path: Path) -> float:
    """Seconds to decide 10 000 linears. The experts are linears of their own, each with its own name."""
    hidden, expert = 7168, 2048
    sizes = [("gate_proj", hidden, expert), ("up_proj", hidden, expert), ("down_proj", expert, hidden)]
    names = [
        (f"model.layers.{layer}.mlp.experts.{number}.{name}", LinearConfig(k, n))
        for layer in range(EXPERT_LAYERS)
        for number in range(EXPERTS)
        for name, k, n in sizes
    ]
    names += [(f"model.layers.{i}.self_attn.q_proj", LinearConfig(hidden, hidden)) for i in range(10_000 - len(names))]
    parallel = Parallel(tp=8, plan="transformers")

    def decide_all() -> None:
        wants_float8 = auto_filter(RECIPE, tokens=8192, parallel=parallel, tables=path)
        for fqn, layer in names:
            wants_float8(layer, fqn)

    return min(_seconds(decide_all) for _ in range(3))


def _seconds(call: Callable[[], object]) -> float:
    gc.disable()  # a collection would visit everything that is imported: in training, all of torch
    start = time.perf_counter()
    call()
    elapsed_s = time.perf_counter() - start
    gc.enable()
    return elapsed_s


if __name__ == "__main__":
    main()
