"""The plan: which roles of one block train faster in float8 together, measured inside the compiled block.

In: a file, or a `Plan` built from measurements. Out: a validated `Plan`, or a file that reads well in a diff.
Try it: python -c "from fp8gate.filter.contract.plan import read_plan; print(read_plan('FILE.yaml').convert)"
"""

from __future__ import annotations

import math
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import hugging_face_role, plain_name
from fp8gate.filter.contract.plain_yaml import (
    convert,
    format_number,
    load_plain_yaml,
    read_text,
    require_schema,
    write_atomically,
    yaml_line,
)
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device, Positive, Size, Software

Roles = tuple[str, ...]
CandidateStatus = Literal["measured", "out_of_memory", "failed"]

PLANS = "plans"  # the folder beside a device's tables

_TWO_IN_ONE = {"wkv": ("wk", "wv")}  # torchtitan builds both of one config; its fused wqkv is one product: no role
_BLOCK = re.compile(r"((?:model\.|language_model\.)*layers\.\d+)\.")  # nothing else before: vision towers have layers


class PlanError(InputError):
    """A plan that cannot be used; the message names the file, the field and what was expected there."""


class PlaceInBlock(NamedTuple):
    """A linear's block, such as "model.layers.3", "" for a model that is the block, and its roles: none if unknown."""

    block: str
    roles: Roles


class PlanProtocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the numbers were taken.

    Each candidate ran alone on the device: after pause_s of idling, settle_s uncounted, then run_s. That is a visit.
    Visits came in rounds: bf16 and those asked about, in random order. screening: visits of every candidate, but for
    an exhaustive plan's that the first one ruled out; final: further ones of the few best and of what the table and
    torchao's rule say, of which alone their numbers are, with bounds at `confidence`. noise: what a change had to gain,
    as a share, to be followed; the bounds of candidates that were only screened are no more than that (of one visit,
    1.4 times as wide).
    inductor: the settings that candidates were compiled with; bf16 was compiled with the defaults.
    """

    timer: Literal["cuda_graphs", "wall_clock"]
    compile: bool
    inductor: dict[str, bool]
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
    """The table whose answer the search started from, and what it said: the roles it converts."""

    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    torch: str
    min_speedup: Positive
    convert: Roles


class Candidate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One set of roles measured in the block. Times in microseconds, means over its visits.

    speedup: bf16 time / its time of forward plus backward, from the ratios of each visit, with bounds. predicted: what
    the table says of it: the block's bf16 time over that time less what its linears save alone. error: the largest
    relative difference of the output and the gradients from bf16's.
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
    """What was measured of one block, and the set of roles that is to be converted.

    block: a hash of its code, settings and inputs. shapes: (m, k, n) of each role as one rank holds it. indivisible:
    roles that float8 cannot compute. left_alone: what of the block holds several matrices in one parameter, such as
    experts. table: None where there was none. torchao: what its rule converts, None for a recipe without one.
    control: what bf16 gained over itself, compiled and loaded again, None if that failed; a choice gains more.
    exhaustive: every set was measured. Field order is the order in the file.
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
    columns: tuple[str, ...] = COLUMNS
    candidates: tuple[Candidate, ...]

    def place(self, fqn: str) -> PlaceInBlock | None:
        """Where the linear of this name stands in a whole model, Hugging Face's or torchtitan's; None: in no block."""
        name = plain_name(fqn)
        if roles := self._roles(name):
            return PlaceInBlock("", roles)
        found = _BLOCK.match(name)
        return PlaceInBlock(found[1], self._roles(name[found.end() :])) if found else None

    def alike(self, fqn: str) -> str | None:
        """The role that this name ends like, for names in no block."""
        name = hugging_face_role(plain_name(fqn))
        return next((role for role in self.shapes if name.endswith(f".{hugging_face_role(role)}")), None)

    def _roles(self, name: str) -> Roles:
        """The roles that a name within a block has; none if one of them is not there."""
        known = {hugging_face_role(role): role for role in self.shapes}
        before, _, last = name.rpartition(".")
        names = [hugging_face_role(name)]
        if names[0] not in known and last in _TWO_IN_ONE:
            names = [hugging_face_role(f"{before}.{part}") for part in _TWO_IN_ONE[last]]
        return tuple(known[name] for name in names) if all(name in known for name in names) else ()

    def shape(self, role: str) -> LinearShape:
        return LinearShape(*self.shapes[role])

    def candidate(self, convert: Roles) -> Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.convert == convert), None)

    @property
    def chosen(self) -> Candidate:
        chosen = self.candidate(self.convert)
        assert chosen, "checked on reading"
        return chosen


