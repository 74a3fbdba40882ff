"""What is planned: the blocks of a model, their sizes before they are divided among ranks, and the file of their plans.

In: a model's name or its config.json. Out: a `Subject` for each kind of its layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fp8gate.calibrate.arms.blueprint import BlockError, Blueprint, linears_in
from fp8gate.calibrate.arms.divided_layers import divide_layers
from fp8gate.calibrate.arms.linear import inductor_settings
from fp8gate.calibrate.arms.model_layers import layer_kinds
from fp8gate.calibrate.device.registry import describe_device
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.plans.plan import PLANS, PlanError
from fp8gate.filter.contract.plans.plan_file import read_plans
from fp8gate.filter.contract.recipes import RECIPES, Recipe
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

IN_PYTHON = "any block can be planned in Python: fp8gate.calibrate.planning.plan_block.plan(block, example_inputs)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned: one kind of a model's layers.

    name: of the model. layers: which of its layers, as `LayerNames` reads it; "" for a block that is the model. whole:
    (in_features, out_features) of each role before it is divided. names: of a linear of each role in the whole model.
    filter_fqns: roles with one of these in that name stay in bf16.
    """

    name: str
    blueprint: Blueprint
    whole: Mapping[str, tuple[int, int]]
    tokens: int
    layers: str = ""
    sequence: int | None = None
    tp: int = 1
    names: Mapping[str, str] = field(default_factory=dict)
    filter_fqns: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """The roles that `filter_fqns` leave in bf16."""
        names = {role: self.names.get(role, role) for role in self.blueprint.shapes}
        return tuple(role for role, name in names.items() if any(pattern in name for pattern in self.filter_fqns))

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
    for name, heads in heads_of(built).items():
        if heads % tp:
            raise BlockError(f"tp: expected a divisor of {name} = {heads}; got {tp}")
    whole = {name: (linear.in_features, linear.out_features) for name, linear in linears_in(built.module)}
    if tp > 1:
        _divide(model, built, tokens, tp)
    with quiet_transformers():
        calls = dict(_calls(built, tokens, length))
        kinds, problems = layer_kinds(built.module, calls)
    if not kinds:
        raise BlockError(f"{model}: no layer of it can be planned: {'; '.join(problems)}. But {IN_PYTHON}")
    inner = tuple(name for name in calls if name)
    subjects = []
    for kind in kinds:
        names = {block_role(fqn): f"{kind.example}.{fqn}" for fqn, _ in linears_in(kind.module)}
        subject = Subject(
            name=model if model in BUNDLED else _name_of(Path(model)),
            blueprint=Blueprint.made(
                kind.module, kind.inputs, kind.shapes, recomputed, about=f"{built.config} {kind.does}"
            ),
            whole={role: whole[names[role]] for role in kind.shapes},
            tokens=tokens,
            layers=kind.names,
            sequence=None if kind.example.startswith(inner) else length,
            tp=tp,
            names=names,
            filter_fqns=filter_fqns,
        )
        subjects.append(subject)
    return subjects, problems


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
    plan = own_plan(built)
    if not plan:
        raise BlockError(f"tp: {model} has no tensor parallel plan in transformers; {IN_PYTHON}")
    divide_layers(built.module, Shards(Parallel(tp=tp, plan=plan), tokens), tp)


def _calls(built: BuiltModel, tokens: int, sequence: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the model, and the models inside it that take images or sound, are called with: zeros on the CPU."""
    inputs = microbatch(built.module, built.config, tokens, sequence)
    if hasattr(built.config, "use_cache"):
        inputs["use_cache"] = False
    yield "", tree_map_only(Tensor, _zeros, inputs)
    for name, tower in towers(built.module):
        with contextlib.suppress(ObserveError):  # its layers are then ones that these inputs do not reach
            yield name, tree_map_only(Tensor, _zeros, microbatch(tower, tower.config, tokens))


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


def plan_path(
    out: Path,
    subjects: Sequence[Subject],
    recipe: Recipe,
    device: torch.device,
    emulate_precision_casts: bool | None = None,
) -> Path:
    """<out>/<device>/plans/<model>-<recipe>-m<tokens>.yaml, with every setting that is not the default.

    subjects: the kinds of one model's layers.

    Raises InputError if a plan of a device whose name only looks alike is there: it would be replaced.
    """
    subject = next((one for one in subjects if one.sequence), subjects[0])
    left_out = dict.fromkeys(role.rpartition(".")[2] for one in subjects for role in one.left_out)
    settings = inductor_settings(recipe, emulate_precision_casts)
    parts = [subject.name, recipe, f"m{subject.tokens}"]
    parts += [f"s{subject.sequence}"] if subject.sequence not in (None, subject.tokens) else []
    parts += [f"tp{subject.tp}"] if subject.tp > 1 else []
    parts += [f"without_{'_'.join(left_out)}"] if left_out else []
    parts += ["recomputed"] if subject.blueprint.recomputed else []
    parts += [name for name in settings if name not in RECIPES[recipe].inductor]
    parts += [f"no_{name}" for name in RECIPES[recipe].inductor if name not in settings]
    name = describe_device(device).name
    path = out / device_slug(name) / PLANS / f"{'-'.join(parts)}.yaml"
    with contextlib.suppress(PlanError):  # one that cannot be read is replaced
        if path.exists() and (found := read_plans(path)[0].device.name) != name:
            raise InputError(f"{path}: $.device.name: expected {name!r}, found {found!r}; give another --out")
    return path


def _name_of(config: Path) -> str:
    """The model of a config.json has the name of its folder, as Hugging Face keeps them."""
    if config.is_dir():
        return config.absolute().name
    return config.absolute().parent.name if config.stem == "config" else config.stem
