"""The filter: a callable `(module_or_config, fqn) -> bool` that converts only the layers measured to win.

In: a table (found by device and recipe), the tokens per microbatch, how the model is divided and recomputed. Out:
answers, the reason of each, and what should be known before they are trusted.
Try it: python -c "from fp8gate import auto_filter; print(auto_filter('rowwise', tokens=8192, device='NVIDIA H200'))"
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fp8gate.filter.decision import DEFAULT_MIN_SPEEDUP, Decision, decide
from fp8gate.filter.find_table import find_table
from fp8gate.filter.findings import (
    POLICIES,
    AmbiguousPointWarning,
    FilterWarning,
    Finding,
    Findings,
    MissingPointWarning,
    NothingConvertedWarning,
    OutsideGridWarning,
    Policy,
    StaleTableWarning,
    UnmatchedPatternWarning,
)
from fp8gate.filter.linear_layer import LinearSize, grouped_weights, linear_size, linears_of
from fp8gate.filter.lookup import DEFAULT_LOOKUP, Lookup, LookupName
from fp8gate.filter.parallel import Parallel, ShardError, Shards
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.stale import stale
from fp8gate.filter.table import RECIPES, Recipe, Table

Recompute = Literal["none", "full"] | Callable[[str], bool]
"""Which forwards run twice, under activation checkpointing: none, all, or those of the names it is true for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterSettings:
    """All that decides beside the table."""

    tokens: int
    filter_fqns: tuple[str, ...] = ()
    min_speedup: float = DEFAULT_MIN_SPEEDUP
    lookup: LookupName = DEFAULT_LOOKUP
    parallel: Parallel = Parallel()
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens: expected rows per microbatch, an integer of at least 1; got {self.tokens!r}")
        if not self.min_speedup > 0:
            raise ValueError(
                f"min_speedup: expected a ratio above 0, such as {DEFAULT_MIN_SPEEDUP}; got {self.min_speedup!r}"
            )
        if not isinstance(self.parallel, Parallel):
            raise ValueError(f"parallel: expected a fp8gate.Parallel; got {self.parallel!r}")
        if self.recompute not in ("none", "full") and not callable(self.recompute):
            raise ValueError(f"recompute: expected none, full or a predicate of names; got {self.recompute!r}")

    def recomputes(self, fqn: str) -> bool:
        return self.recompute(fqn) if callable(self.recompute) else self.recompute == "full"


class AutoFilter:
    """Converts only the linears measured to win; made by `auto_filter`.

    decisions: fqn -> `Decision`, in the order asked, linears only.
    """

    def __init__(self, table: Table, path: Path, settings: FilterSettings, findings: Findings) -> None:
        self.table = table
        self.path = path
        self.settings = settings
        self.decisions: dict[str, Decision] = {}
        self.left_alone: tuple[str, ...] = ()
        self._findings = findings
        self._lookup = Lookup(table, settings.lookup)
        self._shards = Shards(settings.parallel, settings.tokens)
        self._by_shape: dict[tuple[LinearShape, bool], Decision] = {}
        self._by_layer: dict[tuple[str, LinearSize], Decision] = {}

    def __call__(self, layer: object, fqn: str) -> bool:
        """Whether to convert `layer`, a module or a config of one, known as `fqn` in its model."""
        size = linear_size(layer)
        if isinstance(size, str):
            return False
        decision = self._by_layer.get((fqn, size)) or self._ask(size, fqn)
        self._findings.settle()
        self.decisions[fqn] = decision
        return decision.convert

    def __repr__(self) -> str:
        return (
            f"<fp8gate filter: {self.table.recipe} on {self.table.device.name}, {self.settings.tokens} tokens, "
            f"{len(self.table.points)} points from {self.path}>"
        )

    def check(self, model: Any = None) -> list[Finding]:
        """Everything to know about the answers for a model, before any layer is converted.

        model: an nn.Module, or (fqn, layer or config) pairs; None goes by what was asked so far. Warns of each
        finding, or raises all those that are errors as one. Returns all that are not ignored.
        """
        if model is not None:
            is_module = hasattr(model, "named_modules")
            for fqn, layer in linears_of(model) if is_module else model:
                size = linear_size(layer)
                if not isinstance(size, str):
                    self.decisions[fqn] = self._ask(size, fqn)
            self.left_alone = grouped_weights(model) if is_module else ()
        for pattern in self.unmatched:
            self._findings.add(UnmatchedPatternWarning, f"filter_fqns: {pattern!r} is in no linear's name")
        for pattern in self._shards.unmatched:
            self._findings.add(UnmatchedPatternWarning, f"parallel.plan: {pattern} matched no linear")
        if not any(decision.convert for decision in self.decisions.values()):
            self._findings.add(NothingConvertedWarning, f"none of {len(self.decisions)} linears is converted to float8")
        self._findings.settle()
        return list(self._findings)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The `filter_fqns` patterns found in no name asked about so far."""
        return tuple(p for p in self.settings.filter_fqns if not any(p in fqn for fqn in self.decisions))

    def summary(self) -> str:
        """What was decided, in a sentence or two for a log."""
        converted = sum(d.convert for d in self.decisions.values())
        outside = sum(d.outside for d in self.decisions.values())
        sentences = [
            f"converted {converted} of {len(self.decisions)} linears to float8 {self.table.recipe} "
            f"(at least {self.settings.min_speedup:.2f}x on {self.table.device.name} at {self.settings.tokens} tokens)"
        ]
        if outside:
            sentences.append(f"{outside} lie outside the measured range")
        if self.unmatched:
            sentences.append(f"filter_fqns that matched no linear: {', '.join(self.unmatched)}")
        if self._shards.unmatched:
            sentences.append(f"patterns of the parallel plan that matched no linear: {', '.join(self._shards.unmatched)}")
        if self.left_alone:
            sentences.append(f"no linears, left in bf16: {', '.join(self.left_alone)}")
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

    def _ask(self, size: LinearSize, fqn: str) -> Decision:
        """The decision for one layer; what is found on the way awaits `settle`."""
        try:
            shape = self._local_shape(size, fqn)
        except ShardError as error:
            return Decision(convert=False, reason=str(error))
        for pattern in self.settings.filter_fqns:
            if pattern in fqn:
                return Decision(convert=False, shape=shape, reason=f"filter_fqns has {pattern!r}")
        key = shape, self.settings.recomputes(fqn)
        decision = self._by_shape.get(key)
        if decision is None:
            decision = decide(shape, self._lookup, min_speedup=self.settings.min_speedup, recomputed=key[1])
            self._question(decision, fqn)
            self._by_shape[key] = decision
        self._by_layer[fqn, size] = decision
        return decision

    def _local_shape(self, size: LinearSize, fqn: str) -> LinearShape:
        shard = self._shards.whole if size.is_local else self._shards.local_shape
        return shard(fqn, size.in_features, size.out_features)

    def _question(self, decision: Decision, fqn: str) -> None:
        """Note what makes a decision less than certain."""
        where = f"{fqn}, {decision.shape}: {decision.reason}"
        if decision.outside:
            self._findings.add(OutsideGridWarning, where)
        if decision.point and decision.point.status == "ambiguous":
            self._findings.add(AmbiguousPointWarning, where)
        if decision.gap:
            self._findings.add(MissingPointWarning, where)