def exceeds_control(speedup_low: float, control: float | None) -> bool:
    """Whether a set wins by more than bf16 differs from itself. control: see `Plan`; without it nothing wins."""
    return control is not None and speedup_low > max(1.0, control, 1 / control)


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and validate a plan file.

    Raises PlanError if the file cannot be read, is not plain YAML data, or breaks the schema in any way.
    """
    return parse_plan(read_text(path, PlanError), source=str(path))


def parse_plan(text: str, *, source: str) -> Plan:
    """`read_plan` for text already in memory; `source` names it in errors."""
    data = load_plain_yaml(text, source=source, error=PlanError)
    require_schema(data, source=source, error=PlanError)
    plan: Plan = convert(data, Plan, source=source, error=PlanError)
    _check(plan, source)
    return plan


def load_plan(plan: Plan | str | os.PathLike[str]) -> tuple[Plan, str]:
    """A plan, or a file's, and what to call it in messages."""
    if not isinstance(plan, Plan):
        return read_plan(plan), str(plan)
    source = f"of {plan.model}"
    _check(plan, source)
    return plan, source


def require_same_training(plan: Plan, source: str, *, recipe: Recipe, device: str, tokens: int) -> None:
    """Raises PlanError for a plan of other training. tokens: as context parallelism leaves them to a rank."""
    for field, here, there in (("recipe", recipe, plan.recipe), ("tokens", tokens, plan.tokens)):
        if here != there:
            raise PlanError(f"{source}: $.{field}: expected {here}, found {there}")
    if device_slug(plan.device.name) != device_slug(device):
        raise PlanError(f"{source}: $.device.name: expected {device}, found {plan.device.name}")


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write atomically. Raises PlanError rather than write what could not be read again."""
    text = format_plan(plan)
    parse_plan(text, source=str(path))
    write_atomically(Path(path), text)


def format_plan(plan: Plan) -> str:
    """The file's text: fixed key order, one shape and one candidate a line, numbers rounded."""
    header = msgspec.to_builtins(plan)
    del header["candidates"]
    lines = [f"{key}:\n{_shapes(plan)}" if key == "shapes" else yaml_line(key, value) for key, value in header.items()]
    return "".join(lines) + "candidates:\n" + "".join(map(_format_candidate, plan.candidates))


def _shapes(plan: Plan) -> str:
    return "".join(f"  {yaml_line(role, list(shape))}" for role, shape in plan.shapes.items())


def _format_candidate(candidate: Candidate) -> str:
    convert = yaml_line("convert", list(candidate.convert)).removeprefix("convert:").strip()
    numbers = map(format_number, (*candidate.numbers, candidate.predicted, candidate.error))
    return f"  - [{', '.join([convert, str(candidate.visits), *numbers, candidate.status])}]\n"


def _check(plan: Plan, source: str) -> None:
    """What types alone cannot say: column names, known roles, duplicates, consistent numbers, a choice that wins."""
    if plan.columns != COLUMNS:
        raise PlanError(f"{source}: $.columns: expected {list(COLUMNS)}, found {list(plan.columns)}")
    if not plan.shapes:
        raise PlanError(f"{source}: $.shapes: expected at least one role")
    table = () if plan.table is None else plan.table.convert
    for field, roles in (("indivisible", plan.indivisible), ("torchao", plan.torchao or ()), ("table.convert", table)):
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
    if plan.convert and not exceeds_control(chosen.speedup_low, plan.control):
        above = f"1.0 and $.control = {plan.control}, either way"
        raise PlanError(
            f"{source}: $.convert: expected a set above {above}, bounds included; found {chosen.speedup_low}"
        )


def _check_roles(plan: Plan, roles: Roles, where: str) -> None:
    unknown = [role for role in roles if role not in plan.shapes]
    if unknown:
        raise PlanError(f"{where}: expected roles of $.shapes, found {unknown[0]!r}")
    if list(roles) != [role for role in plan.shapes if role in roles]:
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
    if has_numbers and not (low or 0) <= (speedup or 0) <= (high or 0):  # none is None here: checked above
        raise PlanError(f"{where}.speedup: expected low <= speedup <= high, found {low}, {speedup}, {high}")
