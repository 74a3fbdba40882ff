"""What ranks have to agree on: all that decides, and what was decided for each layer, as plain data. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from fp8gate.filter.contract.names import plain_name
from fp8gate.filter.contract.plans.plan_file import Plans, format_plans
from fp8gate.filter.contract.recipes import Casts
from fp8gate.filter.contract.table import Table, format_table
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.decision.shared_input import least_text
from fp8gate.filter.policy.settings import FilterSettings
from fp8gate.filter.ranks.agreement import Topic, digest_of


def topics_decided(
    table: Table,
    settings: FilterSettings,
    plans: Plans | None,
    decisions: Mapping[str, Decision],
    *,
    casts_enabled: Casts,
) -> dict[str, Topic]:
    """All that decides, and what was decided for each layer, as plain data by topic.

    casts_enabled: those that the model will have on this rank, whatever the table was measured with.
    """
    patterns = settings.parallel.patterns()
    return {
        "table": digest_of(format_table(table)),
        "recipe": table.recipe,
        "casts": table.protocol.casts,
        "casts that are on": casts_enabled,
        "tokens": settings.tokens,
        "rows": {f"rows[{pattern!r}]": str(count) for pattern, count in settings.rows.items()},
        "min_speedup": least_text(None) if settings.min_speedup is None else float(settings.min_speedup),
        "lookup": settings.lookup,
        "filter_fqns": sorted(set(settings.filter_fqns)),
        "recompute": "a predicate" if callable(settings.recompute) else settings.recompute,
        "plan": digest_of(format_plans(plans)) if plans else "none",
        "parallel.tp": settings.parallel.tp,
        "parallel.cp": settings.parallel.cp,
        "parallel.plan": {f"parallel.plan[{i}]": f"{p} is {p.style}" for i, p in enumerate(patterns)},
        "layers": {fqn: _answer(decision, settings.recomputes(plain_name(fqn))) for fqn, decision in decisions.items()},
    }


def _answer(decision: Decision, recomputed: bool) -> str:
    """What was decided for a layer, for which rows and sizes."""
    shape = f" at {decision.shape}" if decision.shape else ""
    return f"{'float8' if decision.convert else 'bf16'}{shape}{', recomputed' if recomputed else ''}"
