"""The roles of a plan in a whole model: which block a linear is in, and what the plan calls it there. Pure.

In: a plan's roles, a linear's name in a model of Hugging Face or torchtitan. Out: a `PlaceInBlock`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import NamedTuple

from fp8gate.filter.contract.names import hugging_face_name, plain_name
from fp8gate.filter.contract.plans.layer_names import LayerNames

Roles = tuple[str, ...]

_SEVERAL_IN_ONE = {"wkv": ("wk", "wv"), "wqkv": ("wq", "wk", "wv")}
"""torchtitan's name for several projections -> their names. It builds wk and wv from one config, wkv, and each is as
large as the config says. wqkv is fused: one product, as large as all three together."""
FUSED = ("wqkv",)


class PlaceInBlock(NamedTuple):
    """Where a linear is in a model: in which block, and what the plan calls it there.

    block: such as "model.layers.3", or "" if the model itself is the block. roles: empty if the plan does not know the
    linear, and several for a linear that a plan knows as several, such as torchtitan's wkv and wqkv.
    """

    block: str
    roles: Roles


class RoleNames:
    """Finds the roles of linears. The layers of a model share their names within a block, so each is found once.

    layers: which layers are the blocks, see `LayerNames`.
    """

    def __init__(self, roles: Iterable[str], layers: str = "") -> None:
        self._layers, self._may_be_model = LayerNames(layers), not layers
        self._known = {hugging_face_name(role): role for role in roles}
        self._roles = cache(self._find_roles)
        self._places: dict[str, PlaceInBlock | None] = {}

    def place(self, fqn: str) -> PlaceInBlock | None:
        """Where a linear is. None if it is in no block. Each name is looked at once, until `forget`."""
        if fqn not in self._places:
            self._places[fqn] = self._find_place(fqn)
        return self._places[fqn]

    def forget(self) -> None:
        """Prepare for another model."""
        self._places.clear()

    def _find_place(self, fqn: str) -> PlaceInBlock | None:
        name = plain_name(fqn)
        if found := self._layers.split(name):
            return PlaceInBlock(found.layer, self._roles(found.inner))
        roles = self._roles(name) if self._may_be_model else ()
        return PlaceInBlock("", roles) if roles else None

    def alike(self, fqn: str) -> str | None:
        """The role that a name ends with, for linears in no block. None if it ends with none."""
        name = hugging_face_name(plain_name(fqn))
        return next((role for known, role in self._known.items() if name.endswith(f".{known}")), None)

    def _find_roles(self, name_in_block: str) -> Roles:
        """The roles of a linear by its name within a block. Empty if the plan lacks one of them."""
        parent, _, last = name_in_block.rpartition(".")
        names = [hugging_face_name(name_in_block)]
        if names[0] not in self._known and last in _SEVERAL_IN_ONE:
            names = [hugging_face_name(f"{parent}.{part}") for part in _SEVERAL_IN_ONE[last]]
        return tuple(self._known[name] for name in names) if all(name in self._known for name in names) else ()


def is_torn(roles: Roles, convert: Collection[str]) -> bool:
    """Whether a set has some of one linear's roles, and not all."""
    return 0 < sum(role in convert for role in roles) < len(roles)


def is_fused(fqn: str) -> bool:
    """Whether a linear is one product in place of several, such as torchtitan's wqkv."""
    return plain_name(fqn).rpartition(".")[2] in FUSED
