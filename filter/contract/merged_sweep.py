"""What a merged table says of the sweeps that it was made of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import msgspec


class MergedSweep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sweep of a merged table. Which board it ran on is not known.

    measured_at: as its own table states it. digest: the first 12 digits of the SHA-256 of its own table's file, as
    fp8gate writes it.
    """

    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    digest: Annotated[str, msgspec.Meta(pattern="^sha256 [0-9a-f]{12}$")]  # digits alone may be a number in YAML

    def __str__(self) -> str:
        return f"{self.measured_at:%Y-%m-%d %H:%M %Z} ({self.digest})"


def measured_text(measured_at: datetime, merged_from: Sequence[MergedSweep] | None) -> str:
    """The day, and how many sweeps were merged, if they were: "2026-11-26, 2 sweeps merged"."""
    return f"{measured_at:%Y-%m-%d}" + (f", {len(merged_from)} sweeps merged" if merged_from else "")
