"""Decide single linears: by the plan where it has an answer, else by the table.

In: a linear's name and sizes. Out: a `Decision`, and findings where it is less than certain.
"""

from __future__ import annotations

import msgspec

from fp8gate.filter.contract.names import plain_name, without_indices
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import InputKind, decide_linear, input_kind, least_speedup
from fp8gate.filter.model.linear_layer import LinearSize
from fp8gate.filter.model.parallel import ShardError, Shards
from fp8gate.filter.model.rows import Rows
from fp8gate.filter.planned.plan_choice import PlanChoice
from fp8gate.filter.policy.findings import (
    AmbiguousPointWarning,
    FilterWarning,
    Finding,
    Findings,
    MissingPointWarning,
    NotPlainLinearWarning,
    OutsideGridWarning,
    UnknownRowsWarning,
    UnknownShardWarning,
)
from fp8gate.filter.policy.settings import FilterSettings

COSTLY = 0.10
"""A decision that may be wrong is worth a warning if that may cost more of the linear's time. The bounds of a GPU's
table are 6 to 10 %: a linear near the least speedup loses less than that either way, and its reason gives the bounds.
So no linear of the bundled models is warned of, though the nearest point of up to 15 % is ambiguous (LOG.md)."""


class LinearDecisions:
    """Decides linears one at a time, and adds to `findings` what makes a decision less than certain.

    A linear that comes again gets the same decision without a lookup. unknown_shards: names, with layer indices as *,
    of linears that are taken as whole because nothing says what a rank holds.
    """

    def __init__(self, table: Table, settings: FilterSettings, findings: Findings, plans: PlanChoice) -> None:
        self.shards = Shards(settings.parallel, settings.tokens)
        self.unknown_shards: dict[str, None] = {}
        self._settings = settings
        self._findings = findings
        self._plans = plans
        self.rows = Rows(settings.tokens, settings.rows)
        self._lookup = Lookup(table, settings.lookup)
        self._variant = table.variant
        self._by_shape: dict[tuple[InputKind, LinearShape, bool, bool], Decision] = {}
        self._by_linear: dict[tuple[str, LinearSize], Decision] = {}
        self._doubted: set[tuple[type[FilterWarning], LinearShape | None]] = set()

    def decide(self, fqn: str, size: LinearSize) -> Decision:
        """The decision for the linear known as `fqn` in its model."""
        return self._by_linear.get((fqn, size)) or self._decide(fqn, size)

    def shape_of(self, fqn: str, size: LinearSize) -> LinearShape | None:
        """What a rank multiplies in the linear known as `fqn`; None if the degree does not divide it."""
        plain = plain_name(fqn)
        try:
            return self._local_shape(plain, size, self.rows.of(plain).rows)
        except ShardError:
            return None

    def is_refused(self, fqn: str, size: LinearSize) -> bool:
        """Whether no plan can decide a linear, as it is not plain, is never called, or needs no weight gradient."""
        return bool(size.refused or size.is_frozen or self.rows.of(plain_name(fqn)).refused)

    def forget(self) -> None:
        """Prepare for another model."""
        self.unknown_shards = {}
        self.shards.forget()
        self.rows.forget()
        self.forget_answers()

    def forget_answers(self) -> None:
        """Decide every linear again when it comes, and add its findings again."""
        self._by_shape.clear()
        self._by_linear.clear()
        self._doubted.clear()

    def _decide(self, fqn: str, size: LinearSize) -> Decision:
        plain = plain_name(fqn)
        count = self.rows.of(plain)
        try:
            shape = self._local_shape(plain, size, count.rows)
        except ShardError as error:
            return Decision(convert=False, reason=str(error))
        for pattern in self._settings.filter_fqns:
            if pattern in plain:
                reason = f"filter_fqns has {pattern!r}"
                return Decision(convert=False, shape=shape, reason=reason, rows_from=count.source)
        if refused := size.refused or count.refused:
            self._findings.add(Finding(NotPlainLinearWarning, f"{without_indices(plain)}: {refused}; left in bf16"))
            return Decision(convert=False, shape=shape, reason=refused, rows_from=count.source)
        if count.doubt:
            stated = f"taken as {count.rows}, all tokens; say rows={{{without_indices(plain)!r}: ROWS}}"
            self._findings.add(Finding(UnknownRowsWarning, f"{without_indices(plain)}: {count.doubt}; {stated}"))
        decision = None if size.is_frozen else self._by_plan(plain, shape)
        if decision is None:
            kind = input_kind(plain, self.rows.observation)
            decision = self._by_table(kind, fqn, shape, self._settings.recomputes(plain), size.is_frozen)
        if count.source != "tokens":
            decision = msgspec.structs.replace(decision, rows_from=count.source)
        self._by_linear[fqn, size] = decision
        return decision

    def _local_shape(self, plain: str, size: LinearSize, rows: int) -> LinearShape:
        style = self.shards.style(plain)
        unknown = size.unknown or ("no pattern of the parallel plan names it" if style is None else "")
        if size.is_local:
            style = "replicated"
        elif unknown:
            name = without_indices(plain)
            self.unknown_shards[name] = None
            self._findings.add(Finding(UnknownShardWarning, f"{name}: {unknown}; taken as whole on every rank"))
        return self.shards.part(style, size.in_features, size.out_features, rows)

    def _by_plan(self, plain: str, shape: LinearShape) -> Decision | None:
        plan = self._plans.chosen
        answer = plan.decide(plain, shape) if plan else None
        if isinstance(answer, Finding):
            self._findings.add(answer)
            return None
        return answer

    def _by_table(self, kind: InputKind, fqn: str, shape: LinearShape, recomputed: bool, is_frozen: bool) -> Decision:
        decision = self._by_shape.get((kind, shape, recomputed, is_frozen))
        if decision is None:
            least = self._settings.min_speedup
            decision = decide_linear(
                kind, shape, self._lookup, min_speedup=least, recomputed=recomputed, is_frozen=is_frozen
            )
            if self._plans.chosen:
                decision = msgspec.structs.replace(decision, reason=f"not in the plan: {decision.reason}")
            self._add_doubts(fqn, decision, least_speedup(kind, least))
            self._by_shape[kind, shape, recomputed, is_frozen] = decision
        return decision

    def _add_doubts(self, fqn: str, decision: Decision, min_speedup: float) -> None:
        """Of linears of one shape, only the first is named with each doubt."""
        number = f"{decision.speedup_text}, " if decision.speedup_text else ""
        doubts: dict[type[FilterWarning], bool] = {
            OutsideGridWarning: decision.is_unsure,
            AmbiguousPointWarning: _cost_if_wrong(decision, min_speedup) > COSTLY,
            MissingPointWarning: decision.gap is not None,
        }
        for category, is_doubtful in doubts.items():
            if is_doubtful and (category, decision.shape) not in self._doubted:
                self._doubted.add((category, decision.shape))
                asked = f"{fqn}, {decision.shape}{self._variant.with_casts}"
                self._findings.add(Finding(category, f"{asked}: {number}{decision.reason}"))


def _cost_if_wrong(decision: Decision, min_speedup: float) -> float:
    """The most that the other decision may save, as a share of the linear's time, by the speedup's bounds.

    A converted linear may be slower than in bf16, one that is left in bf16 may win by more than was asked for. Nothing
    where the bounds leave no choice, nor outside of what was measured, where they say little.
    """
    if decision.speedup_low is None or decision.speedup_high is None or decision.outside:
        return 0.0
    if not decision.speedup_low < min_speedup <= decision.speedup_high:
        return 0.0
    return 1 / decision.speedup_low - 1 if decision.convert else decision.speedup_high / min_speedup - 1
