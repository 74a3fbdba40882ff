"""The filter: a callable `(module_or_config, fqn) -> bool` that converts only the layers measured to win.

In: a table (found by device and recipe) and the tokens per microbatch. Out: answers, and the reason of each.
Try it: python -c "from fp8gate import auto_filter; print(auto_filter('rowwise', tokens=8192, device='NVIDIA H200'))"
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from fp8gate.filter.decision import DEFAULT_MIN_SPEEDUP, Decision, decide
from fp8gate.filter.find_table import find_table
from fp8gate.filter.linear_layer import linear_size
from fp8gate.filter.lookup import DEFAULT_LOOKUP, Lookup, LookupName
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES, Recipe, Software, Table


class StaleTableWarning(UserWarning):
    """The table was measured with another torch, torchao or triton than the installed one."""


class AutoFilter:
    """Converts only the linears measured to win; made by `auto_filter`.

    decisions: fqn -> `Decision`, in the order asked, linears only.
    """

    def __init__(
        self,
        table: Table,
        path: Path,
        *,
        tokens: int,
        filter_fqns: Sequence[str],
        min_speedup: float,
        lookup: LookupName,
    ) -> None:
        self.table = table
        self.path = path
        self.tokens = tokens
        self.filter_fqns = tuple(filter_fqns)
        self.min_speedup = min_speedup
        self.decisions: dict[str, Decision] = {}
        self._lookup = Lookup(table, lookup)
        self._by_shape: dict[LinearShape, Decision] = {}

    def __call__(self, layer: object, fqn: str) -> bool:
        """Whether to convert `layer`, a module or a config of one, known as `fqn` in its model."""
        size = linear_size(layer)
        if isinstance(size, str):
            return False
        decision = self._decide(LinearShape(self.tokens, *size), fqn)
        self.decisions[fqn] = decision
        return decision.convert

    def __repr__(self) -> str:
        return (
            f"<fp8gate filter: {self.table.recipe} on {self.table.device.name}, {self.tokens} tokens, "
            f"{len(self.table.points)} points from {self.path}>"
        )

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The `filter_fqns` patterns found in no name asked about so far."""
        return tuple(p for p in self.filter_fqns if not any(p in fqn for fqn in self.decisions))

    def summary(self) -> str:
        """What was decided, in a sentence or two for a log."""
        converted = sum(d.convert for d in self.decisions.values())
        outside = sum(d.outside for d in self.decisions.values())
        sentences = [
            f"converted {converted} of {len(self.decisions)} linears to float8 {self.table.recipe} "
            f"(at least {self.min_speedup:.2f}x on {self.table.device.name} at {self.tokens} tokens)"
        ]
        if outside:
            sentences.append(f"{outside} lie outside the measured range")
        if self.unmatched:
            sentences.append(f"filter_fqns that matched no linear: {', '.join(self.unmatched)}")
        return "; ".join(sentences)

    def report(self) -> str:
        """Every linear with its local shape, decision and reason, as a table for people."""
        from tabulate import tabulate  # only people need it; deciding must work without

        rows = [
            (fqn, *_sizes(d), "float8" if d.convert else "bf16", _ratio(d.speedup), d.reason)
            for fqn, d in self.decisions.items()
        ]
        headers = ("linear", "m", "k", "n", "train in", "speedup", "reason")
        return f"{tabulate(rows, headers=headers, disable_numparse=True)}\n{self.summary()}"

    def _decide(self, shape: LinearShape, fqn: str) -> Decision:
        for pattern in self.filter_fqns:
            if pattern in fqn:
                return Decision(convert=False, shape=shape, reason=f"filter_fqns has {pattern!r}")
        if shape not in self._by_shape:
            self._by_shape[shape] = decide(shape, self._lookup, min_speedup=self.min_speedup)
        return self._by_shape[shape]


def auto_filter(
    recipe: Recipe,
    *,
    tokens: int,
    device: str | None = None,
    filter_fqns: Sequence[str] = (),
    min_speedup: float = DEFAULT_MIN_SPEEDUP,
    lookup: LookupName = DEFAULT_LOOKUP,
    tables: str | os.PathLike[str] | None = None,
) -> AutoFilter:
    """A `module_filter_fn` for torchao's `convert_to_float8_training`, and a `filter_fn` for torchtitan.

    recipe: the float8 recipe trained with. tokens: rows of each linear's input per rank and microbatch
    (batch x sequence). Shapes are taken from the layers as they are: under tensor parallelism pass layers of the
    rank's shard sizes, for the global shape is one no rank computes and its answer is wrong. device: as the driver
    names it; None asks torch for the local one. filter_fqns: never convert linears whose name contains one of these.
    min_speedup: convert from this measured bf16 / float8 time ratio on. lookup: "interpolate" ln(speedup) between the
    measured points around a shape, or take the "nearest" one's. tables: a table file or a folder of them, before
    FP8GATE_THRESHOLDS and the packaged ones.

    Raises ValueError for arguments out of range, and TableError (a ValueError) if there is no valid table for the
    device and recipe. Warns with StaleTableWarning if the table was made with other software than is installed.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens: expected rows per microbatch, an integer of at least 1; got {tokens!r}")
    if isinstance(filter_fqns, str):
        raise ValueError(f"filter_fqns: expected a list of strings; got the string {filter_fqns!r}")
    if not min_speedup > 0:
        raise ValueError(f"min_speedup: expected a ratio above 0, such as {DEFAULT_MIN_SPEEDUP}; got {min_speedup!r}")
    table, path = find_table(recipe, device=device, tables=tables)
    differences = stale(table.software)
    if differences:
        warnings.warn(
            f"{path} was measured with {differences}; to measure again: fp8gate calibrate",
            StaleTableWarning,
            stacklevel=2,
        )
    return AutoFilter(table, path, tokens=tokens, filter_fqns=filter_fqns, min_speedup=min_speedup, lookup=lookup)


def stale(software: Software) -> str | None:
    """Which packages differ from the installed ones ("torch 2.11.0, here 2.13.0"), or None.

    Builds ("+cu130") are not compared; packages that are not installed here are not differences.
    """
    differences = []
    for package in ("torch", "torchao", "triton"):
        measured, here = getattr(software, package), _installed(package)
        if measured and here and _release(measured) != _release(here):
            differences.append(f"{package} {_release(measured)}, here {_release(here)}")
    return "; ".join(differences) or None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    return version.split("+")[0]


def _sizes(decision: Decision) -> tuple[int | None, int | None, int | None]:
    return decision.m, decision.k, decision.n


def _ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"
