"""The journal that benchmarks/block_settings.py writes, and the tables made from it, as Markdown.

In: journals. Out: for each set of float8 linears what it gains over bf16 under each setting and over the same set as
production compiles it, what compiling costs, and how far the results are from bf16's.

Run it: python benchmarks/block_settings_output.py DIR/journal-*.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
from block_settings_list import AGAIN, CANDIDATES, TOGETHER, is_setting, key_of
from tabulate import tabulate

from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET, RoleSet
from fp8gate.calibrate.planning.visit_journal import PlanJournal, PlanSetup, VisitRecord
from fp8gate.calibrate.sweep.journal import content_of
from fp8gate.calibrate.timing.statistics import Interval, paired_speedup
from fp8gate.filter.contract.plans.plan import exceeds_control
from fp8gate.filter.contract.shapes import LinearShape

CONFIDENCE, LEAST_ROUNDS = 0.95, 6  # fewer rounds cannot give such bounds
HEADERS = (
    "setting",
    "ms",
    "over bf16",
    "over production",
    "compiling, s",
    "tuning, s",
    "error",
    "peak, MiB",
    "launches",
)
SAME_CODE, AT_ONCE = "as production", "together"


class SettingsSetup(PlanSetup, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a journal. skipped: settings that this torch cannot turn on, and why.

    Of the protocol, screening, final and confidence are not used: each set is visited as often as was asked.
    """

    benchmark: Literal["block_settings"] = "block_settings"
    skipped: tuple[str, ...]


