"""What a table says about itself: how far to trust its numbers, and what measured them. Pure.

In: the tables of one device. Out: texts by the name of the fact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from fp8gate.calibrate.report.speedup_map import CAPPED, UNMEASURED, map_tokens, short_status, without_row
from fp8gate.filter.contract.bounds import Bounds, Spread, Unaligned
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.table import WITH_NUMBERS, Status, Table

RESULTS = ("spread", "controls", "between", "bounds", "unaligned")  # fields of a protocol that are told as `quality`
TablesByVariant = Mapping[Variant, tuple[Path, Table]]

STATUS_WORDS = {
    "out_of_memory": "the device had too little memory",
    "unstable": "the device did not hold its speed",
    "failed": "the measurement failed, or its result was wrong",
    "noisy": "repeats disagree too much to call it a number",
}
STATUSES_WITHOUT_NUMBERS = tuple(status for status in get_args(Status) if status not in WITH_NUMBERS)


def status_legend() -> dict[str, str]:
    """How the maps write each status without numbers -> what it means."""
    return {
        short_status(status): STATUS_WORDS.get(status, f"no number: {status.replace('_', ' ')}")
        for status in STATUSES_WITHOUT_NUMBERS
    }


def quality(table: Table) -> dict[str, str]:
    """How far the numbers can be trusted, as the table states it."""
    statuses = Counter(point.status for point in table.points)
    missing = [f"{count} {status}" for status, count in sorted(statuses.items()) if status not in WITH_NUMBERS]
    on_maps = set(map_tokens(table))
    holes = Counter(why for m in on_maps for why in without_row(table, m).values())
    protocol = table.protocol
    return {
        "points": str(len(table.points)),
        "ambiguous (?): its bounds include 1.0": str(statuses["ambiguous"]),
        "within the spread (95th percentile) of 1.0: another sweep may differ": _count_near(table),
        "without a number": ", ".join(missing) or "0",
        "left out as too large (cap), not measured (-)": f"{holes[CAPPED]}, {holes[UNMEASURED]}",
        "on no map: their tokens are not the grid's": str(sum(point.m not in on_maps for point in table.points)),
        "again by another process": _spread(protocol.spread),
        "bounds cover": _bounds(protocol.bounds),
        "tokens that are no multiple of 128": _unaligned(protocol.unaligned),
        "on several devices": _spread(protocol.between) if protocol.devices > 1 else "one device",
        "bf16 against itself": f"{_spread(protocol.controls)}; measured again beyond {protocol.control:.1%} and chance",
    }


def _count_near(table: Table) -> str:
    spread = table.protocol.spread
    if spread is None:
        return "not known"
    return str(sum(point.speedup is not None and abs(point.speedup - 1) <= spread.p95 for point in table.points))


def _bounds(bounds: Bounds | None) -> str:
    if bounds is None:
        return "what varies within one run"
    parts = {"below 120 us": bounds.below_120_us, "from 120 us": bounds.from_120_us}
    said = [
        f"{name}: {part.coverage:.1%} of the points in another sweep, by {part.between:.1%} beside {part.within:.1%} "
        f"within one run ({part.repeats} repeats)"
        for name, part in parts.items()
        if part
    ]
    if bounds.board_us:
        said.append(f"and boards that differ by {bounds.board_us:g} us in each direction of bf16 and float8")
    return "; ".join(said)


def _unaligned(unaligned: Unaligned | None) -> str:
    if unaligned is None:
        return "not measured"
    return f"{unaligned.factor:.2f} of the speedup between multiples of 128 ({unaligned.points} points)"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "not measured"
    return (
        f"{spread.points} points, {spread.median:.1%} apart (median), {spread.p95:.1%} (95th percentile), "
        f"{spread.worst:.1%} (worst)"
    )


def provenance(files: TablesByVariant) -> dict[str, tuple[str, ...]]:
    """For each field, its value in each table, or a single value if all tables have the same."""
    facts = [_facts(path, table) for path, table in files.values()]
    values = {name: tuple(fact.get(name, "") for fact in facts) for name in dict.fromkeys(n for f in facts for n in f)}
    return {name: each[:1] if len(set(each)) == 1 else each for name, each in values.items()}


def _facts(path: Path, table: Table) -> dict[str, str]:
    facts = {"file": path.name, "measured at": f"{table.measured_at:%Y-%m-%d %H:%M %Z}"}
    if table.merged_from:
        facts["merged from"] = ", ".join(map(str, table.merged_from))
    for part in (table.device, table.software, table.protocol):
        fields: dict[str, Any] = msgspec.to_builtins(part)
        facts |= {name: str(value) for name, value in fields.items() if name not in RESULTS}
    return facts
