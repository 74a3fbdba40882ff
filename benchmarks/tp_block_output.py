"""The journal that benchmarks/tp_block.py writes, and the tables made from it, as Markdown.

In: journals. Out: what each set of float8 linears gains over bf16 with communication, what the plan measured without,
and the pairs of sets whose order differs.

Run it: python benchmarks/tp_block_output.py DIR/journal-*.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
from tabulate import tabulate

from fp8gate.calibrate.points.setup import Header
from fp8gate.calibrate.sweep.journal import Journal, content_of
from fp8gate.calibrate.timing.statistics import Interval, paired_speedup
from fp8gate.filter.contract.recipes import Casts, Recipe, Variant
from fp8gate.filter.contract.table import Device, Positive, Software

CONFIDENCE, LEAST_ROUNDS = 0.99, 8  # fewer rounds cannot give such bounds
CONTROL, PLAN = "bf16 again", "plan"
MAX_ERROR = 0.45
"""Of a set's results against bf16's, relative. Float8 gives up to 0.2 a layer (block_worker.py of calibrate/planning),
and a result that is wrong at least 0.5."""
HOST_SHARE = 0.8
"""Of a step. A host that takes more of it to launch the step may keep the GPU waiting: the time is then the host's."""
HEADERS = ("set", "float8", "ms", "over bf16", "in the plan", "difference")


class ConvertedSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A set of roles in float8.

    name: whose choice it is. casts: who compiles those of float8. plan: bf16 time / the set's time without
    communication, and its bounds, as the plan measured them; None if it did not.
    """

    name: str
    convert: tuple[str, ...]
    casts: Casts = "inductor"
    plan: tuple[Positive, Positive, Positive] | None = None


class TpSetup(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a journal. sets: the first is bf16, the last is bf16 again.

    tokens: of the whole batch. layers: how many a step runs. block: a hash of a layer's code and sizes on a rank.
    plan: what was planned, for people; "" for none.
    """

    model: str
    recipe: Recipe
    tokens: int
    sequence: int
    tp: int
    layers: int
    device: Device
    software: Software
    compile: bool
    inductor: dict[str, bool]
    pause_s: float
    settle_s: float
    run_s: float
    seed: int
    block: str
    plan: str
    sets: tuple[ConvertedSet, ...]

    @property
    def variant(self) -> Variant:
        """The recipe, and the casts of the choices."""
        ours = any(one.casts == "fp8gate" for one in self.sets)
        return Variant(self.recipe, "fp8gate" if ours else "inductor")


class RankVisit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank saw of a visit. step_us: forward and backward of all layers, the mean of the steps that count.

    launch_us: how long the host took to launch a step while the GPU had nothing else to do; None on a CPU.
    """

    step_us: Positive
    launch_us: Positive | None
    sm_clock_mhz: int | None
    is_limited: bool
    slowdown: str | None


class TpVisit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every other line. error: the largest relative difference from bf16's results, of all ranks."""

    set: str
    round: Annotated[int, msgspec.Meta(ge=1)]
    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    steps: Annotated[int, msgspec.Meta(ge=1)]
    error: float
    ranks: tuple[RankVisit, ...]

    @property
    def step_us(self) -> float:
        """The slowest rank's."""
        return max(rank.step_us for rank in self.ranks)

    @property
    def slowdowns(self) -> list[str]:
        return [rank.slowdown for rank in self.ranks if rank.slowdown]

    def problem(self) -> str | None:
        return None if self.ranks else "$.ranks: expected a rank or more"


class TpJournal(Journal[TpSetup, TpVisit]):
    """The visits of one set-up."""

    record_type = TpVisit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journals", type=Path, nargs="+", help="each written by tp_block.py")
    print(*(report(*read_journal(path)) for path in parser.parse_args().journals), sep="\n\n")


def read_journal(path: Path) -> tuple[TpSetup, list[TpVisit]]:
    """What tp_block.py wrote. Raises msgspec.DecodeError for any other file."""
    first, *lines = (content_of(line) for line in path.read_bytes().splitlines())
    visits = [msgspec.json.decode(line, type=TpVisit) for line in lines]
    return msgspec.json.decode(first, type=TpSetup), visits


def complete_rounds(setup: TpSetup, visits: Sequence[TpVisit]) -> list[Mapping[str, TpVisit]]:
    """The rounds that count: those in which each set was visited, and no GPU was slowed down."""
    rounds: dict[int, dict[str, TpVisit]] = defaultdict(dict)
    for visit in visits:
        if not visit.slowdowns:
            rounds[visit.round][visit.set] = visit
    names = {one.name for one in setup.sets}
    return [found for _, found in sorted(rounds.items()) if found.keys() == names]


def report(setup: TpSetup, visits: Sequence[TpVisit]) -> str:
    """The gains with 99 % bounds, and whether the plan's order of the sets holds."""
    rounds = complete_rounds(setup, visits)
    if len(rounds) < LEAST_ROUNDS:
        return f"{title(setup)}\n\n{len(rounds)} rounds are complete; bounds need {LEAST_ROUNDS}: run it again to go on"
    times = _times(setup, rounds)
    parts = [f"{title(setup)}, {len(rounds)} rounds", gains(setup, rounds, times), order(setup, times)]
    return "\n\n".join([*parts, *doubts(setup, rounds)])


