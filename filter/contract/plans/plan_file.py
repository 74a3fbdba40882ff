"""Plan files: one YAML document for each kind of layers that a model has, with `---` between them.

In: a file, or plans built from measurements. Out: validated plans, or a file that reads well in a diff.
Try it: python -c "from fp8gate.filter.contract.plans.plan_file import read_plans; print(read_plans('FILE.yaml'))"
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.plain_yaml import (
    convert,
    format_number,
    load_plain_yaml,
    read_text,
    require_schema,
    write_atomically,
    yaml_line,
)
from fp8gate.filter.contract.plans.layer_names import LayerNames
from fp8gate.filter.contract.plans.plan import Candidate, Plan, PlanError, check_plan
from fp8gate.filter.contract.recipes import Variant, other_casts, other_casts_option

Plans = tuple[Plan, ...]
"""The plans of one model, one for each kind of its layers: same training, other layers."""

_BETWEEN = re.compile(r"^---(?:[ \t]+#.*)?[ \t]*\r?$", re.MULTILINE)
MAX_KINDS = 64
_OF_THE_MODEL = ("recipe", "model", "tokens", "tp", "recompute", "missing")
"""What all plans of a model have in common, beside the device."""
_ONLY_IF_SAID = ("left_out", "layers", "incomplete", "missing")


def read_plans(path: str | os.PathLike[str]) -> Plans:
    """Read and validate a plan file.

    Raises PlanError if the file cannot be read, is not plain YAML data, or breaks the schema in any way.
    """
    return parse_plans(read_text(path, PlanError), source=str(path))


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """`read_plans` for a model whose layers are all of one kind. Raises PlanError if there are several kinds."""
    plans = read_plans(path)
    if len(plans) > 1:
        raise PlanError(f"{path}: expected a plan of one kind of layers, found {len(plans)}; read_plans reads them all")
    return plans[0]


def parse_plans(text: str, *, source: str) -> Plans:
    """`read_plans` for text already in memory; `source` names it in errors."""
    texts = [one for one in _BETWEEN.split(text) if _says_something(one)] or [text]
    if len(texts) > MAX_KINDS:
        raise PlanError(f"{source}: expected at most {MAX_KINDS} kinds of layers, found {len(texts)}")
    names = [source] if len(texts) == 1 else [f"{source}: document {i + 1}" for i in range(len(texts))]
    plans = tuple(_parse(one, name) for one, name in zip(texts, names, strict=True))
    _check_together(plans, source)
    return plans


def load_plans(plan: Plan | Sequence[Plan] | str | os.PathLike[str]) -> tuple[Plans, str]:
    """The plans, read if this is a path, and the name that messages give them."""
    if isinstance(plan, (str, os.PathLike)):
        return read_plans(plan), str(plan)
    plans = (plan,) if isinstance(plan, Plan) else tuple(plan)
    if not plans:
        raise PlanError("plan: expected at least one; got none")
    source = f"of {plans[0].model}"
    for one in plans:
        check_plan(one, source)
    _check_together(plans, source)
    return plans, source


def require_same_training(plans: Plans, source: str, *, variant: Variant, device: str, tokens: int) -> None:
    """Raises PlanError for plans of other training. tokens: of one rank, after context parallelism."""
    plan = plans[0]
    for field, expected, found in (("recipe", variant.recipe, plan.recipe), ("tokens", tokens, plan.tokens)):
        if expected != found:
            raise PlanError(f"{source}: $.{field}: expected {expected}, found {found}")
    if plan.variant != variant:
        differs = f"{source}: $.protocol.casts: expected {variant.casts}, found {plan.variant.casts}"
        option = f"{differs}: {other_casts_option(plan.variant)}"
        raise PlanError(f"{differs}: {other_casts(plan.variant)}", on_command_line=option)
    if device_slug(plan.device.name) != device_slug(device):
        raise PlanError(f"{source}: $.device.name: expected {device}, found {plan.device.name}")


def are_complete(plans: Plans) -> bool:
    """Whether the search for each of them came to its end, and all kinds of the model's layers are there."""
    return not any(plan.incomplete or plan.missing for plan in plans)


def write_plans(plans: Sequence[Plan], path: str | os.PathLike[str]) -> None:
    """Write atomically. Raises PlanError, and writes nothing, if the file could not be read again."""
    text = format_plans(plans)
    parse_plans(text, source=str(path))
    write_atomically({Path(path): text})


def format_plans(plans: Sequence[Plan]) -> str:
    """The file's text: keys in a fixed order, one shape or candidate a line, rounded numbers."""
    return "---\n".join(map(_format, plans))


def _format(plan: Plan) -> str:
    header = msgspec.to_builtins(plan)
    del header["candidates"]
    for name in _ONLY_IF_SAID:
        if not header[name]:
            del header[name]
    lines = [f"{key}:\n{_shapes(plan)}" if key == "shapes" else yaml_line(key, value) for key, value in header.items()]
    return "".join(lines) + "candidates:\n" + "".join(map(_format_candidate, plan.candidates))


def _shapes(plan: Plan) -> str:
    return "".join(f"  {yaml_line(role, list(shape))}" for role, shape in plan.shapes.items())


def _format_candidate(candidate: Candidate) -> str:
    convert = yaml_line("convert", list(candidate.convert)).removeprefix("convert:").strip()
    numbers = map(format_number, (*candidate.numbers, candidate.predicted, candidate.error))
    return f"  - [{', '.join([convert, str(candidate.visits), *numbers, candidate.status])}]\n"


def _says_something(text: str) -> bool:
    """Whether there is more than blanks and comments, such as a licence before the first document."""
    return any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines())


def _parse(text: str, source: str) -> Plan:
    data = load_plain_yaml(text, source=source, error=PlanError)
    require_schema(data, source=source, error=PlanError)
    plan = convert(data, Plan, source=source, error=PlanError)
    check_plan(plan, source)
    return plan


def _check_together(plans: Plans, source: str) -> None:
    """Several plans are of the same training, and no layer is in two of them, or in one and missing."""
    first, *others = plans
    for plan in others:
        for field in _OF_THE_MODEL:
            expected, found = getattr(first, field), getattr(plan, field)
            if expected != found:
                raise PlanError(f"{source}: $.{field}: expected {expected} as in the first document, found {found}")
        if plan.variant != first.variant:
            expected = f"expected {first.variant.casts} as in the first document, found {plan.variant.casts}"
            raise PlanError(f"{source}: $.protocol.casts: {expected}")
        if device_slug(plan.device.name) != device_slug(first.device.name):
            raise PlanError(f"{source}: $.device.name: expected {first.device.name}, found {plan.device.name}")
    for one, other in itertools.combinations(plans, 2):
        if LayerNames(one.layers).overlaps(LayerNames(other.layers)):
            raise PlanError(
                f"{source}: $.layers: expected each layer in one document, found {one.layers!r} and {other.layers!r}"
            )
    for plan, missing in itertools.product(plans, first.missing):
        if LayerNames(plan.layers).overlaps(LayerNames(missing)):
            raise PlanError(
                f"{source}: $.missing: expected layers of no document, found {missing!r} and {plan.layers!r}"
            )
