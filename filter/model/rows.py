"""How many rows each linear multiplies, and where the number comes from. Pure.

In: what the user states, what was observed in a forward, the tokens of a microbatch. Out: a `RowCount` for a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import RowSource
from fp8gate.filter.model.observed import Observation, ObservedLinear

_NO_DIGITS = str.maketrans("", "", "0123456789")
_EXPERT = re.compile(r"(^|\.)experts\.(\.|$)")
"""Of names without digits: "layers.3.experts.7.w1" is "layers..experts..w" there."""
_FEW_ROWS = re.compile(
    r"(^|[._])(pooler|pooled|pooling|modulation|adaln\w*|ada_ln\w*|timestep\w*|time_embed\w*|time_embedding|time_mlp"
    r"|time_emb_proj|time_text_embed|guidance_embed\w*|label_emb\w*|norm\w*\.linear|classifier|score)([._]|$)",
    re.IGNORECASE,
)
"""Parts of names of linears that see one row a sequence, or one a microbatch, in public models of transformers and
diffusers: poolers, classification heads, modulation by a time or label embedding, which diffusers' norms hold."""


class RowCount(NamedTuple):
    """rows: of one microbatch, before context parallelism divides them. doubt: why `rows` may not be right, or "".

    refused: why the linear must stay as it is: no call of it multiplies anything.
    """

    rows: int
    source: RowSource
    doubt: str = ""
    refused: str = ""


class Rows:
    """The rows of linears by name, without wrappers. What the user states counts before what was observed."""

    def __init__(self, tokens: int, stated: Mapping[str, int]) -> None:
        """stated: patterns of names, in which * matches anything. Of several that match, the last counts."""
        self._tokens = tokens
        self._stated = stated
        self._matched: set[str] = set()
        self._known: dict[str, RowCount] = {}
        self.observation: Observation | None = None

    def of(self, name: str) -> RowCount:
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> RowCount:
        if matching := [pattern for pattern in self._stated if fnmatchcase(name, pattern)]:
            self._matched.update(matching)
            return RowCount(self._stated[matching[-1]], "stated")
        if self.observation is None:
            return RowCount(self._tokens, "tokens", _doubt(name.translate(_NO_DIGITS)))
        seen = self.observation.linears.get(name)
        if seen is None:
            return RowCount(self._tokens, "tokens", "the example inputs do not show it")
        return self._observed(seen)

    def forget(self) -> None:
        """Prepare for another model."""
        self._matched.clear()
        self._known.clear()
        self.observation = None

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The stated patterns that matched no name."""
        return tuple(pattern for pattern in self._stated if pattern not in self._matched)

    def _observed(self, seen: ObservedLinear) -> RowCount:
        if not seen.calls:
            read = "its weight is read and it is never called as a module"
            return RowCount(
                self._tokens, "tokens", refused=read if seen.is_read else "the example inputs never reach it"
            )
        if not seen.rows:
            why = "its rows depend on the data" if seen.rows is None else "the example inputs give it no rows"
            return RowCount(self._tokens, "tokens", why)
        return RowCount(seen.rows, "observed")


def require_row_counts(rows: Mapping[str, int]) -> None:
    """Raises InputError for a count that is no positive integer."""
    for pattern, count in rows.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(
                f"rows[{pattern!r}]: expected rows per microbatch, an integer of at least 1; got {count!r}"
            )


@cache
def _doubt(name: str) -> str:
    """Why the linears of this name, without digits, may not see all tokens: the layers of a model share it."""
    if _EXPERT.search(name):
        return "an expert sees only the tokens that are routed to it"
    return "one row a sequence or a microbatch is usual for this name" if _FEW_ROWS.search(name) else ""
