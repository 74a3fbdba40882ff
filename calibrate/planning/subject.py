"""What is planned: the blocks of a model, their sizes before they are divided among ranks, and the file of their plans.

In: a model's name or its config.json. Out: a `Subject` for each kind of its layers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fp8gate.calibrate.arms.blueprint import BlockError, Blueprint, linears_in
from fp8gate.calibrate.arms.divided_layers import divide_layers
from fp8gate.calibrate.arms.linear import inductor_settings
from fp8gate.calibrate.arms.model_layers import LayerKind, layer_kinds, layer_lists
from fp8gate.calibrate.device.registry import describe_device
from fp8gate.filter.contract.devices import device_slug, require_own_file
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.plans.layer_names import LayerNames
from fp8gate.filter.contract.plans.plan import PLANS, PlanError
from fp8gate.filter.contract.plans.plan_file import MAX_KINDS, read_plans
from fp8gate.filter.contract.recipes import RECIPES, Variant
from fp8gate.filter.model.model_config import BUNDLED, config_json
from fp8gate.filter.model.observed import ObserveError
from fp8gate.filter.model.parallel import Parallel, Shards
from fp8gate.filter.observe.transformers_build import (
    TEXT,
    BuiltModel,
    build_model,
    longest_sequence,
    microbatch,
    quiet_transformers,
    towers,
)
from fp8gate.filter.observe.transformers_model import heads_of, own_plan

IN_PYTHON = "any block can be planned in Python: fp8gate.calibrate.planning.plan(block, example_inputs, recipe=RECIPE)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned: one kind of a model's layers.

    name: of the model. layers: which of its layers, as `LayerNames` reads it; "" for a block that is the model. whole:
    (in_features, out_features) of each role before it is divided. left_out: roles that are to stay in bf16.
    """

    name: str
    blueprint: Blueprint
    whole: Mapping[str, tuple[int, int]]
    tokens: int
    layers: str = ""
    sequence: int | None = None
    tp: int = 1
    left_out: tuple[str, ...] = ()

    @property
    def possible(self) -> tuple[str, ...]:
        """The roles that can be converted."""
        shapes = self.blueprint.shapes
        return tuple(role for role in shapes if role not in self.left_out and not shapes[role].indivisible())


def model_subjects(
    model: str,
    *,
    tokens: int,
    sequence: int | None,
    tp: int,
    recomputed: bool,
    filter_fqns: tuple[str, ...] = (),
) -> tuple[list[Subject], list[str]]:
    """Each kind of a model's layers as one rank holds it, and a line for each list of layers that cannot be planned.

    model: a bundled name, or the path of a config.json. sequence: tokens of one sequence; None for as many as the model
    takes. Raises ModelError or BlockError for a model that cannot be planned, or sizes that do not divide.
    """
    built = build_model(model, config_json(model))
    is_text = getattr(built.module, "main_input_name", TEXT) == TEXT
    length = sequence_of(longest_sequence(built.config), tokens, sequence) if is_text else None
    whole = {name: (linear.in_features, linear.out_features) for name, linear in linears_in(built.module)}
    if tp > 1:
        _divide(model, built, tokens, tp)
    with quiet_transformers():
        try:
            calls = dict(_calls(built, tokens, length))
        except ObserveError as error:
            raise BlockError(f"{model}: its forward cannot be run without data: {error}. But {IN_PYTHON}") from error
        kinds, problems = layer_kinds(built.module, calls)
    subjects = []
    for kind in kinds:
        of_tower = any(kind.names.startswith(f"{name}.") for name in calls if name)
        names = {block_role(fqn): fqn for fqn, _ in linears_in(kind.module)}
        try:
            subject = Subject(
                name=model if model in BUNDLED else _name_of(Path(model)),
                blueprint=Blueprint.made(
                    kind.module, kind.inputs, kind.shapes, recomputed, about=f"{built.config} {kind.does}"
                ),
                whole={role: whole[f"{kind.layers[0]}.{names[role]}"] for role in kind.shapes},
                tokens=tokens,
                layers=kind.names,
                sequence=None if of_tower else length,
                tp=tp,
                left_out=tuple(role for role in kind.shapes if _is_left_out(names[role], kind, filter_fqns)),
            )
        except BlockError as error:
            problems.append(f"{kind.names}: {error}")
            continue
        if subject.possible:
            subjects.append(subject)
        else:
            problems.append(f"{kind.names}: no linear that may be converted: left out, or no multiples of 16")
    _require_a_file(model, subjects, problems)
    return subjects, problems


