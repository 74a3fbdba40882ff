"""The plan: which roles of one block train faster in float8 together, measured inside the compiled block. Pure.

In: what was measured. Out: a `Plan`, and whether its numbers go together.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from fp8gate.filter.contract.plans.layer_names import PATTERN, LayerNames
from fp8gate.filter.contract.plans.role_names import PlaceInBlock, RoleNames, Roles
from fp8gate.filter.contract.reading.messages import FileError
from fp8gate.filter.contract.recipes import VARIANTS, Casts, Recipe, Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device, Positive, Size, Software, TimerName

CandidateStatus = Literal["measured", "out_of_memory", "failed"]

PLANS = "plans"  # the folder beside a device's tables


class PlanError(FileError):
    """A plan that cannot be used; the message names the file, the field and what was expected there."""


class PlanProtocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the numbers were taken.

    In one visit a candidate ran alone on the device: after pause_s of idling it ran for settle_s, which do not count,
    and then for run_s. Visits came in rounds of bf16 and the candidates in question, in random order.
    screening: visits of every candidate, except those that an exhaustive plan ruled out after the first. final: further
    visits of the few best candidates and of the sets that the table and torchao's rule name. Their numbers come from
    these visits alone, with bounds at `confidence`. noise: the search followed a change only if it gained more than
    this share. It is also the half width of the bounds of candidates that were only screened (1.4 times it after a
    single visit).
    inductor: the settings that candidates were compiled with. bf16 was compiled with the defaults. casts: who compiled
    the casts of candidates. A file has it only if that is not Inductor.
    """

    timer: TimerName
    compile: bool
    inductor: dict[str, bool]
    casts: Casts = "inductor"
    l2: Literal["cold"]
    data: str
    settle_s: Annotated[float, msgspec.Meta(ge=0)]
    run_s: Positive
    pause_s: Annotated[float, msgspec.Meta(ge=0)]
    screening: Size
    final: Size
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    noise: Positive
    seed: int


class TableUsed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table whose answer the search started from. convert: the roles that it converts."""

    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    torch: str
    min_speedup: Positive
    convert: Roles


class Candidate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One set of roles measured in the block. Times are in microseconds, means over its visits.

    speedup: bf16 time / the set's time of forward plus backward, from the ratios of each visit, with bounds.
    predicted: the speedup by the table: the block's bf16 time over that time less what the set's linears save alone.
    error: the largest relative difference between the set's output or gradients and those of bf16.
    """

    convert: Roles
    visits: Annotated[int, msgspec.Meta(ge=0)]
    fwd_us: Positive | None
    bwd_us: Positive | None
    speedup: Positive | None
    speedup_low: Positive | None
    speedup_high: Positive | None
    predicted: Positive | None
    error: Annotated[float, msgspec.Meta(ge=0)] | None
    status: CandidateStatus

    @property
    def numbers(self) -> tuple[float | None, ...]:
        return self.fwd_us, self.bwd_us, self.speedup, self.speedup_low, self.speedup_high


COLUMNS = Candidate.__struct_fields__


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"schema_": "schema"}):
    """The measurements of one block, and the set of roles to convert. Field order is the order in the file.

    block: a hash of its code, settings and inputs. shapes: (m, k, n) of each role as one rank holds it. indivisible:
    roles that float8 cannot compute. left_alone: modules of the block that hold several matrices in one parameter, such
    as experts. table: None if there was no table. torchao: the roles that torchao's rule converts, None for a recipe
    without a rule. control: the speedup of bf16 over itself, compiled and loaded a second time; None if that failed. A
    set is chosen only if it gains more. exhaustive: every set was to be measured. left_out: roles that were to stay in
    bf16. layers: which layers of the model are such blocks, as `LayerNames` reads it ("model.layers.1-45"); "" for all
    that are in a list named `layers`.
    incomplete: the search was stopped before its end, and `convert` is the best of the sets that it had come to; then
    `control` may be None because it was not measured yet. missing: the other layers of the model that were to be
    planned too, and had not been when the command was stopped; all documents of a file say the same.
    The same command goes on, and then writes the file without both. A file has the last four only if they say
    something.
    """

    schema_: Literal[1] = 1
    recipe: Recipe
    model: str
    tokens: Size
    sequence: Size | None
    tp: Size
    recompute: Literal["none", "full"]
    device: Device
    software: Software
    protocol: PlanProtocol
    block: str
    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    shapes: dict[str, tuple[Size, Size, Size]]
    indivisible: Roles
    left_alone: Roles
    table: TableUsed | None
    torchao: Roles | None
    control: Positive | None
    convert: Roles
    exhaustive: bool
    left_out: Roles = ()
    layers: Annotated[str, msgspec.Meta(pattern=f"^({PATTERN})?$")] = ""
    incomplete: bool = False
    missing: tuple[Annotated[str, msgspec.Meta(pattern=f"^{PATTERN}$")], ...] = ()
    columns: tuple[str, ...] = COLUMNS
    candidates: tuple[Candidate, ...]

    @property
    def variant(self) -> Variant:
        return Variant(self.recipe, self.protocol.casts)

    def place(self, fqn: str) -> PlaceInBlock | None:
        """Where a linear is in a whole model of Hugging Face or torchtitan. None if it is in no block."""
        return RoleNames(self.shapes, self.layers).place(fqn)

    @property
    def possible(self) -> Roles:
        """The roles that could be converted."""
        return tuple(role for role in self.shapes if role not in (*self.indivisible, *self.left_out))

    def shape(self, role: str) -> LinearShape:
        return LinearShape(*self.shapes[role])

    def shapes_of(self, roles: Roles, *, is_fused: bool) -> dict[str, LinearShape]:
        """The shape that one linear of these roles must have, by role: that of each of them.

        is_fused: it multiplies their common input once, and is as wide as all of them together. Then the first role
        stands for all. Roles of different inputs cannot be fused; each keeps its shape.
        """
        shapes = {role: self.shape(role) for role in roles}
        inputs = {(shape.m, shape.k) for shape in shapes.values()}
        if not is_fused or len(inputs) > 1:
            return shapes
        ((m, k),) = inputs
        return {roles[0]: LinearShape(m, k, sum(shape.n for shape in shapes.values()))}

    def candidate(self, convert: Roles) -> Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.convert == convert), None)

    @property
    def visits(self) -> int:
        """Of all sets, bf16 among them."""
        return sum(candidate.visits for candidate in self.candidates)

    def wins(self, speedup_low: float) -> bool:
        """Whether a set gains more than bf16 over itself, or than nothing where a stopped search does not know that."""
        if self.incomplete and self.control is None:
            return speedup_low > 1.0
        return exceeds_control(speedup_low, self.control)

    @property
    def chosen(self) -> Candidate:
        chosen = self.candidate(self.convert)
        assert chosen, "checked on reading"
        return chosen


