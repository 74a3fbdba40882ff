"""Comparisons of tables as text for a terminal, as Markdown for a pull request, and as JSON for programs. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fp8gate.calibrate.comparison.compare_tables import (
    FINDABLE,
    FINDABLE_AT_A_POINT,
    SHIFT,
    Comparison,
    ModelChange,
)
from fp8gate.calibrate.comparison.point_change import PointChange, most_by_chance
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.merged_sweep import measured_text
from fp8gate.filter.contract.plans.plan_file import Plans, are_complete
from fp8gate.filter.contract.recipes import casts_json
from fp8gate.filter.contract.table import Incomplete, Table
from fp8gate.filter.planned.incomplete_plan import how_far
from fp8gate.filter.terminal_table import render_table

if TYPE_CHECKING:
    from fp8gate.calibrate.comparison.verify import Verification

MARKUP, _BACKSLASH = re.compile(r"[\\`*_{}\[\]<>#|~&]"), r"\\\g<0>"
"""Characters that CommonMark takes for themselves after a backslash."""
Format = Literal["text", "markdown"]
MOST_NAMED = 10  # the most points in a list; the JSON has all of them


def comparison_text(comparisons: Sequence[Comparison], form: Format = "text") -> str:
    """Say what changed: first how far all points have shifted together, then points, decisions and models."""
    parts = []
    for comparison in comparisons:
        title = f"{comparison.variant}: {_name(comparison.before, form)} -> {_name(comparison.after, form)}"
        parts.append(f"### {title}" if form == "markdown" else title)
        parts.append("\n".join(_sentences(comparison)))
        if comparison.changed:
            parts.append(_points_table(comparison.changed, form))
        if comparison.models:
            parts.append(_models_table(comparison.models, form))
    return "\n\n".join(parts)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    shift = comparison.shift
    return {
        "recipe": comparison.variant.recipe,
        **casts_json(comparison.variant),
        "before": _provenance(comparison.before),
        "after": _provenance(comparison.after),
        "findings": comparison.has_findings,
        "can_tell": comparison.can_tell,
        "allowance": None if comparison.allowance is None else round(comparison.allowance, 5),
        "points": len(comparison.points),
        "only_before": comparison.only_before,
        "only_after": comparison.only_after,
        "lost": [[shape.m, shape.k, shape.n] for shape in comparison.lost],
        "shift": None if shift is None else msgspec.to_builtins(shift),
        "shifts": {str(m): msgspec.to_builtins(shift_of_m) for m, shift_of_m in comparison.shifts.items()},
        "changed": [_point_json(point) for point in comparison.changed],
        "beyond_bounds": len(comparison.beyond_bounds),
        "flips": [_point_json(point) for point in comparison.flips],
        "models": [
            {
                "model": model.name,
                "before_us": model.before_us,
                "after_us": model.after_us,
                "stale_us": model.stale_us,
                "flipped": list(model.flipped),
            }
            for model in comparison.models
        ],
    }


def verification_text(verification: Verification) -> str:
    """Say which files were read, and whether this device still measures what they say."""
    checked = files_text(verification.files, verification.plans, verification.incomplete)
    if not verification.comparisons:
        return f"{checked}; none is of {verification.device}: nothing was measured"
    lines = [f"{checked}; {_verdict(verification)}"]
    lines += [f"{variant} was measured with {difference}" for variant, difference in verification.stale.items()]
    return "\n".join(lines) + "\n\n" + comparison_text(verification.comparisons)


def files_text(tables: Collection[Path], plans: Mapping[Path, Plans], incomplete: Mapping[Path, Incomplete]) -> str:
    """How many files were read, all of them valid, and which of them are incomplete."""
    named = [f"{path} ({came_to})" for path, came_to in incomplete.items()]
    named += [f"{path} ({how_far(found)})" for path, found in plans.items() if not are_complete(found)]
    doubt = f", of which incomplete: {', '.join(named)}" if named else ""
    return f"{len(tables)} tables{f' and {len(plans)} plans' if plans else ''} read and checked{doubt}"


def incomplete_json(plans: Mapping[Path, Plans], incomplete: Mapping[Path, Incomplete]) -> dict[str, Any]:
    """How far the sweep of each incomplete table and the search for each model's incomplete plans came."""
    of_tables = {str(path): msgspec.to_builtins(came_to) for path, came_to in incomplete.items()}
    of_plans = {str(path): _stopped_json(found) for path, found in plans.items() if not are_complete(found)}
    return {**of_tables, **of_plans}


def _stopped_json(plans: Plans) -> dict[str, Any]:
    return {
        "visits": sum(plan.visits for plan in plans if plan.incomplete),
        "missing": list(plans[0].missing),
    }


def _verdict(verification: Verification) -> str:
    if verification.has_findings:
        return f"those of {verification.device} do NOT hold"
    if not verification.can_tell:
        more = ", or give more --points" if verification.has_more else ""
        return f"cannot tell whether those of {verification.device} hold: measure again while nothing else runs{more}"
    return f"those of {verification.device} hold"


def verification_json(verification: Verification) -> dict[str, Any]:
    return {
        "device": verification.device,
        "files": [str(path) for path in verification.files],
        "incomplete": incomplete_json(verification.plans, verification.incomplete),
        "measured": bool(verification.comparisons),
        "holds": _holds(verification),
        "can_tell": verification.can_tell if verification.comparisons else None,
        "stale": {variant.name: found for variant, found in verification.stale.items()},
        "comparisons": [comparison_json(comparison) for comparison in verification.comparisons],
    }