def headline(setup: TpSetup, visits: Sequence[TpVisit]) -> str:
    """The gains alone, for the documents."""
    rounds = complete_rounds(setup, visits)
    return f"{setup.model}, TP {setup.tp}, {setup.variant}:\n\n{gains(setup, rounds, _times(setup, rounds))}"


def title(setup: TpSetup) -> str:
    software = setup.software
    return (
        f"{setup.model}, TP {setup.tp} with sequence parallelism, {setup.layers} layers, {setup.tokens} tokens, "
        f"{setup.variant}, {setup.device.name} (torch {software.torch}, torchao {software.torchao})"
        + (f"; plan of {setup.plan}" if setup.plan else "")
    )


Times = Mapping[str, Sequence[float]]
"""The slowest rank's step in microseconds, by the set's name, one a round."""


def _times(setup: TpSetup, rounds: Sequence[Mapping[str, TpVisit]]) -> Times:
    return {one.name: [found[one.name].step_us for found in rounds] for one in setup.sets}


def gains(setup: TpSetup, rounds: Sequence[Mapping[str, TpVisit]], times: Times) -> str:
    """ms: of a step, the median. difference: of the set's results from bf16's."""
    bf16, rows = setup.sets[0].name, []
    for one in setup.sets:
        rows.append(
            (
                one.name,
                ", ".join(role.rpartition(".")[2] for role in one.convert),
                f"{median(times[one.name]) / 1e3:.3f}",
                "" if one.name == bf16 else _with_bounds(_gain(times, one.name, bf16)),
                _with_bounds(Interval(*one.plan)) if one.plan and one.convert else "",
                f"{max(found[one.name].error for found in rounds):.3f}",
            )
        )
    return tabulate(rows, headers=HEADERS, disable_numparse=True, tablefmt="github")


def order(setup: TpSetup, times: Times) -> str:
    """Which pairs of sets this run tells apart, and which of them the plan has in the other order.

    A pair is told apart if its bounds exclude 1, and it differs by more than bf16 does from itself.
    """
    if not setup.plan:
        return "No plan was given, so there is no order to compare with."
    noise = abs(math.log(_gain(times, CONTROL, setup.sets[0].name).estimate))
    known = [one for one in setup.sets if one.plan and one.name != CONTROL]
    same, swapped = 0, []
    for one, other in itertools.combinations(known, 2):
        fast, slow = sorted((one, other), key=lambda each: median(times[each.name]))
        gain = _gain(times, fast.name, slow.name)
        if not _is_told_apart(gain, noise):
            continue
        assert fast.plan, "only sets with the plan's numbers are compared"
        assert slow.plan
        if fast.plan[0] >= slow.plan[0]:
            same += 1
            continue
        doubt = "" if fast.plan[2] < slow.plan[1] else ", within its bounds"
        planned = fast.plan[0] / slow.plan[0] - 1
        swapped.append(f"- {fast.name} over {slow.name}: {_with_bounds(gain)}; in the plan {planned:+.1%}{doubt}")
    told, pairs = same + len(swapped), len(known) * (len(known) - 1) // 2
    summary = (
        f"This run tells {told} of {pairs} pairs of sets apart; bf16 differs from itself by {noise:.1%}. "
        f"Of these, {same} in the plan's order, {len(swapped)} swapped{':' if swapped else '.'}"
    )
    return "\n".join([summary, *swapped, _best(known, times, noise)])


def _best(known: Sequence[ConvertedSet], times: Times, noise: float) -> str:
    """Whether a set is faster than the one that the plan chose."""
    chosen = next(one.name for one in known if is_plans_choice(one))
    best = min(known, key=lambda one: median(times[one.name])).name
    gain = _gain(times, best, chosen) if best != chosen else None
    if gain and _is_told_apart(gain, noise):
        return f"\nThe fastest set is {best}: {_with_bounds(gain)} over the plan's."
    return "\nNo set is faster than the plan's beyond the noise."


def is_plans_choice(one: ConvertedSet) -> bool:
    return PLAN in one.name.split(", ")


def doubts(setup: TpSetup, rounds: Sequence[Mapping[str, TpVisit]]) -> list[str]:
    """What speaks against the numbers: results that are wrong, a host that is too slow."""
    wrong = [one.name for one in setup.sets if not max(found[one.name].error for found in rounds) <= MAX_ERROR]
    late = [one.name for one in setup.sets if median(_host_share(found[one.name]) for found in rounds) > HOST_SHARE]
    found = []
    if wrong:
        found.append(f"Wrong results, farther than {MAX_ERROR} from bf16's: {'; '.join(wrong)}.")
    if late:
        found.append(
            f"The host takes more than {HOST_SHARE:.0%} of a step to launch it, so the GPU may have waited: "
            f"{'; '.join(late)}. Use more --layers or --tokens."
        )
    return found


def _host_share(visit: TpVisit) -> float:
    """How much of a step the slowest host takes to launch it."""
    return max((rank.launch_us or 0.0) / rank.step_us for rank in visit.ranks)


def _gain(times: Times, one: str, over: str) -> Interval:
    return paired_speedup(times[over], times[one], confidence=CONFIDENCE)


def _is_told_apart(gain: Interval, noise: float) -> bool:
    return gain.excludes(1.0) and abs(math.log(gain.estimate)) > noise


def _with_bounds(gain: Interval) -> str:
    return f"{gain.estimate - 1:+.1%} ({gain.low - 1:+.1%} to {gain.high - 1:+.1%})"


if __name__ == "__main__":
    main()
