"""The linears in the config of a torchtitan model: which may be asked about, how they are divided, and their exchange.

In: a model's config, after torchtitan has filled in its sharding. Out: `LinearPlace`s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import spmd_types
from torchtitan.components.quantization.float8 import Float8Linear
from torchtitan.config import derive
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models.common.dist_gemm import AllGatherFusedFeedForward, AllGatherFusedQKVLinear
from torchtitan.models.common.linear import Linear

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import is_head, without_indices
from fp8gate.filter.model.parallel import Style
from fp8gate.torchtitan.gate_settings import NAME

HEAD = 'the head, which the loss may call in chunks of the tokens; to ask about it, give "head": true and its rows'
_READ = (AllGatherFusedFeedForward.Config, AllGatherFusedQKVLinear.Config)
"""Configs of modules that read the weights of their linears, and never call them."""


class LinearPlace(NamedTuple):
    """A linear's config, and where it is: an attribute of its parent, or an entry if that is a list."""

    fqn: str
    config: Any
    parent: Any
    key: str | int

    @property
    def is_float8(self) -> bool:
        """Whether torchtitan's Float8LinearConverter has converted it."""
        return type(self.config) is Float8Linear.Config

    def replace(self, config: Any) -> None:
        """Put another config into this place of the model's."""
        if isinstance(self.parent, list):
            self.parent[int(self.key)] = config
        else:
            setattr(self.parent, str(self.key), config)


def linear_places(model: Any) -> list[LinearPlace]:
    """Every linear of a model's config, converted ones too.

    Raises InputError for a config that stands for several linears: they could only be converted together.
    """
    places = [LinearPlace(*found) for found in model.traverse(Linear.Config)]
    names: dict[tuple[int, str | int], str] = {}
    for place in places:
        first = names.setdefault((id(place.parent), place.key), place.fqn)
        if first != place.fqn:
            raise InputError(f"{NAME}: expected a config for each linear; {first} and {place.fqn} have one together")
    return places


def why_left(place: LinearPlace, *, asks_head: bool) -> str:
    """Why nothing is asked about a linear, which stays as it is, or ""."""
    if is_head(place.fqn):
        return "" if asks_head else HEAD
    if not place.fqn.startswith("layers."):
        return "in no layer of the decoder, and may not see all tokens"
    if place.fqn.endswith(".router.gate"):
        return "a router, which torchtitan computes in float32"
    if isinstance(place.parent, _READ):
        return "its weight is read by a product that is fused with a collective"
    if type(place.config) not in (Linear.Config, Float8Linear.Config):
        return f"{type(place.config).__qualname__} is no plain linear"
    return ""


def plain(config: Any) -> Any:
    """The config of the same linear in bf16."""
    return config if type(config) is Linear.Config else derive(config, Linear.Config)


def in_float8(config: Any, torchao_config: object) -> Any:
    """The config of the same linear in float8. Its sharding stays."""
    return derive(config, Float8Linear.Config, _torchao_config=torchao_config)


def sharding_plan(places: Iterable[LinearPlace]) -> dict[str, Style]:
    """How tensor parallelism divides linears, by name. It lacks those that torchtitan says nothing about."""
    styles = {place.fqn: _style(place.config.sharding_config) for place in places}
    found: dict[str, set[Style | None]] = {}
    for fqn, style in styles.items():
        found.setdefault(without_indices(fqn), set()).add(style)
    plan: dict[str, Style] = {}
    for fqn, style in styles.items():
        pattern = without_indices(fqn)
        if style is not None:
            plan[pattern if len(found[pattern]) == 1 else fqn] = style
    return plan


def _style(sharding: Any) -> Style | None:
    weight = sharding and sharding.state_shardings.get("weight")
    if not weight:
        return None
    axis = weight.per_axis_spmd_types().get(MeshAxisName.TP)
    if not isinstance(axis, spmd_types.Shard):
        return "replicated"
    return "colwise" if axis.dim == 0 else "rowwise"