class SettingVisit(VisitRecord, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every other line. convert: roles, and the settings that they were compiled under beside production's, or "again".

    The other fields are those of `Cost` in block_settings_bench.py.
    """

    compile_s: float | None = None
    load_s: float | None = None
    peak_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    launches: Annotated[int, msgspec.Meta(ge=0)] | None = None
    casts: Annotated[int, msgspec.Meta(ge=0)] | None = None
    code: str | None = None


class SettingsJournal(PlanJournal):
    """The visits of one block."""

    record_type = SettingVisit
    setup: SettingsSetup
    records: list[SettingVisit]  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journals", type=Path, nargs="+", help="each written by block_settings.py")
    print(*(report(*read_journal(path)) for path in parser.parse_args().journals), sep="\n\n")


def read_journal(path: Path) -> tuple[SettingsSetup, list[SettingVisit]]:
    """What block_settings.py wrote. Raises msgspec.DecodeError for any other file."""
    first, *lines = (content_of(line) for line in path.read_bytes().splitlines())
    visits = [msgspec.json.decode(line, type=SettingVisit) for line in lines]
    return msgspec.json.decode(first, type=SettingsSetup), visits


def production_of(one: RoleSet) -> RoleSet:
    """The same roles as production compiles them; bf16 for bf16 again."""
    return frozenset(name for name in one - CONTROL_SET if not is_setting(name) and name != AGAIN)


@dataclass(frozen=True, slots=True)
class Measured:
    """All visits of a block, by set of roles and settings."""

    setup: SettingsSetup
    visits: Mapping[RoleSet, Mapping[int, SettingVisit]]  # by round
    failures: Mapping[RoleSet, str]

    @classmethod
    def of(cls, setup: SettingsSetup, records: Iterable[SettingVisit]) -> Measured:
        visits: defaultdict[RoleSet, dict[int, SettingVisit]] = defaultdict(dict)
        failures: dict[RoleSet, str] = {}
        for record in records:
            one = frozenset(record.convert)
            if record.status == "measured":
                visits[one][record.round] = record
            else:
                failures[one] = f"{record.status}: {record.detail}"
        return cls(setup, visits, {one: why for one, why in failures.items() if one not in visits})

    @property
    def productions(self) -> list[RoleSet]:
        """The sets that were to be measured, those with most roles first."""
        found = {production_of(one) for one in (*self.visits, *self.failures)} - {BF16_SET}
        return sorted(found, key=lambda one: (-len(one), sorted(one)))

    def gain(self, one: RoleSet, over: RoleSet) -> Interval | None:
        """Time of `over` / time of `one`, by the rounds that both were visited in; None for too few."""
        ours, theirs = self.visits.get(one, {}), self.visits.get(over, {})
        rounds = sorted(ours.keys() & theirs.keys())
        if len(rounds) < LEAST_ROUNDS:
            return None
        times = ([_total_us(visits[at]) for at in rounds] for visits in (theirs, ours))
        return paired_speedup(*times, confidence=CONFIDENCE)

    def control(self, production: RoleSet) -> Interval | None:
        """What production gains over itself: how far equal sets differ."""
        return self.gain(production | {AGAIN}, production)

    def gaining(self, production: RoleSet) -> list[tuple[RoleSet, Interval]]:
        """What gains more over production than production does over itself, the best first."""
        control = self.control(production)
        noise = control.estimate if control else None
        gains = [(one, self.gain(one, production)) for one in self.visits if _is_under_settings(one, production)]
        known = [(one, gain) for one, gain in gains if gain]
        beyond = [(one, gain) for one, gain in known if exceeds_control(gain.low, noise)]
        return sorted(beyond, key=lambda each: -each[1].estimate)

    def best_together(self, production: RoleSet, candidates: Iterable[Sequence[str]]) -> RoleSet | None:
        """All candidates at once that gain by themselves, of those that exclude each other the best.

        None if that is nothing, or nothing but one candidate.
        """
        alone = {production | frozenset(one) for one in candidates}
        chosen: dict[str, str] = {}  # a setting's name by what it gives a value to
        for one, _ in self.gaining(production):
            settings = {key_of(name): name for name in one if is_setting(name)}
            if one in alone and all(chosen.get(key, name) == name for key, name in settings.items()):
                chosen.update(settings)
        together = production | frozenset(chosen.values())
        return None if together in alone or not chosen else together


def report(setup: SettingsSetup, records: Iterable[SettingVisit]) -> str:
    """A table for each set of roles, and what gains beyond the noise."""
    measured = Measured.of(setup, records)
    parts = [title(setup)]
    for production in measured.productions:
        parts += [
            f"{_set_name(production, setup)} in float8:",
            table(measured, production),
            verdict(measured, production),
        ]
    if setup.skipped:
        parts.append("Skipped: " + "; ".join(setup.skipped) + ".")
    return "\n\n".join(parts)


def headline(setup: SettingsSetup, records: Iterable[SettingVisit]) -> str:
    """The table of each set of roles, for the documents."""
    measured, block = Measured.of(setup, records), f"{setup.model}, TP {setup.tp}"
    tables = [
        f"{block}, {_set_name(production, setup)} in float8:\n\n{table(measured, production)}"
        for production in measured.productions
    ]
    return "\n\n".join(tables)


def title(setup: SettingsSetup) -> str:
    software = setup.software
    how = "compiled" if setup.protocol.compile else "not compiled, so that no setting changes anything"
    settings = ", ".join(setup.protocol.inductor) or "none"
    return (
        f"{setup.model}, TP {setup.tp}, {setup.tokens} tokens, {setup.recipe}, {setup.device.name} "
        f"(torch {software.torch}, torchao {software.torchao}), {how}; production's settings: {settings}"
    )


def table(measured: Measured, production: RoleSet) -> str:
    """The fastest setting first. Gains have bounds at 95 %; times are medians of the rounds."""
    under = [one for one in {**measured.visits, **measured.failures} if _is_under_settings(one, production)]
    under.sort(key=lambda one: (_over(measured, one, production), sorted(one)))
    first = [BF16_SET, CONTROL_SET, production, production | {AGAIN}]
    rows = [_row(measured, one, production) for one in [*first, *under]]
    return tabulate(filter(None, rows), headers=HEADERS, disable_numparse=True, tablefmt="github")


def verdict(measured: Measured, production: RoleSet) -> str:
    """Which settings gain, and what production gains over itself."""
    control = measured.control(production)
    if control is None:
        return f"Production was not compared with itself in {LEAST_ROUNDS} rounds, so nothing is known to gain."
    noise = f"production gains {_with_bounds(control)} over itself"
    gaining = [
        f"- {_setting_name(one)}: {_with_bounds(gain)} over production" for one, gain in measured.gaining(production)
    ]
    if not gaining:
        return f"No setting gains beyond the noise: {noise}."
    return "\n".join([f"Beyond the noise ({noise}):", *gaining])


def describe(one: RoleSet, setup: SettingsSetup) -> str:
    """A set of roles and settings, for people: "all: inductor.triton.max_tiles=3"."""
    if one <= CONTROL_SET:
        return _setting_name(one)
    return f"{_set_name(production_of(one), setup)}: {_setting_name(one)}"


def _row(measured: Measured, one: RoleSet, production: RoleSet) -> tuple[str, ...] | None:
    if why := measured.failures.get(one):
        return (_setting_name(one), why, *[""] * (len(HEADERS) - 2))
    visits = list(measured.visits.get(one, {}).values())
    if not visits:
        return None
    errors = [visit.error for visit in visits if visit.error is not None]
    same = {visit.code for visit in measured.visits.get(production, {}).values()} - {None}
    launches = _first(visit.launches for visit in visits)
    is_same = production < one and visits[-1].code in same
    return (
        _setting_name(one),
        f"{median(map(_total_us, visits)) / 1e3:.3f}",
        "" if one == BF16_SET else _gain_text(measured, one, BF16_SET),
        _gain_text(measured, one, production) if production < one else "",
        _number(_first(visit.compile_s for visit in visits), ".1f"),
        _number(_first(visit.load_s for visit in visits), ".1f"),
        _number(max(errors, default=None), ".3f"),
        _number(_first(visit.peak_bytes for visit in visits), ".0f", 2**20),
        _number(launches, ".0f") + _casts_text(visits) + (f", {SAME_CODE}" if is_same else ""),
    )


def _casts_text(visits: Iterable[SettingVisit]) -> str:
    casts = _first(visit.casts for visit in visits)
    return f", {casts} casts" if casts else ""


def _is_under_settings(one: RoleSet, production: RoleSet) -> bool:
    return production_of(one) == production and any(map(is_setting, one))


def _over(measured: Measured, one: RoleSet, production: RoleSet) -> float:
    """To sort by: minus the gain over production, infinity for what has none."""
    gain = measured.gain(one, production)
    return -gain.estimate if gain else math.inf


def _set_name(production: RoleSet, setup: SettingsSetup) -> str:
    possible = [role for role, shape in setup.shapes.items() if not LinearShape(*shape).indivisible()]
    if production == frozenset(possible):
        return "all"
    return ", ".join(role.rpartition(".")[2] for role in setup.shapes if role in production)


def _setting_name(one: RoleSet) -> str:
    if one <= CONTROL_SET:
        return "bf16 again" if one else "bf16"
    settings = sorted(filter(is_setting, one))
    if len(settings) > 1 and {*map(key_of, settings)} not in [candidate.keys() for candidate in CANDIDATES]:
        return f"{AT_ONCE}: {TOGETHER.join(settings)}"
    return TOGETHER.join(settings) or ("production again" if AGAIN in one else "production")


def _gain_text(measured: Measured, one: RoleSet, over: RoleSet) -> str:
    gain = measured.gain(one, over)
    if gain:
        return _with_bounds(gain)
    rounds = len(measured.visits.get(one, {}).keys() & measured.visits.get(over, {}).keys())
    return f"{rounds} of {LEAST_ROUNDS} rounds"


def _with_bounds(gain: Interval) -> str:
    return f"{gain.estimate - 1:+.1%} ({gain.low - 1:+.1%} to {gain.high - 1:+.1%})"


def _total_us(visit: SettingVisit) -> float:
    assert visit.fwd_us, "it was measured"
    assert visit.bwd_us
    return visit.fwd_us + visit.bwd_us


def _first(values: Iterable[float | None]) -> float | None:
    """What was found first: a later call may have found what was compiled in a cache."""
    return next((value for value in values if value is not None), None)


def _number(value: float | None, how: str, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:{how}}"


if __name__ == "__main__":
    main()
