"""The filter: a callable `(module_or_config, fqn) -> bool` that converts only the layers measured to win.

In: a table, settings, and the plans that may decide. Out: answers, the reason for each, and what should be known before
they are trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import is_head, plain_name, without_indices
from fp8gate.filter.contract.plain_yaml import collections_paused
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decided_topics import topics_decided
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.decision.measured_settings import casts_enabled, wrong_casts
from fp8gate.filter.filter_text import decisions_text, summary_text
from fp8gate.filter.linear_decisions import LinearDecisions
from fp8gate.filter.model.linear_layer import linear_size
from fp8gate.filter.model.model_linears import ModelLinears, model_linears
from fp8gate.filter.model.observed import Observation
from fp8gate.filter.model.parallel import is_own_plan
from fp8gate.filter.observe.observe import ExampleInputs, observe
from fp8gate.filter.planned.plan_choice import PlanChoice
from fp8gate.filter.policy.findings import (
    FilterWarning,
    Finding,
    Findings,
    IncompleteTableWarning,
    NothingConvertedWarning,
    StaleTableWarning,
    UnknownRowsWarning,
    UnmatchedPatternWarning,
    UnmeasuredSettingWarning,
)
from fp8gate.filter.policy.settings import FilterSettings
from fp8gate.filter.ranks.agreement import require_agreement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AGREE_TIMEOUT_S = 60.0  # ranks decide within seconds of each other
WHATEVER_THE_MODEL = (StaleTableWarning, IncompleteTableWarning, UnmeasuredSettingWarning)
OF_WHOLE_MODEL = (UnmatchedPatternWarning, NothingConvertedWarning)  # each check finds these again


class AutoFilter:
    """Converts only the linears measured to win. `auto_filter` makes it.

    plans: the plan that decides, if there is one. decisions: fqn -> `Decision` of every linear asked about, in that
    order; a plan's decisions have no speedup of their own.
    """

    def __init__(
        self,
        table: Table,
        path: Path,
        settings: FilterSettings,
        findings: Findings,
        plans: PlanChoice,
        *,
        has_default_casts: bool = False,
    ) -> None:
        """has_default_casts: the table's are those that were enabled, and not asked for."""
        self.table = table
        self.path = path
        self.settings = settings
        self.decisions: dict[str, Decision] = {}
        self._has_default_casts = has_default_casts
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
            f"<fp8gate filter: {self.table.variant} on {self.table.device.name}, {self.settings.tokens} tokens, "
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
        contradiction = None
        if example_inputs is not None:
            observation = observe(model, example_inputs)
            contradiction = observation.contradicts(self.settings.tokens)
        if model is not None:
            self._forget()
            self._linears.rows.observation = observation
            with collections_paused():
                self._decide_all(model)
        self.compare_casts()
        if contradiction:
            self._findings.add(Finding(UnknownRowsWarning, contradiction))
        of_whole_model = list(self._find_in_whole_model())
        for finding in of_whole_model:
            self._findings.add(finding)
        current = [f for f in self._findings if f.category not in OF_WHOLE_MODEL or f in of_whole_model]
        if self._has_casts_measured:
            current = [f for f in current if f != self._wrong_casts]  # found before they were turned on or off
        return sorted(current, key=lambda finding: finding in of_whole_model)

    def compare_casts(self) -> None:
        """Find out whether the casts that are enabled now are those of the table. They may be turned on at any time."""
        if not self._has_casts_measured:
            self._findings.add(self._wrong_casts)

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
        plans = self.plans.chosen.plans if self.plans.chosen else None
        enabled = casts_enabled(self.table.recipe)
        decided = topics_decided(self.table, self.settings, plans, self.decisions, casts_enabled=enabled)
        require_agreement(decided, str(self.path), group, timeout_s)

    @property
    def _has_casts_measured(self) -> bool:
        return casts_enabled(self.table.recipe) == self.table.protocol.casts

    @property
    def _wrong_casts(self) -> Finding:
        return Finding(UnmeasuredSettingWarning, wrong_casts(self.table.variant, is_default=self._has_default_casts))

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
            self.path,
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
        self._findings.forget(keep=WHATEVER_THE_MODEL, but=tuple(self.plans.findings()))
        self._linears.forget()
        self.plans.forget()

    def _decide_all(self, model: Any) -> None:
        shards = self._linears.shards
        if is_own_plan(model, self.settings.parallel.plan):
            shards.is_models_own = True
        self._model = model_linears(model, with_other_names=shards.has_patterns)
        for name in self._model.without_linears or ():
            shards.style(name)
        linears = self._model.linears
        if self.plans.is_auto or self.plans.chosen:
            shapes = {fqn: self._linears.shape_of(fqn, size) for fqn, size in linears}
            refused = {fqn for fqn, size in linears if self._linears.is_refused(fqn, size)}
            self.plans.look_at({**shapes, **dict.fromkeys(refused)}, self._model.left_alone)
            if self.plans.chosen:
                leaves_out = self.settings.leaves_out
                self.plans.chosen.decide_blocks(shapes, lambda fqn: fqn in refused or leaves_out(fqn))
        self.decisions.update((fqn, self._linears.decide(fqn, size)) for fqn, size in linears)
        for finding in self.plans.findings():
            self._findings.add(finding)

    def _find_in_whole_model(self) -> Iterator[Finding]:
        """The findings that only all answers together show."""
        has_head = any(is_head(plain_name(fqn)) for fqn in self.decisions)
        for pattern in self.unmatched:
            if has_head or not is_head(pattern):  # a pipeline stage may be without the head
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
