"""The filter: a callable `(module_or_config, fqn) -> bool` that converts only the layers measured to win.

In: a table (found by device and recipe), the tokens per microbatch, and how the model is divided and recomputed. Out:
answers, the reason for each, and what should be known before they are trusted.
Try it: python -c "from fp8gate import auto_filter; print(auto_filter('rowwise', tokens=8192, device='NVIDIA H200'))"
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8gate.filter.agreement import require_agreement, topics_decided
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import is_head, plain_name, without_indices
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, Decision
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, LookupName
from fp8gate.filter.filter_text import decisions_text, summary_text
from fp8gate.filter.findings import (
    FilterWarning,
    Finding,
    Findings,
    NothingConvertedWarning,
    Policy,
    StaleTableWarning,
    UnmatchedPatternWarning,
)
from fp8gate.filter.linear_decisions import LinearDecisions
from fp8gate.filter.locate.find_table import find_table
from fp8gate.filter.model.linear_layer import linear_size
from fp8gate.filter.model.model_linears import ModelLinears, model_linears
from fp8gate.filter.model.observe import ExampleInputs, Observation, observe
from fp8gate.filter.model.parallel import Parallel, is_own_plan
from fp8gate.filter.plan_choice import AUTO, PlanArgument, PlanChoice
from fp8gate.filter.settings import NOT_PARALLEL, FilterSettings, Recompute, policies

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AutoFilter", "Recompute", "auto_filter"]

AGREE_TIMEOUT_S = 60.0  # ranks decide within seconds of each other
OF_WHOLE_MODEL = (UnmatchedPatternWarning, NothingConvertedWarning)  # each check finds these again


class AutoFilter:
    """Converts only the linears measured to win. `auto_filter` makes it.

    plans: the plan that decides, if there is one. decisions: fqn -> `Decision` of every linear asked about, in that
    order; a plan's decisions have no speedup of their own.
    """

    def __init__(
        self, table: Table, path: Path, settings: FilterSettings, findings: Findings, plans: PlanChoice
    ) -> None:
        self.table = table
        self.path = path
        self.settings = settings
        self.decisions: dict[str, Decision] = {}
        self._model = ModelLinears()
        self._findings = findings
        self.plans = plans
        self._linears = LinearDecisions(table, settings, findings, plans)

    def __call__(self, layer: object, fqn: str) -> bool:
        """Whether to convert `layer`, a module or the config of one, known as `fqn` in its model."""
        size = linear_size(layer)
        if isinstance(size, str):
            return False
        decision = self._linears.decide(fqn, size)
        self._settle()
        self.decisions[fqn] = decision
        return decision.convert

    def __repr__(self) -> str:
        return (
            f"<fp8gate filter: {self.table.recipe} on {self.table.device.name}, {self.settings.tokens} tokens, "
            f"{len(self.table.points)} points from {self.path}>"
        )

    def check(self, model: Any = None, *, example_inputs: ExampleInputs = None) -> list[Finding]:
        """Say everything that should be known about the answers for a model, before any layer is converted.

        model: an nn.Module, or (fqn, layer or config) pairs. Earlier answers are forgotten first. None checks the
        answers so far. Only a module shows what the patterns of a parallel plan match beside linears.
        example_inputs: what the model is called with for one microbatch: a tuple of arguments, a mapping of keyword
        arguments, or a list of these, whose fewest rows count. Only shapes and dtypes matter. The forward then runs
        once without computing, on a copy without data, and shows the rows that each linear multiplies.
        Warns of each finding, or raises all those that are errors as one. Returns all that are not ignored.
        Raises ObserveError, an InputError, if the forward cannot run without data.
        """
        findings = self.examine(model, example_inputs=example_inputs)
        self._settle()
        return findings

    def examine(
        self, model: Any = None, *, example_inputs: ExampleInputs = None, observation: Observation | None = None
    ) -> list[Finding]:
        """The same, but for warnings and errors: the next answer, or `check`, gives those.

        observation: of a forward that has run already.
        """
        if example_inputs is not None:
            observation = observe(model, example_inputs)
        if model is not None:
            self._forget()
            self._linears.rows.observation = observation
            self._decide_all(model)
        of_whole_model = list(self._find_in_whole_model())
        for finding in of_whole_model:
            self._findings.add(finding)
        current = [f for f in self._findings if f.category not in OF_WHOLE_MODEL or f in of_whole_model]
        return sorted(current, key=lambda finding: finding in of_whole_model)

    def agree(self, group: ProcessGroup | None = None, *, timeout_s: float = AGREE_TIMEOUT_S) -> None:
        """Make sure that every rank of a process group decided the same by the same table. All of them must call this.

        Call it after `check` or after the conversion: only answers that were given are compared. Under pipeline
        parallelism give the group of one stage. After an error it may be called again on all ranks.
        Raises RanksDisagreeError on all ranks, which names the ranks that differ, and in which settings and layers.
        Raises RanksMissingError if a rank does not answer within `timeout_s` seconds, at most 4 seconds later, whatever
        the other ranks do. Raises InputError if nothing was asked yet, or for a timeout that is no positive number.
        """
        if not self.decisions:
            raise InputError("agree: nothing is decided yet; call check(model) first")
        plan = self.plans.chosen.plan if self.plans.chosen else None
        decided = topics_decided(self.table, self.settings, plan, self.decisions)
        require_agreement(decided, str(self.path), group, timeout_s)

    @property
    def left_alone(self) -> tuple[str, ...]:
        """Names of modules that hold several matrices in one parameter, layer indices as *."""
        return self._model.left_alone or ()

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The patterns of `filter_fqns` that are in no name asked about so far."""
        names = [plain_name(fqn) for fqn in self.decisions]
        return tuple(p for p in self.settings.filter_fqns if not any(p in name for name in names))

    @property
    def unknown_shards(self) -> dict[str, None]:
        """Names, with layer indices as *, of linears that are taken as whole because nothing says what a rank holds."""
        return self._linears.unknown_shards

    def summary(self) -> str:
        """What was decided, in a sentence or two for a log."""
        return summary_text(
            self.table,
            self.settings,
            self.decisions,
            plans=self.plans,
            notes={
                "filter_fqns that matched no linear": self.unmatched,
                "patterns of the parallel plan that matched no linear": self._unmatched_shards(),
                "taken as whole on every rank, for want of a pattern": tuple(self.unknown_shards),
                "no linears, left in bf16": self.left_alone,
                "products that are no nn.Linear, left in bf16": self._model.other_products or (),
                "already converted": tuple(dict.fromkeys(map(without_indices, self._model.already_float8))),
            },
        )

    def report(self, *, full: bool = False) -> str:
        """The linears with their local shapes, decisions and reasons, as a table for people, and the summary.

        Linears that differ by layer indices only share a row. full: every linear has its own.
        """
        return f"{decisions_text(self.decisions, full=full)}\n{self.summary()}"

    def _forget(self) -> None:
        """Prepare for another model."""
        self.decisions.clear()
        self._model = ModelLinears()
        self._findings.forget(keep=StaleTableWarning)
        self._linears.forget()
        self.plans.forget()

    def _decide_all(self, model: Any) -> None:
        shards = self._linears.shards
        shards.is_models_own = shards.is_models_own or is_own_plan(model, self.settings.parallel.plan)
        self._model = model_linears(model, with_other_names=shards.has_patterns)
        for name in self._model.without_linears or ():
            shards.style(name)
        linears = self._model.linears
        if self.plans.is_auto:
            shapes = {fqn: shape for fqn, size in linears if (shape := self._linears.shape_of(fqn, size))}
            self.plans.look_at(shapes, self._model.left_alone)
        self.decisions.update((fqn, self._linears.decide(fqn, size)) for fqn, size in linears)
        if self.plans.chosen:
            self.plans.chosen.decide_blocks(self.decisions)
            self._linears.forget_linears()
            self.decisions.update((fqn, self._linears.decide(fqn, size)) for fqn, size in linears)
        for finding in self.plans.findings():
            self._findings.add(finding)

    def _find_in_whole_model(self) -> Iterator[Finding]:
        """The findings that only all answers together show."""
        for pattern in self.unmatched:
            if not is_head(pattern):  # a pipeline stage may be without the head
                yield Finding(UnmatchedPatternWarning, f"filter_fqns: {pattern!r} is in no linear's name")
        for pattern in self._linears.rows.unmatched:
            yield Finding(UnmatchedPatternWarning, f"rows: {pattern!r} matched no linear")
        for pattern in self._unmatched_shards():
            yield Finding(UnmatchedPatternWarning, f"parallel.plan: {pattern} matched no linear")
        if self.plans.chosen:
            yield from self.plans.chosen.findings(self.decisions)
        if not self._model.already_float8 and not any(decision.convert for decision in self.decisions.values()):
            yield Finding(NothingConvertedWarning, f"none of {len(self.decisions)} linears is converted to float8")

    def _unmatched_shards(self) -> tuple[str, ...]:
        return self._linears.shards.unmatched(of_linears=self._model.without_linears is None)

    def _settle(self) -> None:
        """Warn or raise. After an error the answers are forgotten, so that the same question raises it again."""
        try:
            self._findings.settle(stacklevel=4)
        except FilterWarning:
            self._linears.forget_answers()
            raise


