"""The bundled models as a rank usually holds them, and where their layers lie on a map of K x N. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fp8gate.filter.model.model_config import BUNDLED, ModelConfig, linear_roles, role_shape
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


def usual_models() -> list[tuple[str, ModelConfig, Shards]]:
    """The bundled models as a rank holds them. The name states the degree if it is not 1."""
    return [(_name(model, tp), BUNDLED[model], _shards(tp)) for model, tp in MODEL_TP.items()]


def placed_models() -> dict[str, list[PlacedLayer]]:
    """The layers of each bundled model. A model that is usually divided is there as a whole too."""
    degrees = [(model, tp) for model, usual in MODEL_TP.items() for tp in sorted({1, usual})]
    return {_name(model, tp): _placed(BUNDLED[model], tp) for model, tp in degrees}


def _placed(config: ModelConfig, tp: int) -> list[PlacedLayer]:
    roles: dict[tuple[int, int], list[str]] = {}
    for linear in linear_roles(config):
        shape = role_shape(linear, _shards(tp))
        roles.setdefault((shape.k, shape.n), []).append(linear.role)
    return [PlacedLayer(roles=tuple(names), k=k, n=n, tp=tp) for (k, n), names in roles.items()]


def _shards(tp: int) -> Shards:
    return Shards(Parallel(tp=tp, plan="transformers"), MODEL_TOKENS)


def _name(model: str, tp: int) -> str:
    return model if tp == 1 else f"{model}, TP {tp}"
