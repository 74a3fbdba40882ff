"""The verdict: per model, recipe and casts what to convert, and how much time that saves. Pure but for reading plans.

In: the tables of one device with their files, beside which plans lie. Out: a `Verdict`. A measured plan counts before
the table, as in the filter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fp8gate.calibrate.comparison.usual_models import ShownModel, shown_models
from fp8gate.calibrate.report.colour_scale import FEW_WINS
from fp8gate.calibrate.report.page.table_facts import TablesByVariant
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import SHARED_MIN_SPEEDUP, decide_linear, input_kind
from fp8gate.filter.locate.find_plan import find_plans
from fp8gate.filter.model.described_model import LinearRole
from fp8gate.filter.model.model_config import linear_roles, not_linear
from fp8gate.filter.planned.model_plans import ModelPlans


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMeasurement:
    """A plan's set in one block: its speedup with bounds.

    blocks: how many the model has. by_table: roles outside of the blocks, about which the table decides.
    """

    speedup: float
    low: float
    high: float
    blocks: int
    by_table: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictRow:
    """One table for one model. Times: forward + backward of one microbatch on one rank.

    convert: roles, by Llama's short names. plan: what was measured in the block, None if the table decides.
    """

    variant: Variant
    convert: tuple[str, ...]
    bf16_ms: float
    float8_ms: float
    plan: PlanMeasurement | None = None

    @property
    def saved_ms(self) -> float:
        return self.bf16_ms - self.float8_ms

    @property
    def saved_share(self) -> float:
        return self.saved_ms / self.bf16_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVerdict:
    """All recipes for one model that have an answer. note: the model's products that are no `nn.Linear`, or None."""

    model: str
    note: str | None
    rows: tuple[VerdictRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to convert on one device. sentence: where float8 wins nowhere or nearly nowhere, it says so; else None.

    models: those that have an answer; none if nothing wins. unanswered: models too large for what was measured.
    problems: plan files that cannot be used, a line each.
    """

    device: str
    tokens: int
    sentence: str | None
    models: tuple[ModelVerdict, ...]
    unanswered: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _LinearTimes:
    """One kind of linear: whether the table converts it, and the time of all linears of this kind."""

    linear: LinearRole
    convert: bool
    bf16_ms: float
    float8_ms: float


class DeviceVerdict:
    """Makes the verdict of one device from its tables, their lookups, and the plans beside their files."""

    def __init__(self, device: str, files: TablesByVariant, lookups: Mapping[Variant, Lookup], tokens: int) -> None:
        self._device, self._lookups, self._tokens = device, lookups, tokens
        self._tables = {variant: table for variant, (_, table) in files.items()}
        found = {
            variant: find_plans(device=device, variant=variant, tokens=tokens, tables=file)
            for variant, (file, _) in files.items()
        }
        self._plans = {
            variant: [one.plans[0] for one in plans.plans if len(one.plans) == 1] for variant, plans in found.items()
        }
        self._problems = tuple(dict.fromkeys(problem for plans in found.values() for problem in plans.problems))

    def make(self) -> Verdict:
        """The verdict for all bundled models. Without a plan or a point that wins there is only a sentence."""
        points = [point for table in self._tables.values() for point in table.points]
        wins = any((point.speedup or 0) >= SHARED_MIN_SPEEDUP for point in points)
        has_plans = any(plan.convert for plans in self._plans.values() for plan in plans)
        planned = {(plan.model, plan.tp) for plans in self._plans.values() for plan in plans}
        models = [self._of_model(model) for model in shown_models(planned)] if wins or has_plans else []
        return Verdict(
            device=self._device,
            tokens=self._tokens,
            sentence=few_wins_sentence(points),
            models=tuple(model for model in models if model.rows),
            unanswered=tuple(model.model for model in models if not model.rows),
            problems=self._problems,
        )

    def _of_model(self, model: ShownModel) -> ModelVerdict:
        shapes = model.shapes(self._tokens)
        rows = (self._row(model, shapes, variant) for variant in self._tables)
        return ModelVerdict(model=model.name, note=not_linear(model.config), rows=tuple(row for row in rows if row))

    def _row(self, model: ShownModel, shapes: Mapping[str, LinearShape], variant: Variant) -> VerdictRow | None:
        """None if a linear about which the table decides is far outside of what it holds."""
        lookup, linears = self._lookups[variant], linear_roles(model.config)
        plan = next((plan for plan in self._plans[variant] if _fits(plan, shapes)), None)
        from_table = [linear for linear in linears if plan is None or plan.place(linear.fqn) is None]
        times = [_times(linear, shapes[linear.fqn], lookup) for linear in from_table]
        known = [one for one in times if one is not None]
        if len(known) < len(times):
            return None
        return _table_row(variant, known) if plan is None else _plan_row(variant, plan, linears, known)


def few_wins_sentence(points: Collection[Point]) -> str | None:
    """One sentence for a device where float8 wins nowhere, or at less than FEW_WINS of the points. Else None.

    To win is to reach the speedup from which the filter converts a linear with an input of its own.
    """
    speedups = [point.speedup for point in points if point.speedup is not None]
    wins, best = sum(speedup >= DEFAULT_MIN_SPEEDUP for speedup in speedups), max(speedups, default=0.0)
    if wins >= FEW_WINS * len(speedups):
        return None
    reached = f"the best of {len(speedups)} measured points reaches {best:.2f}x the speed of bf16"
    if best < 1:
        return f"Convert nothing: float8 never wins here; {reached}."
    if not wins:
        asks = f"{DEFAULT_MIN_SPEEDUP:g}x, as the filter asks of linears that share no input"
        return f"Convert next to nothing: float8 wins nowhere by {asks}; {reached}."
    reach = f"{wins} of {len(speedups)} measured points reach {DEFAULT_MIN_SPEEDUP:g}x"
    return f"Float8 loses nearly everywhere here: {reach}, from which the filter converts linears that share no input."


def _table_row(variant: Variant, times: list[_LinearTimes]) -> VerdictRow:
    convert = tuple(one.linear.role for one in times if one.convert)
    return VerdictRow(variant=variant, convert=convert, bf16_ms=_bf16_ms(times), float8_ms=_float8_ms(times))


def _plan_row(variant: Variant, plan: Plan, linears: list[LinearRole], outside: list[_LinearTimes]) -> VerdictRow:
    """The plan's set for the blocks; the table for what lies outside of them, such as the head."""
    fwd_us, bwd_us, speedup, low, high = (number for number in plan.chosen.numbers if number is not None)
    blocks = max(linear.count for linear in linears)
    block_ms = (fwd_us + bwd_us) / 1e3
    planned = [linear.role for linear in linears if _is_planned(plan, linear)]
    return VerdictRow(
        variant=variant,
        convert=(*planned, *(one.linear.role for one in outside if one.convert)),
        bf16_ms=blocks * block_ms * speedup + _bf16_ms(outside),
        float8_ms=blocks * block_ms + _float8_ms(outside),
        plan=PlanMeasurement(
            speedup=speedup,
            low=low,
            high=high,
            blocks=blocks,
            by_table=tuple(one.linear.role for one in outside),
        ),
    )


def _is_planned(plan: Plan, linear: LinearRole) -> bool:
    place = plan.place(linear.fqn)
    return place is not None and any(role in plan.convert for role in place.roles)


def _fits(plan: Plan, shapes: Mapping[str, LinearShape]) -> bool:
    """Whether the filter would use this plan for a model with these shapes, if nothing is recomputed or left out."""
    return ModelPlans((plan,), "", recomputes=_never).fits(shapes, None, leaves_out=_never)


def _never(fqn: str) -> bool:
    return False


def _times(linear: LinearRole, shape: LinearShape, lookup: Lookup) -> _LinearTimes | None:
    """None if the shape is far outside of what the table holds."""
    estimate = lookup(shape)
    if estimate is None or estimate.is_far_outside:
        return None
    return _LinearTimes(
        linear=linear,
        convert=decide_linear(input_kind(linear.fqn), shape, lookup).convert,
        bf16_ms=linear.count * estimate.bf16_us / 1e3,
        float8_ms=linear.count * estimate.fp8_us / 1e3,
    )


def _bf16_ms(times: list[_LinearTimes]) -> float:
    return sum(one.bf16_ms for one in times)


def _float8_ms(times: list[_LinearTimes]) -> float:
    """With the table's choice."""
    return sum(one.float8_ms if one.convert else one.bf16_ms for one in times)
