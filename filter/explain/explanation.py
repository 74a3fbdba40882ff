"""Explain what the filter would do to a model, and what that is worth. It needs a config and a table, but no GPU.

In: a `DescribedModel` and a filter. Out: an `Explanation`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fp8gate.filter.contract.plans.layer_names import common_name
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.plans.role_names import RoleNames, Roles, is_fused
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table, TableError
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.decision.estimate import MAX_OCTAVES_OUTSIDE, Estimate
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import decide_linear, input_kind
from fp8gate.filter.decision.torchao_rule import torchao_converts
from fp8gate.filter.layer_filter import AutoFilter
from fp8gate.filter.model.described_model import DescribedModel, LinearRole, role_shape
from fp8gate.filter.model.parallel import Shards
from fp8gate.filter.planned.model_plans import ModelPlans
from fp8gate.filter.policy.findings import Finding
from fp8gate.filter.shapes_command import shapes_command


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExplanation:
    """Linears of one kind with one decision: the shape that a rank holds, what decides, and the times by the table.

    decision: the filter's. by_table: what the table alone would decide. torchao: whether torchao's rule would convert
    it, None if torchao has no rule for the recipe. stays: it is bf16 in every choice, as float8 cannot compute it or
    the user leaves it out. is_far: too far outside of what was measured; it is bf16, and its times are 0.
    """

    linear: LinearRole
    shape: LinearShape
    decision: Decision
    by_table: Decision
    torchao: bool | None
    stays: bool
    is_far: bool
    bf16_us: float
    fp8_us: float

    def row(self) -> dict[str, Any]:
        """The row of the JSON output: names, local shape, answer and reason."""
        return {
            "role": self.linear.role,
            "fqn": self.linear.fqn,
            "count": self.linear.count,
            "m": self.shape.m,
            "k": self.shape.k,
            "n": self.shape.n,
            "convert": self.decision.convert,
            "table_converts": self.by_table.convert,
            "torchao_converts": self.torchao,
            "speedup": self.by_table.speedup,
            "speedup_low": self.by_table.speedup_low,
            "speedup_high": self.by_table.speedup_high,
            "reason": self.decision.reason,
        }


Chooses = Callable[[LayerExplanation], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to choose what to convert, and what it is worth.

    us: forward + backward of all linears of a rank for one microbatch, in microseconds: a sum of the table's times,
    without what fusion in a compiled model adds or takes away. in_block: what the plans measured of this choice inside
    the compiled blocks, if there are plans and they measured these sets.
    """

    name: str
    converted: tuple[LayerExplanation, ...]
    us: float
    in_block: SpeedupInBlocks | None


class SpeedupInBlocks(NamedTuple):
    """bf16 time / a choice's time of forward plus backward, summed over all blocks of the model, with bounds."""

    speedup: float
    speedup_low: float
    speedup_high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What a filter decides about a model, and what other choices are worth.

    choices: bf16 first, the filter's last; torchao's rule is left out for a recipe without one. plans: those that
    decide, None if the table does. plan_command: what measures one, None if `fp8gate plan` does not know the model.
    with_casts: the same with fp8gate's casts, to tell of them where they were not asked for.
    measure_command: what measures the shapes, but for the casts. has_config: where it is not so, the shapes are
    `LISTED` for it. findings: what should be known before the decisions are trusted. note: what the times leave out,
    or None.
    """

    model: str
    table: Table
    layers: list[LayerExplanation]
    choices: list[Choice]
    plans: ModelPlans | None
    plan_command: str | None
    has_config: bool
    measure_command: str
    min_speedup: float | None
    findings: list[Finding]
    note: str | None
    with_casts: Explanation | None = None

    @property
    def chosen(self) -> Choice:
        """What the filter chooses."""
        return self.choices[-1]

    @property
    def bf16(self) -> Choice:
        return self.choices[0]

    @property
    def speedup(self) -> float:
        """Of what the filter chooses over bf16, by the table's sums."""
        return self.speedup_of(self.chosen)

    def speedup_of(self, choice: Choice) -> float:
        """1.0 where nothing takes time."""
        return self.bf16.us / choice.us if choice.us else 1.0

    def choice(self, name: str) -> Choice | None:
        return next((choice for choice in self.choices if choice.name == name), None)


