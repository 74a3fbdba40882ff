"""The layers of a model that a plan is about, by name: all of a list of layers, or some of it. Pure.

In: a pattern such as "model.layers.1-45". Out: for a linear's name, the layer that it is in and its name in there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

_INDICES = r"\d{1,6}(-\d{1,6})?"
PATTERN = rf"[A-Za-z_][A-Za-z0-9_.]*\.(\*|{_INDICES}(,{_INDICES})*)"
"""The name of a list of layers, and which of them: *, or indices and ranges of indices."""

DEFAULT = "layers.*"
_IN_LAYER = re.compile(r"(.*?)\.(\d+)\.(.*)")
_MODEL = ("model", "language_model", "transformer")
"""Parts in front of a list's name that depend on which class holds the layers: a model with or without its head, or
one that sees images too. Vision towers have other names, so their layers are not mistaken for those of the text."""


class InLayer(NamedTuple):
    """layer: its name in the model, such as "model.layers.3". inner: the linear's name in there."""

    layer: str
    inner: str


class LayerNames:
    """Finds the layers of a pattern. "": all in a list named `layers`."""

    def __init__(self, pattern: str) -> None:
        stack, _, indices = (pattern or DEFAULT).rpartition(".")
        names = stack.split(".")
        while len(names) > 1 and names[0] in _MODEL:
            del names[0]
        parts = "|".join(_MODEL)
        self._names = re.compile(rf"((?:(?:{parts})\.)*{re.escape('.'.join(names))}\.(\d+|\*))\.")
        self._ranges = None if indices == "*" else tuple(_range(text) for text in indices.split(","))

    def split(self, fqn: str) -> InLayer | None:
        """The layer that a module is in; None if it is in none of these. Its name is without wrappers.

        An index that is * stands for all layers: it matches a pattern of all.
        """
        found = self._names.match(fqn)
        if found is None or not self._has(found[2]):
            return None
        return InLayer(found[1], fqn[found.end() :])

    @property
    def has_none(self) -> bool:
        """Whether a range of it is empty."""
        return self._ranges is not None and not all(self._ranges)

    def overlaps(self, other: LayerNames) -> bool:
        """Whether a layer is in both."""
        if self._names != other._names:
            return False
        if self._ranges is None or other._ranges is None:
            return True
        return any(a.start < b.stop and b.start < a.stop for a in self._ranges for b in other._ranges)

    def _has(self, index: str) -> bool:
        if self._ranges is None:
            return True
        return index != "*" and any(int(index) in one for one in self._ranges)


def whole_list(pattern: str) -> str:
    """The pattern of all layers of the same list."""
    return f"{(pattern or DEFAULT).rpartition('.')[0]}.*"


def layers_pattern(stack: str, indices: Iterable[int]) -> str:
    """The pattern of these layers: ("model.layers", [0, 1, 2, 5]) -> "model.layers.0-2,5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return f"{stack}.{','.join(f'{low}' if low == high else f'{low}-{high}' for low, high in runs)}"


def common_name(names: Collection[str]) -> str | None:
    """One name for linears that differ by their layer's index: "model.layers.1-45.mlp.up_proj". None for others."""
    found = [match.groups() for match in map(_IN_LAYER.fullmatch, names) if match]
    if len(found) < len(names) or len({(stack, inner) for stack, _, inner in found}) > 1:
        return None
    stack, _, inner = found[0]
    return f"{layers_pattern(stack, (int(index) for _, index, _ in found))}.{inner}"


def _range(text: str) -> range:
    low, _, high = text.partition("-")
    return range(int(low), int(high or low) + 1)
