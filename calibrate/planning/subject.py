"""What is planned: a block, its sizes before they are divided among ranks, and the file that its plan goes to.

In: a model's name or its config.json. Out: a `Subject`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.arms.decoder_layer import LAYER, layer_blueprint, sequence_of
from fp8gate.calibrate.arms.linear import inductor_settings
from fp8gate.calibrate.device.registry import describe_device
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plan import PLANS, PlanError, read_plan
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.model.model_config import BUNDLED, config_facts, linear_roles, load_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned.

    name: of the model. whole: (in_features, out_features) of each role before it is divided. filter_fqns: roles with
    one of these in their name, as it is in a whole model, stay in bf16.
    """

    name: str
    blueprint: Blueprint
    whole: Mapping[str, tuple[int, int]]
    tokens: int
    sequence: int | None = None
    tp: int = 1
    filter_fqns: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """The roles that `filter_fqns` leave in bf16."""
        names = {role: f"{LAYER}{role}" for role in self.blueprint.shapes}
        return tuple(role for role, name in names.items() if any(pattern in name for pattern in self.filter_fqns))

    @property
    def possible(self) -> tuple[str, ...]:
        """The roles that can be converted."""
        shapes = self.blueprint.shapes
        return tuple(role for role in shapes if role not in self.left_out and not shapes[role].indivisible())


def model_subject(
    model: str,
    *,
    tokens: int,
    sequence: int | None,
    tp: int,
    recomputed: bool,
    filter_fqns: tuple[str, ...] = (),
) -> Subject:
    """A model's decoder layer as one rank holds it. model: a bundled name, or the path of a config.json.

    Raises ModelError or BlockError for a model that cannot be planned, or sizes that do not divide.
    """
    config = load_model(model)
    facts = config_facts(model)
    length = sequence_of(config, tokens, sequence)
    blueprint = layer_blueprint(config, facts, tokens=tokens, sequence=length, tp=tp, recomputed=recomputed)
    roles = {linear.fqn.removeprefix(LAYER): linear for linear in linear_roles(config)}
    return Subject(
        name=model if model in BUNDLED else _name_of(Path(model)),
        blueprint=blueprint,
        whole={role: (roles[role].in_features, roles[role].out_features) for role in blueprint.shapes},
        tokens=tokens,
        sequence=length,
        tp=tp,
        filter_fqns=filter_fqns,
    )


def plan_path(
    out: Path, subject: Subject, recipe: Recipe, device: torch.device, emulate_precision_casts: bool | None = None
) -> Path:
    """<out>/<device>/plans/<model>-<recipe>-m<tokens>.yaml, with every setting that is not the default.

    Raises InputError if a plan of a device whose name only looks alike is there: it would be replaced.
    """
    settings = inductor_settings(recipe, emulate_precision_casts)
    parts = [subject.name, recipe, f"m{subject.tokens}"]
    parts += [f"s{subject.sequence}"] if subject.sequence not in (None, subject.tokens) else []
    parts += [f"tp{subject.tp}"] if subject.tp > 1 else []
    parts += [f"without_{'_'.join(role.rpartition('.')[2] for role in subject.left_out)}"] if subject.left_out else []
    parts += ["recomputed"] if subject.blueprint.recomputed else []
    parts += [name for name in settings if name not in RECIPES[recipe].inductor]
    parts += [f"no_{name}" for name in RECIPES[recipe].inductor if name not in settings]
    name = describe_device(device).name
    path = out / device_slug(name) / PLANS / f"{'-'.join(parts)}.yaml"
    with contextlib.suppress(PlanError):  # one that cannot be read is replaced
        if path.exists() and (found := read_plan(path).device.name) != name:
            raise InputError(f"{path}: $.device.name: expected {name!r}, found {found!r}; give another --out")
    return path


def _name_of(config: Path) -> str:
    """The model of a config.json has the name of its folder, as Hugging Face keeps them."""
    if config.is_dir():
        return config.absolute().name
    return config.absolute().parent.name if config.stem == "config" else config.stem