LISTED = ", listed in FILE.yaml as shapes: [[M, K, N], ...]"
BF16, ALL, RULE, TABLE, PLAN = "bf16", "all float8", "torchao's rule", "fp8gate, table", "fp8gate, plan"


def explain(model: DescribedModel, wants_float8: AutoFilter) -> Explanation:
    """Decide every kind of linear of a model as one rank holds it, and sum the times of each choice.

    Raises TableError if the table holds no number at all, or none near enough to any of the model's shapes, and
    ShardError if a layer cannot be divided.
    """
    settings = wants_float8.settings
    shards, lookup = Shards(settings.parallel, settings.tokens), Lookup(wants_float8.table, settings.lookup)
    linears = model.linears
    shapes = [role_shape(linear, shards) for linear in linears]
    named = [(name, linear) for linear in linears for name in linear.names]
    findings = wants_float8.examine(named, observation=model.observation)
    estimates = _estimates(model, shapes, lookup, wants_float8)
    layers = [
        _explain_layer(part, shape, estimate, lookup, wants_float8, model)
        for linear, shape, estimate in zip(linears, shapes, estimates, strict=True)
        for part in _by_decision(linear, wants_float8)
    ]
    plans = wants_float8.plans.chosen if any(layer.decision.planned for layer in layers) else None
    return Explanation(
        model=model.name,
        table=wants_float8.table,
        layers=layers,
        choices=list(_choices(layers, plans)),
        plans=plans,
        plan_command=wants_float8.plans.command(model.name) if model.has_config else None,
        has_config=model.has_config,
        measure_command=_measure_command(model, wants_float8),
        min_speedup=settings.min_speedup,
        findings=findings,
        note=model.note,
    )


def _by_decision(linear: LinearRole, wants_float8: AutoFilter) -> list[LinearRole]:
    """The linears of one kind, apart where the filter decides differently: layers of several kinds may share them."""
    names: defaultdict[Decision, list[str]] = defaultdict(list)
    for name in linear.names:
        names[wants_float8.decisions[name]].append(name)
    if len(names) == 1:
        return [linear]
    return [
        replace(linear, fqn=common_name(some) or linear.fqn, count=len(some), known_names=tuple(some))
        for some in names.values()
    ]


def _estimates(
    model: DescribedModel, shapes: list[LinearShape], lookup: Lookup, wants_float8: AutoFilter
) -> list[Estimate]:
    """The table's estimates of all linears. Raises TableError if there is none, or if all are too far outside."""
    found = [estimate for shape in shapes if (estimate := lookup(shape))]
    if len(found) < len(shapes):
        raise TableError(
            f"{wants_float8.path}: $.points: expected a measured point, found none. To measure again, run on "
            f"{wants_float8.table.device.name}: fp8gate calibrate{wants_float8.table.variant.option}"
        )
    asked = [
        (f"{linear.role} {shape}", estimate.is_far_outside)
        for linear, shape, estimate in zip(model.linears, shapes, found, strict=True)
        if not shape.indivisible()  # those are never converted
    ]
    if asked and all(is_far for _, is_far in asked):
        raise TableError(
            f"{wants_float8.path}: all linears are more than {2**MAX_OCTAVES_OUTSIDE:.0f} times outside of what was "
            f"measured on {wants_float8.table.device.name}, such as {asked[0][0]}. To measure them"
            f"{'' if model.has_config else LISTED}, run on it: "
            f"{_measure_command(model, wants_float8)}{wants_float8.table.variant.option}; or ask about another --device"
        )
    return found


def _measure_command(model: DescribedModel, wants_float8: AutoFilter) -> str:
    if not model.has_config:
        return "fp8gate calibrate --grid FILE.yaml"
    return shapes_command(model.name, wants_float8.settings)


