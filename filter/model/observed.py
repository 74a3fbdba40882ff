"""What a forward has shown of a model's linears. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fp8gate.filter.contract.errors import InputError


class ObserveError(InputError):
    """The model's forward cannot be run without computing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedLinear:
    """What one linear did in a forward.

    calls: how often it was called as a module. rows: the fewest rows of its input in one call; None if it was not
    called, or if their number depends on the data. is_read: its weight was used without a call. sharing: how many other
    linears multiply the very same tensor, the fewest in one call; None if that is not known. Linears that differ in it
    alone are alike.
    """

    calls: int = 0
    rows: int | None = None
    is_read: bool = False
    sharing: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Observation:
    """linears: by name in the model, without those that several names share under their later names."""

    linears: Mapping[str, ObservedLinear]

    def contradicts(self, tokens: int) -> str | None:
        """What is odd if no linear that was called has as many rows as a microbatch has tokens, or None."""
        rows = Counter(seen.rows for seen in self.linears.values() if seen.rows)
        if not rows or tokens in rows:
            return None
        most = rows.most_common(1)[0][0]
        return f"example_inputs: most linears have {most} rows, tokens says {tokens}; the rows of the inputs count"

    def worst(self, other: Observation) -> Observation:
        """Both together: the fewest rows count, as they gain least from float8."""
        names = dict.fromkeys((*self.linears, *other.linears))
        return Observation({name: _worst(self.linears[name], other.linears[name]) for name in names})


def _worst(one: ObservedLinear, other: ObservedLinear) -> ObservedLinear:
    if not one.calls or not other.calls:
        called = one if one.calls else other
        is_read = one.is_read or other.is_read
        return ObservedLinear(calls=called.calls, rows=called.rows, is_read=is_read, sharing=called.sharing)
    return ObservedLinear(
        calls=max(one.calls, other.calls),
        rows=_fewest(one.rows, other.rows),
        sharing=_fewest(one.sharing, other.sharing),
    )


def _fewest(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else min(one, other)