def exceeds_control(speedup_low: float, control: float | None) -> bool:
    """Whether a set gains more than bf16 differs from itself. control: see `Plan`; if it is None, no set does."""
    return control is not None and speedup_low > max(1.0, control, 1 / control)


def check_plan(plan: Plan, source: str) -> None:
    """Check what types cannot: column names, known roles, duplicates, consistent numbers, and that the choice wins.

    Raises PlanError, which begins with `source`.
    """
    if plan.columns != COLUMNS:
        raise PlanError(f"{source}: $.columns: expected {list(COLUMNS)}, found {list(plan.columns)}")
    if plan.variant not in VARIANTS:
        raise PlanError(f"{source}: $.protocol.casts: {plan.recipe} cannot have {plan.protocol.casts}'s casts")
    if not plan.shapes:
        raise PlanError(f"{source}: $.shapes: expected at least one role")
    for field, pattern in (("layers", plan.layers), *(("missing", one) for one in plan.missing)):
        if LayerNames(pattern).has_none:
            raise PlanError(f"{source}: $.{field}: expected ranges from low to high; found {pattern!r}")
    table = () if plan.table is None else plan.table.convert
    fields = {"indivisible": plan.indivisible, "torchao": plan.torchao or (), "table.convert": table}
    for field, roles in {**fields, "left_out": plan.left_out}.items():
        _check_roles(plan, roles, f"{source}: $.{field}")
    seen: set[Roles] = set()
    for i, candidate in enumerate(plan.candidates):
        where = f"{source}: $.candidates[{i}]"
        _check_candidate(plan, candidate, where)
        if candidate.convert in seen:
            raise PlanError(f"{where}: {list(candidate.convert)} is there twice; expected each set once")
        seen.add(candidate.convert)
    chosen = plan.candidate(plan.convert)
    if chosen is None or chosen.speedup_low is None:
        raise PlanError(f"{source}: $.convert: expected a set that was measured, found {list(plan.convert)}")
    if plan.convert and not plan.wins(chosen.speedup_low):
        is_unknown = plan.incomplete and plan.control is None
        above = "1.0" if is_unknown else f"1.0 and $.control = {plan.control}, either way"
        raise PlanError(
            f"{source}: $.convert: expected a set above {above}, bounds included; found {chosen.speedup_low}"
        )


def _check_roles(plan: Plan, roles: Roles, where: str) -> None:
    named = set(roles)
    if unknown := sorted(named - plan.shapes.keys()):
        raise PlanError(f"{where}: expected roles of $.shapes, found {unknown[0]!r}")
    if list(roles) != [role for role in plan.shapes if role in named]:
        raise PlanError(f"{where}: expected each role once, in the order of $.shapes; found {list(roles)}")


def _check_candidate(plan: Plan, candidate: Candidate, where: str) -> None:
    _check_roles(plan, candidate.convert, f"{where}.convert")
    has_numbers = candidate.status == "measured"
    for column, number in zip(COLUMNS[2:7], candidate.numbers, strict=True):
        if has_numbers and (number is None or not math.isfinite(number)):
            raise PlanError(f"{where}.{column}: expected a finite number, as it was measured; found {number}")
        if not has_numbers and number is not None:
            raise PlanError(f"{where}.{column}: expected null for status {candidate.status}, found {number}")
    low, speedup, high = candidate.speedup_low, candidate.speedup, candidate.speedup_high
    if has_numbers and not (low or 0) <= (speedup or 0) <= (high or 0):  # the loop above left no None
        raise PlanError(f"{where}.speedup: expected low <= speedup <= high, found {low}, {speedup}, {high}")
