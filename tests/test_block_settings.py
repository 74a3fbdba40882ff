"""The benchmark of a layer under settings: they are on while it compiles, the journal goes on, the tables."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from builders import DEVICE, MEASURED_AT, SOFTWARE_HERE
from plans import PROTOCOL, TINY_CONFIG, Block, block_input

from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.planning.block_worker import BlockBench, Done, Visit
from fp8gate.calibrate.planning.block_worker_pool import StoppedError
from fp8gate.calibrate.planning.plan_protocol import make_protocol
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET
from fp8gate.filter.contract.errors import InputError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TILES, VIEWS = "inductor.triton.max_tiles=3", "functorch.recompute_views=True"
LESS, LEAST = "functorch.activation_memory_budget=0.9", "functorch.activation_memory_budget=0.5"
ROLES = ("inner", "outer")
ALL = frozenset(ROLES)
AGAIN = ALL | {"again"}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The device is not locked for other tests."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))


def values() -> tuple[Any, Any]:
    return inductor_config.triton.max_tiles, functorch_config.recompute_views


# --- settings --------------------------------------------------------------------------------------------------


def test_settings_are_on_inside_and_off_afterwards():
    from block_settings_list import settings_on

    before = values()
    with settings_on([TILES, VIEWS]):
        assert values() == (3, True)
    assert values() == before == (None, False)
    with pytest.raises(ZeroDivisionError), settings_on([TILES]):
        1 / 0  # noqa: B018
    assert values() == before


def test_every_setting_can_be_turned_on_and_changes_something():
    from block_settings_list import CASTS_ON, KnownSettings, settings_on

    known = KnownSettings.of_torch()
    assert len(known.candidates) + len(known.skipped) == 19
    before = inductor_config.get_config_copy(), functorch_config.get_config_copy()
    for candidate in known.candidates:
        with settings_on(candidate):
            changed = (inductor_config.get_config_copy(), functorch_config.get_config_copy()) != before
            assert changed is (candidate != (CASTS_ON,))  # these, the worker turns on
        assert (inductor_config.get_config_copy(), functorch_config.get_config_copy()) == before


def test_what_torch_does_not_know_is_skipped_and_named():
    from block_settings_list import KnownSettings

    wanted = [
        {"inductor.triton.max_tiles": 3},
        {"inductor.triton.nonsense": 1},
        {"functorch.nonsense": True, "functorch.recompute_views": True},
        {"functorch.recompute_views": False},
    ]
    known = KnownSettings.of_torch(wanted)
    assert known.candidates == ((TILES,),)
    assert known.skipped == (
        f"inductor.triton.nonsense: unknown to torch {torch.__version__}",
        f"functorch.nonsense: unknown to torch {torch.__version__}",
        f"functorch.recompute_views=False: the default of torch {torch.__version__}",
    )


@pytest.mark.parametrize("default", [True, False])
def test_a_setting_may_be_what_is_not_the_default(default):
    """Of `get_config_copy`, which is what torch has at the time."""
    from block_settings_list import OTHER, KnownSettings

    with inductor_config.patch({"loop_ordering_after_fusion": default}):
        known = KnownSettings.of_torch([{"inductor.loop_ordering_after_fusion": OTHER}])
    assert known.candidates == ((f"inductor.loop_ordering_after_fusion={not default}",),)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [(TILES,), (LEAST,), (LESS,), (TILES, VIEWS)]),
        (["triton.max_tiles"], [(TILES,)]),
        (["functorch.activation_memory_budget"], [(LEAST,), (LESS,)]),
        (["activation_memory_budget=0.9", TILES], [(TILES,), (LESS,)]),
        ([f"{TILES} + {VIEWS}"], [(TILES, VIEWS)]),
        (["triton.max_tiles + activation_memory_budget", TILES], [(TILES,), (TILES, LEAST), (TILES, LESS)]),
    ],
)
def test_settings_may_be_named_briefly(wanted, found):
    from block_settings_list import KnownSettings

    assert list(KnownSettings(((TILES,), (LEAST,), (LESS,), (TILES, VIEWS)), ()).named(wanted)) == found


def test_a_name_that_is_no_candidate_is_an_error():
    from block_settings_list import KnownSettings

    with pytest.raises(InputError, match=r"--settings: expected any of inductor.triton.max_tiles=3; got 'tiles'"):
        KnownSettings(((TILES,),), ()).named(["triton.max_tiles", "tiles"])
    with pytest.raises(InputError, match=r"got 'triton.max_tiles [+] tiles'"):
        KnownSettings(((TILES,),), ()).named(["triton.max_tiles + tiles"])
    for unknown_to_torch in ("triton.max_tiles", "recompute_views + triton.max_tiles"):
        assert KnownSettings(((VIEWS,),), ("skipped",)).named([unknown_to_torch]) == ()


def test_the_casts_are_named_like_a_setting():
    from block_settings_list import KnownSettings

    known = KnownSettings.of_torch()
    assert known.named(["casts"]) == known.named(["fp8gate.casts"]) == (("fp8gate.casts=True",),)
    assert known.named(["fp8gate.casts + triton.max_tiles"]) == (("fp8gate.casts=True", TILES),)


# --- compiling -------------------------------------------------------------------------------------------------


def make_bench(folder: Path, **protocol: Any) -> Any:
    from block_settings_bench import SettingsBench, SettingsJob

    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    return SettingsBench(
        SettingsJob(
            blueprint=blueprint,
            recipe="rowwise",
            protocol=msgspec.structs.replace(PROTOCOL, **protocol),
            device=CPU,
            flush_bytes=2**16,
            cache=folder,
        )
    )


@pytest.mark.parametrize(
    ("extra", "expected"), [([], (None, False)), (["again"], (None, False)), ([TILES, VIEWS], (3, True))]
)
def test_settings_are_on_while_a_set_compiles_and_is_tuned(tmp_path, monkeypatch, extra, expected):
    seen: list[Any] = []

    def noting(call: Any) -> Any:
        def noted(*args: Any) -> Any:
            seen.append((values(), os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"]))
            return call(*args)

        return noted

    bench, one = make_bench(tmp_path), ALL | frozenset(extra)
    bench.open(BF16_SET)
    monkeypatch.setattr(Blueprint, "ready", noting(Blueprint.ready))
    assert bench.answer(("compile", one)) == Done()
    monkeypatch.setattr(BlockBench, "load", noting(BlockBench.load))
    assert bench.answer(("load", one)).cost.launches is None  # nothing is compiled on a CPU
    folder = str(bench._cache_folder(one))
    assert seen == [(expected, folder, f"{folder}/triton")] * 2
    assert values() == (None, False)
    assert folder not in os.environ.values()


def test_a_set_that_does_not_compile_leaves_nothing_on(tmp_path, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such tiling")

    bench = make_bench(tmp_path)
    monkeypatch.setattr(Blueprint, "ready", fail)
    assert bench.answer(("compile", ALL | {TILES})) == Failure("failed", "RuntimeError: no such tiling")
    assert values() == (None, False)
    assert not any(tmp_path.rglob("compiled"))


def test_only_a_set_with_that_setting_is_compiled_with_the_casts(tmp_path, monkeypatch):
    from block_settings_list import CASTS_ON

    from fp8gate import casts
    from fp8gate.calibrate.arms import compilation

    def note(*_: object) -> object:
        seen.append(casts.is_enabled())
        raise compilation._CompiledButNotRun

    seen: list[bool] = []
    bench = make_bench(tmp_path, compile=True)
    monkeypatch.setattr(compilation._InductorUntilRun, "__call__", note)
    for one in (ALL, ALL | {CASTS_ON}, ALL | {CASTS_ON, TILES}, BF16_SET, CONTROL_SET):
        bench.answer(("compile", one))
    assert seen == [False, True, True, False, False]


def test_each_set_and_setting_has_a_cache_of_its_own(tmp_path):
    bench = make_bench(tmp_path)
    sets = [BF16_SET, CONTROL_SET, ALL, AGAIN, ALL | {LESS}, ALL | {LEAST}, ALL | {LESS, TILES}]
    assert len({bench._cache_folder(one) for one in sets}) == len(sets)


@pytest.mark.slow
def test_inductor_compiles_other_code_under_a_setting_that_matters(tmp_path):
    """With less memory the backward pass computes more again. A kept cache serves the same settings, and only these."""
    bench = make_bench(tmp_path, compile=True)
    costs = {}
    for one in (ALL, AGAIN, ALL | {TILES}, ALL | {"functorch.activation_memory_budget=0.1"}):
        assert bench.answer(("compile", one)) == Done()
        costs[one] = bench.answer(("load", one)).cost
        assert isinstance(bench.answer(("visit", one)), Visit)
    first, again, tiles, budget = costs.values()
    assert first.code == again.code == tiles.code  # tiles are of Triton's kernels, and those of a CPU are C++
    assert first.code != budget.code
    assert first.launches == again.launches < budget.launches
    assert {cost.casts for cost in costs.values()} == {0}
    assert all(cost.compile_s > 1 for cost in costs.values())  # nothing was there

    later = make_bench(tmp_path, compile=True)
    assert later.answer(("compile", ALL)) == Done()
    found = later.answer(("load", ALL)).cost
    assert (found.compile_s, found.code) == (None, first.code)


def test_code_is_the_same_whatever_settings_are_noted_beside_it():
    from block_settings_bench import code_hash

    code = "# AOT ID: ['0_forward']\n@heuristics(\n    inductor_meta={'a': 1, 'b': {'c': 2}},\n)\ndef kernel(x):  # a\n"
    same = code.replace("0_forward", "7_forward").replace("'a': 1", "'a': 2").replace("# a", "# b")
    assert code_hash([code]) == code_hash([same])
    assert code_hash([code]) != code_hash([code.replace("kernel(x)", "kernel(y)")])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_compiles_tunes_and_captures_under_settings(tmp_path):
    """Those that run kernels while they compile or at a first launch among them."""
    from block_settings_bench import SettingsBench, SettingsJob

    device = torch.device("cuda")
    protocol = msgspec.structs.replace(make_protocol(device, "rowwise"), run_s=0.05, settle_s=0.05)
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    bench = SettingsBench(
        SettingsJob(blueprint=blueprint, recipe="rowwise", protocol=protocol, device=device, cache=tmp_path)
    )
    triton = (f"inductor.triton.{name}" for name in ("multi_kernel=1", "cooperative_reductions=True"))
    settings = [(), ("again",), ("inductor.benchmark_fusion=True",), (LEAST,), *((one,) for one in triton)]
    costs = []
    for one in (ALL | frozenset(extra) for extra in settings):
        assert bench.answer(("compile", one)) == Done()
        loaded = bench.answer(("load", one))
        assert not isinstance(loaded, Failure), loaded
        costs.append(loaded.cost)
        assert bench.answer(("visit", one)).slowdown is None
    assert all(cost.peak_bytes > 0 and cost.launches > 0 for cost in costs)
    assert costs[0].code == costs[1].code


# --- tables ----------------------------------------------------------------------------------------------------


def make_setup(**fields: Any) -> Any:
    from block_settings_output import SettingsSetup

    made = {
        "model": "tiny",
        "recipe": "rowwise",
        "tokens": 32,
        "sequence": 32,
        "tp": 2,
        "recompute": "none",
        "device": DEVICE,
        "software": SOFTWARE_HERE,
        "protocol": msgspec.structs.replace(PROTOCOL, compile=True, inductor={"emulate_precision_casts": True}),
        "block": "0123",
        "shapes": {"inner": (32, 32, 64), "outer": (32, 64, 32), "narrow": (32, 64, 8)},
        "skipped": (),
    }
    return SettingsSetup(**{**made, **fields})


def make_visits(rounds: int = 6, *, first: int = 1, **fields: Any) -> Any:
    """Visits of several sets, in microseconds of forward plus backward."""
    from block_settings_output import SettingVisit

    def visits(times_us: dict[frozenset[str], float]) -> list[Any]:
        return [
            SettingVisit(
                convert=tuple(sorted(one)),
                round=number,
                measured_at=MEASURED_AT,
                fwd_us=us / 4,
                bwd_us=us * 3 / 4,
                **{"error": 0.1, **fields},
            )
            for number in range(first, first + rounds)
            for one, us in times_us.items()
        ]

    return visits


TIMES = {BF16_SET: 1200.0, CONTROL_SET: 1200.0, ALL: 1000.0, AGAIN: 1001.0}


def report_of(records: list[Any], **fields: Any) -> list[str]:
    from block_settings_output import report

    return report(make_setup(**fields), records).split("\n\n")


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_has_what_was_measured():
    costs = {"compile_s": 21.25, "load_s": 3.0, "peak_bytes": 3 * 2**20, "launches": 12, "code": "aa"}
    records = make_visits(**costs)({**TIMES, ALL | {VIEWS}: 1250.0})
    records += make_visits(**{**costs, "launches": 9, "casts": 2, "code": "bb", "error": 0.2})({ALL | {TILES}: 800.0})
    title, name, table, verdict, skipped = report_of(records, skipped=("a: unknown", "b: unknown"))
    assert title == (
        f"tiny, TP 2, 32 tokens, rowwise, NVIDIA H200 (torch {SOFTWARE_HERE.torch}, torchao {SOFTWARE_HERE.torchao}), "
        "compiled; production's settings: emulate_precision_casts"
    )
    assert name == "all in float8:"
    cost = ["21.2", "3.0"]
    assert rows_of(table) == [
        ["bf16", "1.200", "", "", *cost, "0.100", "3", "12"],
        ["bf16 again", "1.200", "+0.0% (+0.0% to +0.0%)", "", *cost, "0.100", "3", "12"],
        ["production", "1.000", "+20.0% (+20.0% to +20.0%)", "", *cost, "0.100", "3", "12"],
        [
            "production again",
            "1.001",
            "+19.9% (+19.9% to +19.9%)",
            "-0.1% (-0.1% to -0.1%)",
            *cost,
            "0.100",
            "3",
            "12, as production",
        ],
        [TILES, "0.800", "+50.0% (+50.0% to +50.0%)", "+25.0% (+25.0% to +25.0%)", *cost, "0.200", "3", "9, 2 casts"],
        [
            VIEWS,
            "1.250",
            "-4.0% (-4.0% to -4.0%)",
            "-20.0% (-20.0% to -20.0%)",
            *cost,
            "0.100",
            "3",
            "12, as production",
        ],
    ]
    assert verdict.splitlines() == [
        "Beyond the noise (production gains -0.1% (-0.1% to -0.1%) over itself):",
        f"- {TILES}: +25.0% (+25.0% to +25.0%) over production",
    ]
    assert skipped == "Skipped: a: unknown; b: unknown."


def test_each_set_of_roles_has_a_table():
    inner = frozenset({"inner"})
    records = make_visits()({**TIMES, inner: 1100.0, inner | {"again"}: 1100.0, inner | {TILES}: 1000.0})
    parts = report_of(records)
    assert (parts[1], parts[4]) == ("all in float8:", "inner in float8:")
    assert [row[0] for row in rows_of(parts[5])] == ["bf16", "bf16 again", "production", "production again", TILES]
    assert rows_of(parts[5])[4][2:4] == ["+20.0% (+20.0% to +20.0%)", "+10.0% (+10.0% to +10.0%)"]


def test_only_rounds_of_both_are_compared():
    """Of a later call, in which the GPU was twice as fast: it visited bf16 and production again, as it must."""
    records = make_visits()(TIMES)
    records += make_visits(first=7)({one: us / 2 for one, us in {**TIMES, ALL | {TILES}: 800.0}.items()})
    _, _, table, _ = report_of(records)
    assert rows_of(table)[4][2:4] == ["+50.0% (+50.0% to +50.0%)", "+25.0% (+25.0% to +25.0%)"]


def test_too_few_rounds_have_no_bounds():
    records = make_visits()(TIMES) + make_visits(5)({ALL | {TILES}: 800.0})
    _, _, table, verdict = report_of(records)
    assert rows_of(table)[4][2:4] == ["5 of 6 rounds", "5 of 6 rounds"]
    assert verdict.startswith("No setting gains beyond the noise")
    assert report_of(make_visits(5)(TIMES))[3].startswith("Production was not compared with itself in 6 rounds")


def test_what_could_not_be_measured_is_said_in_its_row():
    from block_settings_output import SettingVisit

    failed = SettingVisit(
        convert=(*ROLES, TILES), round=0, measured_at=MEASURED_AT, status="failed", detail="RuntimeError: no tiling"
    )
    _, _, table, _ = report_of([*make_visits()(TIMES), failed])
    assert rows_of(table)[4][:2] == [TILES, "failed: RuntimeError: no tiling"]


def measured(times_us: dict[frozenset[str], float]) -> Any:
    from block_settings_output import Measured

    return Measured.of(make_setup(), make_visits()({**TIMES, **times_us}))


CANDIDATES = ((TILES,), (VIEWS,), (LESS,), (LEAST,), (TILES, VIEWS))


def test_those_that_gain_are_tried_together():
    found = measured({ALL | {TILES}: 990.0, ALL | {LESS}: 980.0, ALL | {LEAST}: 970.0, ALL | {VIEWS}: 1000.5})
    assert [one - ALL for one, _ in found.gaining(ALL)] == [{LEAST}, {LESS}, {TILES}]
    assert found.best_together(ALL, CANDIDATES) == ALL | {LEAST, TILES}  # LESS would give the same setting two values


@pytest.mark.parametrize(
    "times_us",
    [
        {},
        {ALL | {TILES}: 999.5},  # production differs as much from itself
        {ALL | {TILES}: 900.0},
        {ALL | {TILES}: 900.0, ALL | {VIEWS}: 950.0},  # both at once are a candidate already
    ],
)
def test_fewer_than_two_are_not_tried_together(times_us):
    assert measured(times_us).best_together(ALL, CANDIDATES) is None


def test_what_differs_as_production_does_from_itself_is_noise():
    assert measured({ALL | {TILES}: 999.5}).gaining(ALL) == []
    assert [one for one, _ in measured({ALL | {TILES}: 998.0}).gaining(ALL)] == [ALL | {TILES}]


def test_what_was_tried_together_is_called_so_and_chooses_nothing():
    together = ALL | {LEAST, TILES}
    times_us = {ALL | {TILES}: 990.0, ALL | {LEAST}: 970.0, ALL | {VIEWS}: 1100.0, together | {VIEWS}: 900.0}
    assert measured(times_us).best_together(ALL, CANDIDATES) == together
    records = make_visits()({**TIMES, together: 900.0})
    assert rows_of(report_of(records)[2])[4][0] == f"together: {LEAST} + {TILES}"


def test_the_journal_is_read_again(tmp_path):
    from block_settings_output import SettingsJournal, read_journal

    setup, visits = make_setup(), make_visits(1)(TIMES)
    with SettingsJournal(tmp_path, setup) as journal:
        for visit in visits:
            journal.append(visit)
        assert read_journal(journal.path) == (setup, visits)  # written at once
    with SettingsJournal(tmp_path, setup) as again:
        assert again.records == visits


# --- rounds ----------------------------------------------------------------------------------------------------


class Pool:
    """`SettingsPool` that measures nothing: what was planted comes out of it."""

    def __init__(self, times_us: dict[frozenset[str], float], failing: tuple[str, ...] = ()) -> None:
        self.times_us, self.failing = times_us, failing
        self.compiled: list[frozenset[str]] = []
        self.visited: list[frozenset[str]] = []

    def others(self) -> list[str]:
        return []

    def compile(self, sets: Any) -> Any:
        for one in sets:
            self.compiled.append(one)
            yield one, Failure("failed", "no tiling") if {*self.failing} & one else Done()

    def load(self, one: frozenset[str]) -> Any:
        return Done(0.1)

    def cost(self, one: frozenset[str]) -> dict[str, Any]:
        return {"compile_s": 1.5, "load_s": 0.5, "peak_bytes": 2**20, "launches": 3, "code": "aa"}

    def visit(self, one: frozenset[str]) -> Visit:
        self.visited.append(one)
        us = self.times_us.get(one, 1000.0)
        return Visit(us / 2, us / 2, 1980, False, None)


def make_rounds(folder: Path, pool: Any, until: float = float("inf")) -> Any:
    from block_settings_list import KnownSettings
    from block_settings_output import SettingsJournal
    from block_settings_rounds import SettingRounds

    journal = SettingsJournal(folder, make_setup()).__enter__()
    known = KnownSettings((*CANDIDATES, ("inductor.coordinate_descent_tuning=True",)), ())
    return SettingRounds(pool, journal, journal.setup.shapes, known, lambda message: None, start=0.0, until=until)


def measure_first(rounds: Any, visits: int, candidates: Any = ((TILES,), (VIEWS,))) -> None:
    from block_settings import measure_alone

    measure_alone(rounds, {"all": ROLES}, candidates, visits)


def orders(rounds: Any) -> list[list[frozenset[str]]]:
    records = rounds.journal.records
    numbers = dict.fromkeys(record.round for record in records if record.status == "measured")
    return [[frozenset(record.convert) for record in records if record.round == number] for number in numbers]


def test_all_are_visited_in_each_round_in_random_order(tmp_path):
    rounds = make_rounds(tmp_path, Pool({}))
    measure_first(rounds, 3)
    found = orders(rounds)
    expected = {BF16_SET, CONTROL_SET, ALL, AGAIN, ALL | {TILES}, ALL | {VIEWS}}
    assert [set(order) for order in found] == [expected] * 3
    assert all(len(order) == len(expected) for order in found)
    assert len({tuple(order) for order in found}) > 1
    record = rounds.journal.records[-1]
    assert (record.compile_s, record.peak_bytes, record.launches, record.code) == (1.5, 2**20, 3, "aa")


def test_what_tunes_for_long_is_measured_when_all_others_are(tmp_path):
    slow = "inductor.coordinate_descent_tuning=True"
    rounds = make_rounds(tmp_path, pool := Pool({}))
    measure_first(rounds, 2, ((slow,), (TILES,)))
    assert pool.compiled[-1] == ALL | {slow}
    first = {BF16_SET, CONTROL_SET, ALL, AGAIN, ALL | {TILES}}
    assert [set(order) for order in orders(rounds)] == [first, first, *[{BF16_SET, ALL, ALL | {slow}}] * 2]


def test_the_journal_goes_on_with_what_lacks_beside_what_it_is_compared_with(tmp_path):
    first = make_rounds(tmp_path, Pool({}))
    measure_first(first, 3, ((TILES,),))
    first.journal.__exit__(None, None, None)
    pool = Pool({})
    again = make_rounds(tmp_path, pool)
    measure_first(again, 3, ((TILES,), (VIEWS,)))
    assert set(pool.compiled) == {BF16_SET, ALL, ALL | {VIEWS}}
    assert [set(order) for order in orders(again)[3:]] == [{BF16_SET, ALL, ALL | {VIEWS}}] * 3
    pool.compiled.clear()
    measure_first(again, 3)
    assert pool.compiled == []


@pytest.mark.parametrize(
    ("visited", "lacking"),
    [
        ((BF16_SET, ALL, ALL | {TILES}), {BF16_SET, CONTROL_SET, ALL, AGAIN}),
        ((BF16_SET, ALL | {TILES}), {BF16_SET, CONTROL_SET, ALL, AGAIN, ALL | {TILES}}),
        ((ALL, ALL | {TILES}), {BF16_SET, CONTROL_SET, ALL, AGAIN, ALL | {TILES}}),
        ((BF16_SET, CONTROL_SET, ALL, AGAIN), {BF16_SET, ALL, ALL | {TILES}}),
    ],
)
def test_a_round_that_was_cut_short_counts_for_what_can_be_compared_in_it(tmp_path, visited, lacking):
    from block_settings_output import SettingsJournal

    with SettingsJournal(tmp_path, make_setup()) as journal:
        for visit in make_visits(1)(dict.fromkeys(visited, 1000.0)):
            journal.append(visit)
    rounds = make_rounds(tmp_path, Pool({}))
    measure_first(rounds, 1, ((TILES,),))
    assert [set(order) for order in orders(rounds)] == [set(visited), lacking]


def test_a_setting_that_fails_is_kept_and_the_others_go_on(tmp_path):
    rounds = make_rounds(tmp_path, Pool({}, failing=(TILES,)))
    measure_first(rounds, 2)
    assert rounds.failed == {ALL | {TILES}: "failed"}
    assert [set(order) for order in orders(rounds)] == [{BF16_SET, CONTROL_SET, ALL, AGAIN, ALL | {VIEWS}}] * 2


def test_without_production_there_is_nothing_to_compare_with(tmp_path):
    with pytest.raises(StoppedError, match="all: production could not be measured"):
        measure_first(make_rounds(tmp_path, Pool({}, failing=("inner",))), 1)


def test_production_that_failed_in_two_calls_is_left_and_said_to_be(tmp_path):
    from block_settings_rounds import variants_of

    inner = frozenset({"inner"})
    sets = variants_of({"all": ROLES, "one": ("inner",)}, [(), ("again",), (TILES,)])
    for _ in range(2):
        rounds = make_rounds(tmp_path, Pool({}, failing=("outer",)))
        with pytest.raises(StoppedError):
            rounds(sets, 1)
        rounds.journal.__exit__(None, None, None)
    said: list[str] = []
    rounds = make_rounds(tmp_path, pool := Pool({}))
    rounds.say = said.append
    rounds(sets, 1)
    assert said[0] == "all: production could not be measured, so nothing is compared with it"
    assert set(pool.visited) == {BF16_SET, inner, inner | {"again"}, inner | {TILES}}
    _, name, table, *_ = report_of(rounds.journal.records)
    assert name == "all in float8:"
    assert rows_of(table)[-1][:2] == ["production", "failed: no tiling"]


def test_no_step_begins_after_the_time_is_up(tmp_path):
    rounds = make_rounds(tmp_path, pool := Pool({}), until=0.0)
    with pytest.raises(StoppedError, match="the time is up"):
        measure_first(rounds, 1)
    assert pool.visited == []


def test_the_best_together_are_measured_beside_production(tmp_path, capsys):
    from block_settings import measure_together
    from block_settings_list import KnownSettings

    known = KnownSettings((*CANDIDATES, ("inductor.coordinate_descent_tuning=True",)), ())
    together = ALL | {TILES, LESS}
    times_us = {AGAIN: 1000.5, ALL | {TILES}: 950.0, ALL | {LESS}: 970.0, together: 900.0}
    rounds = make_rounds(tmp_path, Pool(times_us))
    measure_first(rounds, 6, CANDIDATES)
    measure_together(rounds, known, {"all": ROLES}, 6)
    assert [set(order) for order in orders(rounds)[6:]] == [{BF16_SET, ALL, together}] * 6
    _, _, table, _ = report_of(rounds.journal.records)
    assert rows_of(table)[4][:4:3] == [f"together: {LESS} + {TILES}", "+11.1% (+11.1% to +11.1%)"]
    assert capsys.readouterr().err == ""


def test_it_is_said_if_nothing_is_tried_together(tmp_path, capsys):
    from block_settings import measure_together
    from block_settings_list import KnownSettings

    rounds = make_rounds(tmp_path, pool := Pool({}))
    measure_first(rounds, 6, CANDIDATES)
    pool.visited.clear()
    measure_together(rounds, KnownSettings(CANDIDATES, ()), {"all": ROLES}, 6)
    assert pool.visited == []
    assert capsys.readouterr().err.startswith("all: fewer than two settings gain beyond the noise")


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("transformers")
    monkeypatch.setattr(Cpu, "defaults", replace(Cpu.defaults, visit_run_s=0.001))
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY_CONFIG))
    return path


def test_it_measures_a_real_layer_and_goes_on(config, tmp_path, capsys):
    from block_settings import parse, run

    options = [str(config), "--recipe", "rowwise", "--tokens", "32", "--out", str(tmp_path / "out"), "--rounds", "6"]
    options += ["--device", "cpu", "--settings", "triton.max_tiles"]
    with pytest.raises(StoppedError, match="the time is up; run the same command to go on"):
        run(parse([*options, "--stop-after", "0"]))
    assert "not compiled, so that no setting changes anything" in capsys.readouterr().out
    run(parse(options))
    out, said = capsys.readouterr()
    title, name, table, verdict, *_ = out.split("\n\n")
    assert title.startswith("tiny, TP 1, 32 tokens, rowwise, ")
    assert name == "all in float8:"
    rows = rows_of(table)
    assert [row[0] for row in rows] == ["bf16", "bf16 again", "production", "production again", TILES]
    assert [float(row[6]) for row in rows] == [0.0, 0.0, *(pytest.approx(0.1, abs=0.09) for _ in range(3))]
    assert "over itself" in verdict
    assert "plan: none of this layer, recipe and number of tokens is committed, left out" in said
    assert "round 6, visit 30 of 30" in said
    assert "only the settings that were asked for are measured" in said
    (journal,) = (tmp_path / "out").glob("journal-*.jsonl")
    assert len(journal.read_bytes().splitlines()) == 1 + 6 * 5
    run(parse(options))
    assert capsys.readouterr().out == out
    assert len(journal.read_bytes().splitlines()) == 1 + 6 * 5


@pytest.mark.slow
def test_processes_compile_and_visit(config, tmp_path, capsys):
    from block_settings import parse, run

    options = [str(config), "--recipe", "rowwise", "--tokens", "32", "--out", str(tmp_path / "out"), "--rounds", "6"]
    run(parse([*options, "--device", "cpu", "--settings", "triton.max_tiles", "--workers", "2"]))
    rows = rows_of(capsys.readouterr().out.split("\n\n")[2])
    assert [row[0] for row in rows] == ["bf16", "bf16 again", "production", "production again", TILES]
    assert all(row[5] for row in rows)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--rounds", "5", "--rounds: expected at least 6; got 5"),
        ("--tokens", "0", "--tokens: expected at least 1; got 0"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(option, value, complaint, tmp_path, capsys):
    from block_settings import parse

    with pytest.raises(SystemExit):
        parse(["llama3-8b", "--recipe", "rowwise", "--tokens", "32", "--out", str(tmp_path), option, value])
    assert complaint in capsys.readouterr().err


LLAMA_ROLES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)


def make_subject(**fields: Any) -> Any:
    return SimpleNamespace(**{"name": "llama3-70b", "tp": 8, "tokens": 8192, "possible": LLAMA_ROLES, **fields})


def test_a_layer_that_was_planned_elsewhere_has_that_choice():
    from block_settings import PLANNED_ON, find_plan

    found = find_plan(make_subject(), "rowwise", CPU)
    assert (found.model, found.tp, found.recipe, found.device.name) == ("llama3-70b", 8, "rowwise", PLANNED_ON[0])
    assert find_plan(make_subject(name="llama3-8b", tp=1), "rowwise", CPU).device.name == PLANNED_ON[0]
    for other in ({"tp": 4}, {"tokens": 4096}, {"name": "tiny"}, {"possible": LLAMA_ROLES[:1]}):
        assert find_plan(make_subject(**other), "rowwise", CPU) is None


@pytest.mark.parametrize(
    ("wanted", "planned", "found"),
    [
        (["all", "plan"], ("mlp.up_proj",), {"all": LLAMA_ROLES, "plan": ("mlp.up_proj",)}),
        (["all", "plan"], LLAMA_ROLES, {"all": LLAMA_ROLES}),
        (["all", "plan"], (), {"all": LLAMA_ROLES}),
        (["all", "plan"], None, {"all": LLAMA_ROLES}),
        (["up_proj,self_attn.q_proj"], None, {"up_proj,self_attn.q_proj": ("self_attn.q_proj", "mlp.up_proj")}),
    ],
)
def test_sets_are_measured_once(wanted, planned, found):
    from block_settings import sets_of

    plan = None if planned is None else SimpleNamespace(convert=planned, device=DEVICE)
    assert sets_of(wanted, make_subject(), plan, lambda message: None) == found


def test_a_role_that_is_not_there_is_an_error():
    from block_settings import sets_of

    with pytest.raises(InputError, match=r"--sets: expected roles among self_attn.q_proj, .*; got wq"):
        sets_of(["wq"], make_subject(), None, lambda message: None)
