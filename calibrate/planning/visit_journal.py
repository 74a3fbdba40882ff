"""The journal of a plan: every visit, in the order in which they were made.

In: a plan's set-up. Out: an append-only file, as a sweep's.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from fp8gate.calibrate.points.setup import Header
from fp8gate.calibrate.sweep.journal import Journal
from fp8gate.filter.contract.plans.plan import CandidateStatus, PlanProtocol
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.table import Device, Positive, Software


class PlanSetup(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The set-up of a plan; the fields are those of `Plan`."""

    recipe: Recipe
    model: str
    tokens: int
    sequence: int | None
    tp: int
    recompute: Literal["none", "full"]
    device: Device
    software: Software
    protocol: PlanProtocol
    block: str
    shapes: dict[str, tuple[int, int, int]]


class VisitRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A visit of a set in a round, or why there will be none.

    error: how far the set's results were from bf16's when it was loaded.
    """

    convert: tuple[str, ...]
    round: Annotated[int, msgspec.Meta(ge=0)]
    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    status: CandidateStatus = "measured"
    fwd_us: Positive | None = None
    bwd_us: Positive | None = None
    error: float | None = None
    sm_clock_mhz: int | None = None
    is_limited: bool = False
    detail: str = ""

    def problem(self) -> str | None:
        """What is inconsistent in the record, or None: types alone do not tell."""
        has_times = None not in (self.fwd_us, self.bwd_us)
        if (self.status == "measured") != has_times:
            return f"$.fwd_us, $.bwd_us: expected times if and only if status is measured; found {self.status}"
        return None


class PlanJournal(Journal[PlanSetup, VisitRecord]):
    """The visits of a plan."""

    record_type = VisitRecord