def _holds(verification: Verification) -> bool | None:
    """None if nothing was measured, or if what was measured cannot tell."""
    if verification.has_findings:
        return False
    return True if verification.comparisons and verification.can_tell else None


def _sentences(comparison: Comparison) -> list[str]:
    common, flips = len(comparison.points), comparison.flips
    by_chance = sum(not point.is_beyond_chance for point in flips)
    lines = [
        f"{common} points in both, {comparison.only_before} only before, {comparison.only_after} only after",
        _shift_sentence(comparison),
        *(f"{m} tokens: {_percent(shift)}, more than {SHIFT:.0%}" for m, shift in comparison.shifted_tokens.items()),
        f"{len(comparison.changed)} points changed beyond chance",
        *_beyond_bounds(comparison),
        f"{len(flips)} decisions flip, {by_chance} of them within what two honest sweeps differ by",
    ]
    lines += _doubts(comparison)
    if comparison.lost:
        named = ", ".join(map(str, comparison.lost[:MOST_NAMED]))
        lines.append(f"{len(comparison.lost)} points lost their numbers: {named}")
    return lines


def _beyond_bounds(comparison: Comparison) -> list[str]:
    """Nothing for tables that do not say what their bounds cover."""
    if any(point.bounds is None for point in comparison.points):
        return []
    points, most = len(comparison.points), most_by_chance(len(comparison.points))
    verdict = "more than" if comparison.has_many_beyond_bounds else "of"
    return [
        f"{len(comparison.beyond_bounds)} of {points} beyond the bounds of both, {verdict} {most} that chance allows"
    ]


def _doubts(comparison: Comparison) -> list[str]:
    """What would not show in this comparison, though it matters."""
    doubts = []
    if not comparison.finds_shift:
        doubts.append(f"cannot tell whether all have shifted: a change of {FINDABLE:.0%} would not show")
    if comparison.allowance is None:
        doubts.append("cannot tell whether points changed: none has numbers in both")
    elif not comparison.finds_single_changes:
        chance, limit = f"{math.expm1(comparison.allowance):.0%}", f"{FINDABLE_AT_A_POINT:.0%}"
        doubts.append(f"cannot tell whether points changed: by chance half may by {chance}, which is more than {limit}")
    return doubts


def _shift_sentence(comparison: Comparison) -> str:
    shift = comparison.shift
    if shift is None:
        return "too few points to tell whether all have shifted"
    verdict = f"more than {SHIFT:.0%}: all have shifted" if comparison.has_shifted else "as two honest sweeps differ"
    return f"all together: {_percent(shift)}, {verdict}"


def _percent(shift: Interval) -> str:
    return f"{shift.estimate - 1:+.1%} ({shift.low - 1:+.1%} to {shift.high - 1:+.1%})"


def _points_table(changed: Sequence[PointChange], form: Format) -> str:
    rows = [
        (
            point.shape,
            f"{point.before.speedup:.3f}",
            f"{point.after.speedup:.3f}",
            f"{point.change:+.1%}",
            f"{point.allowed:.1%}",
            "flips" if point.flips else "",
        )
        for point in changed[:MOST_NAMED]
    ]
    headers = ("(m, k, n)", "before", "after", "change", "by chance up to", "decision")
    table = _table(rows, headers, form)
    more = len(changed) - MOST_NAMED
    return f"{table}\n\nand {more} more" if more > 0 else table


def _models_table(models: Sequence[ModelChange], form: Format) -> str:
    rows = [
        (
            model.name,
            f"{model.before_us / 1e3:.1f}",
            f"{model.after_us / 1e3:.1f}",
            f"{model.after_us / model.before_us - 1:+.1%}",
            f"{model.stale_us / model.after_us - 1:+.1%}",
            ", ".join(model.flipped),
        )
        for model in models
    ]
    headers = ("model", "ms before", "ms after", "change", "with the old decisions", "roles that flip")
    return _table(rows, headers, form)


def _table(rows: Sequence[tuple[object, ...]], headers: Sequence[str], form: Format) -> str:
    if form == "markdown":
        from tabulate import tabulate

        return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")
    return render_table(headers, rows)


def _name(table: Table, form: Format) -> str:
    """Device, torch, day, how many sweeps were merged, and how far a stopped one came.

    In Markdown, nothing in a name is markup or HTML.
    """
    name = f"{table.device.name}, torch {table.software.torch}"
    escaped = MARKUP.sub(_BACKSLASH, name) if form == "markdown" else name
    measured = measured_text(table.measured_at, table.merged_from)
    return f"{escaped}, {measured}" + (f", {table.incomplete}" if table.incomplete else "")


def _provenance(table: Table) -> dict[str, Any]:
    return {
        "device": table.device.name,
        "torch": table.software.torch,
        "torchao": table.software.torchao,
        "measured_at": table.measured_at.isoformat(),
        "merged_from": msgspec.to_builtins(table.merged_from),
        "incomplete": msgspec.to_builtins(table.incomplete),
    }


def _point_json(point: PointChange) -> dict[str, Any]:
    return {
        "m": point.shape.m,
        "k": point.shape.k,
        "n": point.shape.n,
        "before": point.before.speedup,
        "after": point.after.speedup,
        "allowed": round(point.allowed, 5),
        "bounds": None if point.bounds is None else round(point.bounds, 5),
        "beyond_chance": point.is_beyond_chance,
        "flips": point.flips,
    }
