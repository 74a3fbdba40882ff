"""The bundled models as a rank usually holds them, and where their layers lie on a map of K x N. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.model.described_model import role_shape
from fp8gate.filter.model.model_config import BUNDLED, ModelConfig, linear_roles
from fp8gate.filter.model.parallel import Parallel, Shards

MODEL_TOKENS = 8192
MODEL_TP = {"llama3-8b": 1, "qwen3-8b": 1, "mixtral-8x7b": 1, "llama3-70b": 8, "llama3-405b": 8}
"""The tensor parallel degree that each bundled model is usually trained with. A test checks that none is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedLayer:
    """Roles of one model that have the same sizes on a rank of this tensor parallel degree."""

    roles: tuple[str, ...]
    k: int
    n: int
    tp: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownModel:
    """A bundled model at one tensor parallel degree. name: states the degree if it is not 1."""

    name: str
    config: ModelConfig
    tp: int

    def shapes(self, tokens: int) -> dict[str, LinearShape]:
        """What a rank multiplies in each linear, by its name with layer indices as *."""
        shards = Shards(Parallel(tp=self.tp, plan="transformers"), tokens)
        return {linear.fqn: role_shape(linear, shards) for linear in linear_roles(self.config)}


def shown_models(planned: Collection[tuple[str, int]] = ()) -> list[ShownModel]:
    """Each bundled model as a whole, as it is usually divided, and as the plans have it: their models and degrees."""
    degrees = [
        (model, tp)
        for model, usual in MODEL_TP.items()
        for tp in sorted({1, usual, *(tp for name, tp in planned if name == model)})
    ]
    return [ShownModel(name=_name(model, tp), config=BUNDLED[model], tp=tp) for model, tp in degrees]


def usual_models() -> list[tuple[str, ModelConfig, Shards]]:
    """The bundled models as a rank holds them. The name states the degree if it is not 1."""
    return [(_name(model, tp), BUNDLED[model], _shards(tp)) for model, tp in MODEL_TP.items()]


def placed_models() -> dict[str, list[PlacedLayer]]:
    """The layers of each of `shown_models`."""
    return {model.name: _placed(model) for model in shown_models()}


def _placed(model: ShownModel) -> list[PlacedLayer]:
    roles: dict[tuple[int, int], list[str]] = {}
    shapes = model.shapes(MODEL_TOKENS)
    for linear in linear_roles(model.config):
        shape = shapes[linear.fqn]
        roles.setdefault((shape.k, shape.n), []).append(linear.role)
    return [PlacedLayer(roles=tuple(names), k=k, n=n, tp=model.tp) for (k, n), names in roles.items()]


def _shards(tp: int) -> Shards:
    return Shards(Parallel(tp=tp, plan="transformers"), MODEL_TOKENS)


def _name(model: str, tp: int) -> str:
    return model if tp == 1 else f"{model}, TP {tp}"