def _require_a_file(model: str, subjects: Sequence[Subject], problems: Sequence[str]) -> None:
    """Raises BlockError for subjects whose plans could not be written together, before anything is measured."""
    if not subjects:
        raise BlockError(f"{model}: no layer of it can be planned: {'; '.join(problems)}. But {IN_PYTHON}")
    if len(subjects) > MAX_KINDS:
        raise BlockError(f"{model}: expected at most {MAX_KINDS} kinds of layers, found {len(subjects)}; {IN_PYTHON}")
    for one, other in itertools.combinations(subjects, 2):
        if LayerNames(one.layers).overlaps(LayerNames(other.layers)):
            raise BlockError(f"{model}: {one.layers} is called in two ways, so that no plan can decide it")


def _is_left_out(role: str, kind: LayerKind, filter_fqns: Sequence[str]) -> bool:
    """Raises InputError for a pattern that leaves a role out of some of these layers only."""
    for pattern in filter_fqns:
        found = [pattern in f"{layer}.{role}" for layer in kind.layers]
        if all(found):
            return True
        if any(found):
            raise InputError(
                f"--filter-fqns: {pattern!r} leaves {role} out of some of {kind.names} only, of which one block is "
                "measured; plan without it: the filter then uses what was measured of the rest"
            )
    return False


def sequence_of(longest: int | None, tokens: int, asked: int | None) -> int:
    """Tokens of one sequence: as asked, else as many as the model takes. longest: that it takes; None for any number.

    Raises BlockError if that does not divide the tokens.
    """
    sequence = asked or min(tokens, longest or tokens)
    if tokens % sequence:
        limit = "" if asked else ", the most that the model takes; give --sequence"
        raise BlockError(f"sequence: expected a divisor of tokens = {tokens}; got {sequence}{limit}")
    return sequence


def _divide(model: str, built: BuiltModel, tokens: int, tp: int) -> None:
    for name, heads in heads_of(built).items():
        if heads % tp:
            raise BlockError(f"tp: expected a divisor of {name} = {heads}; got {tp}")
    plan = own_plan(built)
    layers = [layer for _, layers in layer_lists(built.module) for layer in layers.values()]
    before = [parameter.shape for layer in layers for parameter in layer.parameters()]
    if plan:
        divide_layers(built.module, Shards(Parallel(tp=tp, plan=plan), tokens), tp)
    if before == [parameter.shape for layer in layers for parameter in layer.parameters()]:
        raise BlockError(
            f"tp: {model} has no tensor parallel plan in transformers that divides its layers; {IN_PYTHON}"
        )


def _calls(built: BuiltModel, tokens: int, sequence: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the model, and the models inside one of text that take images or sound, are called with: zeros on the CPU.

    sequence: tokens of one sequence of text; None for a model that takes something else.
    """
    inputs = microbatch(built.module, built.config, tokens, sequence)
    if hasattr(built.config, "use_cache"):
        inputs["use_cache"] = False
    yield "", tree_map_only(Tensor, _zeros, inputs)
    for name, tower in towers(built.module) if sequence else ():
        with contextlib.suppress(ObserveError):  # its layers are then ones that these inputs do not reach
            yield name, tree_map_only(Tensor, _zeros, microbatch(tower, tower.config, tokens))


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


def plan_path(
    out: Path,
    subjects: Sequence[Subject],
    variant: Variant,
    device: torch.device,
    emulate_precision_casts: bool | None = None,
) -> Path:
    """<out>/<device>/plans/<model>-<recipe>-m<tokens>.yaml, with every setting that is not the default.

    subjects: the kinds of one model's layers.

    Raises InputError if a plan of a device whose name only looks alike is there: it would be replaced.
    """
    subject = next((one for one in subjects if one.sequence), subjects[0])
    left_out = dict.fromkeys(role.rpartition(".")[2] for one in subjects for role in one.left_out)
    recipe = variant.recipe
    settings = inductor_settings(recipe, emulate_precision_casts)
    parts = [subject.name, recipe, f"m{subject.tokens}"]
    parts += [f"s{subject.sequence}"] if subject.sequence not in (None, subject.tokens) else []
    parts += [f"tp{subject.tp}"] if subject.tp > 1 else []
    parts += [f"without_{'_'.join(left_out)}"] if left_out else []
    parts += ["recomputed"] if subject.blueprint.recomputed else []
    parts += [name for name in settings if name not in RECIPES[recipe].inductor]
    parts += [f"no_{name}" for name in RECIPES[recipe].inductor if name not in settings]
    name = describe_device(device).name
    path = out / device_slug(name) / PLANS / f"{'-'.join(parts)}{variant.suffix}.yaml"
    with contextlib.suppress(PlanError):  # one that cannot be read is replaced
        if path.exists():
            require_own_file(path, read_plans(path)[0].device.name, name)
    return path


def _name_of(config: Path) -> str:
    """The model of a config.json has the name of its folder, as Hugging Face keeps them."""
    if config.is_dir():
        return config.absolute().name
    return config.absolute().parent.name if config.stem == "config" else config.stem
