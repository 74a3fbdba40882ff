"""The messages that children of every kind may send."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Broken:
    """This process cannot do its work at all, for no fault of its task, and ends."""

    detail: str
