"""The filter: a callable `(module_or_config, fqn) -> bool` that converts only the layers measured to win.

In: a table (found by device and recipe), the tokens per microbatch, how the model is divided and recomputed. Out:
answers, the reason of each, and what should be known before they are trusted.
Try it: python -c "from fp8gate import auto_filter; print(auto_filter('rowwise', tokens=8192, device='NVIDIA H200'))"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fp8gate.filter.agreement import require_agreement
from fp8gate.filter.contract.find_table import find_table
from fp8gate.filter.contract.names import is_head, plain_name, without_indices
from fp8gate.filter.contract.plan import Plan, format_plan, load_plan, require_same_training
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.contract.table import Table, format_table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, Decision, decide
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, Lookup, LookupName
from fp8gate.filter.findings import (
    POLICIES,
    AmbiguousPointWarning,
    FilterWarning,
    Finding,
    Findings,
    MissingPointWarning,
    NothingConvertedWarning,
    OutsideGridWarning,
    PlanMismatchWarning,
    Policy,
    StaleTableWarning,
    UnknownShardWarning,
    UnmatchedPatternWarning,
)
from fp8gate.filter.model.linear_layer import (
    LinearSize,
    grouped_weights,
    linear_size,
    linears_of,
    names_without_linears,
)
from fp8gate.filter.model.parallel import Parallel, ShardError, Shards
from fp8gate.filter.plan_decisions import PlanDecisions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AGREE_TIMEOUT_S = 60.0  # ranks decide within seconds of each other
NOT_PARALLEL = Parallel()
OF_ALL = (UnmatchedPatternWarning, NothingConvertedWarning)  # these are asked anew by each check

Recompute = Literal["none", "full"] | Callable[[str], bool]
"""Which forwards run twice, under activation checkpointing: none; full: all but the head's, which stands outside of the
checkpointed blocks (`lm_head`, or `output` at the top); or those of the names it is true for."""


class FilterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides beside the table."""

    tokens: int
    filter_fqns: tuple[str, ...] = ()
    min_speedup: float = DEFAULT_MIN_SPEEDUP
    lookup: LookupName = DEFAULT_LOOKUP
    parallel: Parallel = NOT_PARALLEL
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
        """Whether the forward of the linear of this name, without wrappers, runs twice."""
        if callable(self.recompute):
            return self.recompute(fqn)
        return self.recompute == "full" and not is_head(fqn)