def _explain_layer(
    linear: LinearRole,
    shape: LinearShape,
    estimate: Estimate,
    lookup: Lookup,
    wants_float8: AutoFilter,
    model: DescribedModel,
) -> LayerExplanation:
    settings, is_called = wants_float8.settings, _is_called(linear, model)
    recomputed = settings.recomputes(linear.name)
    estimate = estimate.recomputed() if recomputed else estimate
    far = estimate.is_far_outside
    stays = bool(shape.indivisible()) or far or settings.leaves_out(linear.name)
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    decision = by_table = wants_float8.decisions[linear.name]
    if decision.planned:
        kind = input_kind(linear.name, model.observation)
        by_table = decide_linear(kind, shape, lookup, min_speedup=settings.min_speedup, recomputed=recomputed)
    return LayerExplanation(
        linear=linear,
        shape=shape,
        decision=decision,
        by_table=by_table,
        torchao=torchao_converts(wants_float8.table.recipe, **sizes),
        stays=stays,
        is_far=far and not shape.indivisible(),
        bf16_us=estimate.bf16_us if is_called and not far else 0.0,
        # every choice leaves a layer in bf16 that float8 cannot compute or that the user leaves out
        fp8_us=(estimate.bf16_us if stays else estimate.fp8_us) if is_called and not far else 0.0,
    )


def _is_called(linear: LinearRole, model: DescribedModel) -> bool:
    """Whether the forward that was observed, if any, calls it: others take no time."""
    seen = model.observation.linears.get(linear.name) if model.observation else None
    return seen is None or seen.calls > 0


def _choices(layers: list[LayerExplanation], plans: ModelPlans | None) -> Iterator[Choice]:
    ways: list[tuple[str, Chooses]] = [(BF16, lambda layer: False), (ALL, lambda layer: True)]
    if all(layer.torchao is not None for layer in layers):
        ways.append((RULE, lambda layer: bool(layer.torchao)))
    ways.append((TABLE, lambda layer: layer.by_table.convert))
    if plans:
        ways.append((PLAN, lambda layer: layer.decision.convert))
    for name, chooses in ways:
        converted = tuple(layer for layer in layers if chooses(layer))
        total = sum(layer.linear.count * (layer.fp8_us if layer in converted else layer.bf16_us) for layer in layers)
        yield Choice(name=name, converted=converted, us=total, in_block=_in_blocks(layers, converted, plans))


def _in_blocks(
    layers: list[LayerExplanation], converted: tuple[LayerExplanation, ...], plans: ModelPlans | None
) -> SpeedupInBlocks | None:
    """What the plans measured of these roles, for all blocks; None if a block or its set was not measured."""
    if plans is None or plans.missing:
        return None
    bf16_us, us = 0.0, [0.0, 0.0, 0.0]
    for plan in plans.plans:
        for roles in _converted_in_blocks(plan, layers, converted):
            if roles is None:
                return None
            found, bf16 = plan.candidate(roles), plan.candidate(())
            if not (found and bf16 and bf16.fwd_us and bf16.bwd_us):
                return None
            for i, ratio in enumerate((found.speedup, found.speedup_low, found.speedup_high)):
                if ratio is None:
                    return None
                us[i] += (bf16.fwd_us + bf16.bwd_us) / ratio
            bf16_us += bf16.fwd_us + bf16.bwd_us
    return SpeedupInBlocks(*(bf16_us / one for one in us)) if bf16_us else None


def _converted_in_blocks(
    plan: Plan, layers: list[LayerExplanation], converted: tuple[LayerExplanation, ...]
) -> Iterator[Roles | None]:
    """The roles that are converted in each of the plan's blocks; None for a block that is not the measured one."""
    names, blocks = RoleNames(plan.shapes, plan.layers), defaultdict[str, set[str]](set)
    others: set[str] = set()
    for layer in layers:
        for place in filter(None, map(names.place, layer.linear.names)):
            blocks[place.block].update(place.roles if layer in converted and not layer.stays else ())
            if not place.roles or not _is_measured(plan, place.roles, layer):
                others.add(place.block)
    for block, roles in blocks.items():
        yield None if block in others else tuple(role for role in plan.shapes if role in roles)


def _is_measured(plan: Plan, roles: Roles, layer: LayerExplanation) -> bool:
    shapes = plan.shapes_of(roles, is_fused=is_fused(layer.linear.fqn))
    return all(layer.shape == shape for shape in shapes.values())