def auto_filter(
    recipe: Recipe,
    *,
    tokens: int,
    rows: Mapping[str, int] | None = None,
    device: str | None = None,
    filter_fqns: Sequence[str] = (),
    min_speedup: float = DEFAULT_MIN_SPEEDUP,
    lookup: LookupName = DEFAULT_LOOKUP,
    tables: str | os.PathLike[str] | None = None,
    plan: PlanArgument = AUTO,
    parallel: Parallel = NOT_PARALLEL,
    recompute: Recompute = "none",
    strict: bool = False,
    on_stale: Policy | None = None,
    on_outside: Policy | None = None,
    on_ambiguous: Policy | None = None,
    on_missing: Policy | None = None,
    on_unknown_shard: Policy | None = None,
    on_unknown_rows: Policy | None = None,
    on_not_plain: Policy | None = None,
    on_plan: Policy | None = None,
    on_unmatched: Policy | None = None,
    on_nothing: Policy | None = None,
) -> AutoFilter:
    """A `module_filter_fn` for torchao's `convert_to_float8_training`, and a `filter_fn` for torchtitan.

    recipe: the float8 recipe trained with. tokens: rows of each linear's input per microbatch (batch x sequence), as
    one data parallel rank has them, before context parallelism divides them. rows: for linears that multiply another
    number: pattern of names -> rows, such as {"*.experts.*": 256}; of several that match, the last counts. device: a
    measured device as people write it, such as "H200"; None asks torch for the local one. filter_fqns: linears whose
    name contains one of these are never converted. min_speedup: convert from this measured bf16 / float8 time ratio on.
    lookup: "interpolate" between the measured points around a shape, or take the "nearest" one. tables: a thresholds
    folder, a device's folder or a table file; None searches FP8GATE_THRESHOLDS, or the checkout, the user's folder and
    the package. parallel: how tensor and context parallelism divide the model; a weight that is already divided (a
    DTensor) is taken as it is. recompute: the layers under activation checkpointing, whose forward runs twice: "none",
    "full", or a predicate of their names.

    plan: "auto" lets `check(model)` look for a measured plan among those of this device, recipe and number of tokens:
    one whose roles, local shapes and recomputation are those of the model's blocks. Without `check`, or if none fits,
    the table decides. Otherwise it is a plan, its file, the name of the model that it was measured for ("llama3-8b"),
    or None to do without. A plan decides the roles that it knows, whatever min_speedup is, and the table decides the
    other linears. If a block cannot convert all of the plan's set, it takes what was measured of the rest of the set,
    or the table's answers. Without `check`, a plan that is given takes every block for a whole one.

    on_stale and the other policies: "ignore", "warn" of or raise ("error") the category that `POLICY_OF` names. None
    raises if `strict`, else warns. `auto_filter` itself gives the StaleTableWarning. Only `check` gives an
    UnmatchedPatternWarning, a NothingConvertedWarning and what a plan's blocks convert together; any question gives the
    others.

    Raises InputError (a ValueError) for arguments out of range, TableError (an InputError) if there is no valid table
    for the device and recipe, and PlanError (an InputError) for a plan that is not valid or not for this device, recipe
    and tokens.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
    if isinstance(filter_fqns, str):
        raise InputError(f"filter_fqns: expected a list of strings; got the string {filter_fqns!r}")
    settings = FilterSettings(
        tokens=tokens,
        rows=dict(rows or {}),
        filter_fqns=tuple(filter_fqns),
        min_speedup=min_speedup,
        lookup=lookup,
        parallel=parallel,
        recompute=recompute,
    )
    asked = {
        "on_stale": on_stale,
        "on_outside": on_outside,
        "on_ambiguous": on_ambiguous,
        "on_missing": on_missing,
        "on_unknown_shard": on_unknown_shard,
        "on_unknown_rows": on_unknown_rows,
        "on_not_plain": on_not_plain,
        "on_plan": on_plan,
        "on_unmatched": on_unmatched,
        "on_nothing": on_nothing,
    }
    findings = Findings(policies("error" if strict else "warn", asked))
    table, path = find_table(recipe, device=device, tables=tables)
    plans = PlanChoice(plan, recipe=recipe, device=table.device.name, settings=settings, tables=tables)
    wants_float8 = AutoFilter(table, path, settings, findings, plans)
    if differences := stale(table.software):
        message = f"{path} was measured with {differences}; to measure again: fp8gate calibrate"
        findings.add(Finding(StaleTableWarning, message))
    for finding in plans.findings():
        findings.add(finding)
    findings.settle()
    return wants_float8