class AutoFilter:
    """Converts only the linears measured to win; made by `auto_filter`.

    decisions: fqn -> `Decision`, in the order asked, linears only; a plan's have no speedup of their own. left_alone:
    modules with several matrices in one parameter. unknown_shards: linears of which nothing says what a rank holds,
    layer indices as *; taken as whole.
    """

    def __init__(
        self,
        table: Table,
        path: Path,
        settings: FilterSettings,
        findings: Findings,
        planned: PlanDecisions | None = None,
    ) -> None:
        self.table = table
        self.path = path
        self.settings = settings
        self.decisions: dict[str, Decision] = {}
        self.left_alone: tuple[str, ...] = ()
        self.unknown_shards: dict[str, None] = {}
        self._saw_all_modules = False
        self._findings = findings
        self._planned = planned
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
        self._settle()
        self.decisions[fqn] = decision
        return decision.convert

    def __repr__(self) -> str:
        return (
            f"<fp8gate filter: {self.table.recipe} on {self.table.device.name}, {self.settings.tokens} tokens, "
            f"{len(self.table.points)} points from {self.path}>"
        )

    def check(self, model: Any = None) -> list[Finding]:
        """Everything to know about the answers for a model, before any layer is converted.

        model: an nn.Module, or (fqn, layer or config) pairs, with which all starts anew; None goes by what was asked so
        far. Only a module shows what a parallel plan's patterns match beside linears. Warns of each
        finding, or raises all those that are errors as one. Returns all that are not ignored.
        """
        if model is not None:
            self._start_anew()
            is_module = hasattr(model, "named_modules")
            sizes = [(fqn, linear_size(layer)) for fqn, layer in (linears_of(model) if is_module else model)]
            linears = [(fqn, size) for fqn, size in sizes if not isinstance(size, str)]
            self.decisions.update((fqn, self._ask(size, fqn)) for fqn, size in linears)
            if self._planned:
                self._planned.rule(self.decisions, self.settings.recomputes)
                self.decisions.update((fqn, self._ask(size, fqn)) for fqn, size in linears)  # now by whole blocks
            if is_module:
                for name in names_without_linears(model):
                    self._shards.style(name)
                self.left_alone = grouped_weights(model)
                self._saw_all_modules = True
        of_all = list(self._question_all())
        for finding in of_all:
            self._findings.add(finding)
        self._settle()
        known = [finding for finding in self._findings if finding.category not in OF_ALL or finding in of_all]
        return sorted(known, key=lambda finding: finding in of_all)

    def agree(self, group: ProcessGroup | None = None, *, timeout_s: float = AGREE_TIMEOUT_S) -> None:
        """Make sure that every rank of a process group decided the same by the same table. All of them must call this.

        Call it after `check` or the conversion: what was not asked is not compared. Under pipeline parallelism give the
        group of one stage. Raises ValueError if nothing was asked yet, RanksDisagreeError on all ranks, naming those
        that differ, their tables and layers, and RanksMissingError if a rank does not answer within `timeout_s`
        seconds.
        """
        if not self.decisions:
            raise ValueError("agree: nothing is decided yet; call check(model) first")
        settings = self.settings
        decided = {
            "table": _digest(format_table(self.table)),
            "recipe": self.table.recipe,
            "tokens": settings.tokens,
            "min_speedup": settings.min_speedup,
            "lookup": settings.lookup,
            "plan": _digest(format_plan(self._planned.plan)) if self._planned else "none",
            "layers": {fqn: "float8" if d.convert else "bf16" for fqn, d in self.decisions.items()},
        }
        require_agreement(decided, str(self.path), group, timeout_s)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The `filter_fqns` patterns found in no name asked about so far."""
        names = [plain_name(fqn) for fqn in self.decisions]
        return tuple(p for p in self.settings.filter_fqns if not any(p in name for name in names))

    def summary(self) -> str:
        """What was decided, in a sentence or two for a log."""
        converted = sum(d.convert for d in self.decisions.values())
        outside = sum(d.outside for d in self.decisions.values())
        least = f"at least {self.settings.min_speedup:.2f}x"
        where = f"on {self.table.device.name} at {self.settings.tokens} tokens"
        sentences = [
            f"converted {converted} of {len(self.decisions)} linears to float8 {self.table.recipe} "
            f"({'by a plan' if self._planned else least} {where})"
        ]
        if self._planned:
            by_table = dict.fromkeys(without_indices(fqn) for fqn, d in self.decisions.items() if d.point)
            others = f"; not in it, by the table, {least}: {', '.join(by_table)}" if by_table else ""
            sentences.append(f"the plan {self._planned.source}, whatever min_speedup{others}")
        if outside:
            sentences.append(f"{outside} lie outside the measured range")
        if self.unmatched:
            sentences.append(f"filter_fqns that matched no linear: {', '.join(self.unmatched)}")
        if unmatched := self._shards.unmatched(of_linears=not self._saw_all_modules):
            sentences.append(f"patterns of the parallel plan that matched no linear: {', '.join(unmatched)}")
        if self.unknown_shards:
            sentences.append(f"taken as whole on every rank, for want of a pattern: {', '.join(self.unknown_shards)}")
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
        plain = plain_name(fqn)
        try:
            shape = self._local_shape(size, plain)
        except ShardError as error:
            return Decision(convert=False, reason=str(error))
        for pattern in self.settings.filter_fqns:
            if pattern in plain:
                return Decision(convert=False, shape=shape, reason=f"filter_fqns has {pattern!r}")
        key = shape, self.settings.recomputes(plain)
        decision = self._of_plan(plain, *key) or self._of_table(fqn, *key)
        self._by_layer[fqn, size] = decision
        return decision

    def _of_plan(self, fqn: str, shape: LinearShape, recomputed: bool) -> Decision | None:
        planned = self._planned.decide(fqn, shape, recomputed) if self._planned else None
        if isinstance(planned, Finding):
            self._findings.add(planned)
            return None
        return planned

    def _of_table(self, fqn: str, shape: LinearShape, recomputed: bool) -> Decision:
        decision = self._by_shape.get((shape, recomputed))
        if decision is None:
            decision = decide(shape, self._lookup, min_speedup=self.settings.min_speedup, recomputed=recomputed)
            if self._planned:
                decision = msgspec.structs.replace(decision, reason=f"not in the plan: {decision.reason}")
            self._question(decision, fqn)
            self._by_shape[shape, recomputed] = decision
        return decision

    def _local_shape(self, size: LinearSize, fqn: str) -> LinearShape:
        style = self._shards.style(fqn)
        unknown = size.unknown or ("no pattern of the parallel plan names it" if style is None else "")
        if size.is_local:
            style = "replicated"
        elif unknown:
            self.unknown_shards[without_indices(fqn)] = None
            self._findings.add(
                Finding(UnknownShardWarning, f"{without_indices(fqn)}: {unknown}; taken as whole on every rank")
            )
        return self._shards.part(style, size.in_features, size.out_features)

    def _start_anew(self) -> None:
        """With another model: nothing was asked yet."""
        self.decisions.clear()
        self.left_alone, self.unknown_shards, self._saw_all_modules = (), {}, False
        self._shards.forget()
        self._findings.forget(but=StaleTableWarning)
        if self._planned:
            self._planned.forget()
        self._forget_answers()

    def _forget_answers(self) -> None:
        self._by_shape.clear()
        self._by_layer.clear()

    def _settle(self) -> None:
        """Warn or raise; whoever asks again after an error is told again."""
        try:
            self._findings.settle(stacklevel=4)
        except FilterWarning:
            self._forget_answers()
            raise

    def _question_all(self) -> Iterator[Finding]:
        """What all answers together leave open."""
        for pattern in self.unmatched:
            yield Finding(UnmatchedPatternWarning, f"filter_fqns: {pattern!r} is in no linear's name")
        for pattern in self._shards.unmatched(of_linears=not self._saw_all_modules):
            yield Finding(UnmatchedPatternWarning, f"parallel.plan: {pattern} matched no linear")
        if self._planned:
            yield from self._planned.findings(self.decisions, self.settings.recomputes)
        if not any(decision.convert for decision in self.decisions.values()):
            yield Finding(NothingConvertedWarning, f"none of {len(self.decisions)} linears is converted to float8")

    def _question(self, decision: Decision, fqn: str) -> None:
        """Note what makes a decision less than certain."""
        is_ambiguous = decision.point is not None and decision.point.status == "ambiguous"
        if not (decision.outside or is_ambiguous or decision.gap):
            return
        where = f"{fqn}, {decision.shape}: {decision.reason}"
        if decision.outside:
            self._findings.add(Finding(OutsideGridWarning, where))
        if is_ambiguous:
            self._findings.add(Finding(AmbiguousPointWarning, where))
        if decision.gap:
            self._findings.add(Finding(MissingPointWarning, where))


def auto_filter(
    recipe: Recipe,
    *,
    tokens: int,
    device: str | None = None,
    filter_fqns: Sequence[str] = (),
    min_speedup: float = DEFAULT_MIN_SPEEDUP,
    lookup: LookupName = DEFAULT_LOOKUP,
    tables: str | os.PathLike[str] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    parallel: Parallel = NOT_PARALLEL,
    recompute: Recompute = "none",
    strict: bool = False,
    on_stale: Policy | None = None,
    on_outside: Policy | None = None,
    on_ambiguous: Policy | None = None,
    on_missing: Policy | None = None,
    on_unknown_shard: Policy | None = None,
    on_plan: Policy | None = None,
    on_unmatched: Policy | None = None,
    on_nothing: Policy | None = None,
) -> AutoFilter:
    """A `module_filter_fn` for torchao's `convert_to_float8_training`, and a `filter_fn` for torchtitan.

    recipe: the float8 recipe trained with. tokens: rows of each linear's input per microbatch (batch x sequence), as
    one data parallel rank has them, before context parallelism divides them. device: as the driver names it; None asks
    torch for the local one. filter_fqns: never convert linears whose name contains one of these. min_speedup: convert
    from this measured bf16 / float8 time ratio on. lookup: "interpolate" ln(speedup) between the measured points around
    a shape, or take the "nearest" one's. tables: a table file or a folder of them, before FP8GATE_THRESHOLDS and the
    packaged ones. plan: a plan, or its file, that decides the roles it knows, whatever min_speedup; the table decides
    the others. Only `check(model)` sees whole blocks: where one is not all the plan's, it takes what was measured of
    the rest, or the table's answers; a filter that is asked layer by layer takes every block for whole.
    parallel: how tensor and context parallelism divide the model; a weight that is divided already (a
    DTensor) is taken as it is. recompute: the layers under activation checkpointing, "none", "full", or a predicate of
    their names: their forward runs twice.

    on_stale and its like: "ignore", "warn" of or raise ("error") a StaleTableWarning, OutsideGridWarning,
    AmbiguousPointWarning, MissingPointWarning, UnknownShardWarning, PlanMismatchWarning, UnmatchedPatternWarning or
    NothingConvertedWarning; None warns, or, if strict, raises. The last two come from `check` alone, and so does what a
    plan's blocks convert together; the others from any question, a StaleTableWarning from here.

    Raises ValueError for arguments out of range, TableError (a ValueError) if there is no valid table for the device
    and recipe, and PlanError (a ValueError) for a plan that is not valid or not of this device, recipe and tokens.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
    if isinstance(filter_fqns, str):
        raise ValueError(f"filter_fqns: expected a list of strings; got the string {filter_fqns!r}")
    settings = FilterSettings(
        tokens=tokens,
        filter_fqns=tuple(filter_fqns),
        min_speedup=min_speedup,
        lookup=lookup,
        parallel=parallel,
        recompute=recompute,
    )
    findings = Findings(
        _policies(
            "error" if strict else "warn",
            {
                "on_stale": (StaleTableWarning, on_stale),
                "on_outside": (OutsideGridWarning, on_outside),
                "on_ambiguous": (AmbiguousPointWarning, on_ambiguous),
                "on_missing": (MissingPointWarning, on_missing),
                "on_unknown_shard": (UnknownShardWarning, on_unknown_shard),
                "on_plan": (PlanMismatchWarning, on_plan),
                "on_unmatched": (UnmatchedPatternWarning, on_unmatched),
                "on_nothing": (NothingConvertedWarning, on_nothing),
            },
        )
    )
    table, path = find_table(recipe, device=device, tables=tables)
    loaded = None if plan is None else load_plan(plan)
    if loaded:
        local_tokens = tokens // settings.parallel.cp
        require_same_training(loaded[0], loaded[1], recipe=recipe, device=table.device.name, tokens=local_tokens)
    wants_float8 = AutoFilter(table, path, settings, findings, PlanDecisions(*loaded) if loaded else None)
    sources = [(str(path), table.software, "fp8gate calibrate")]
    sources += [(loaded[1], loaded[0].software, "fp8gate plan")] if loaded else []
    for source, software, command in sources:
        if differences := stale(software):
            message = f"{source} was measured with {differences}; to measure again: {command}"
            findings.add(Finding(StaleTableWarning, message))
    findings.settle()
    return wants_float8


def _policies(
    default: Policy, asked: dict[str, tuple[type[FilterWarning], Policy | None]]
) -> dict[type[FilterWarning], Policy]:
    for name, (_, policy) in asked.items():
        if policy is not None and policy not in POLICIES:
            raise ValueError(f"{name}: expected one of {', '.join(POLICIES)}; got {policy!r}")
    return {category: policy or default for category, policy in asked.values()}


def _digest(text: str) -> str:
    from hashlib import sha256

    return f"sha256 {sha256(text.encode()).hexdigest()[:12]}"


def _sizes(decision: Decision) -> tuple[int | None, int | None, int | None]:
    return decision.m, decision.k, decision.n


def _ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"
