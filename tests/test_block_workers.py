"""A plan's workers: each answers one request at a time, and one that dies or hangs ends the plan with a clear message.

The workers are real, on the CPU, and call hooks of `serving` before each answer.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from multiprocessing import active_children
from types import SimpleNamespace

import pytest
import torch
from plans import PROTOCOL, Block, HangsInChildren, block_input
from samples import GPU, quick_points, replaced
from serving import die_at, hang_at, hooked_block, note_requests, sleep_for_ever

from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.planning import plan_protocol
from fp8gate.calibrate.planning.block_worker import BlockBench, Done, PlanJob, Visit
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerDiedError, BlockWorkerPool, StoppedError
from fp8gate.calibrate.planning.plan_block import plan
from fp8gate.calibrate.planning.plan_protocol import useful_block_workers
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
INNER, OUTER = frozenset({"inner"}), frozenset({"outer"})
GO_ON = "run the same command to go on"
TIME_IS_UP = f"the time is up; {GO_ON}"
LIMIT_S = 4
TOO_LONG = f"it took more than {LIMIT_S} s to compile or to measure; {GO_ON}"
KILLED = f"its process was killed by signal 9 (out of memory?); try fewer --workers; {GO_ON}"


@pytest.fixture(autouse=True)
def _quick():
    with quick_points():
        yield


# --- one process's part ----------------------------------------------------------------------------------------


@pytest.fixture
def job():
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    return PlanJob(blueprint=blueprint, recipe="rowwise", protocol=PROTOCOL, device=CPU, flush_bytes=2**16)


def test_a_set_is_compiled_loaded_and_visited(job):
    bench = BlockBench(job)
    assert bench.answer(("compile", INNER)) == Done()
    assert 0.01 < bench.answer(("load", INNER)).error < 0.3
    visit = bench.answer(("visit", INNER))
    assert isinstance(visit, Visit)
    assert visit.fwd_us > 0


def test_the_control_is_bf16_again(job):
    bench = BlockBench(job)
    assert bench.answer(("compile", CONTROL_SET)) == Done()
    assert bench.answer(("load", CONTROL_SET)) == Done(error=0.0)


def test_a_wrong_result_is_a_failure(job, monkeypatch):
    bench = BlockBench(job)
    bench.answer(("compile", INNER))
    monkeypatch.setattr("fp8gate.calibrate.arms.block.Block.error", lambda *_: (float("nan"), "output"))
    assert bench.answer(("load", INNER)) == Failure("failed", "wrong result: output is nan from bf16's")


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("odd"), "failed"), (torch.OutOfMemoryError("much"), "out_of_memory")]
)
def test_what_goes_wrong_is_an_answer(job, monkeypatch, error, status):
    def fail(*_):
        raise error

    monkeypatch.setattr(Blueprint, "ready", fail)
    assert BlockBench(job).answer(("compile", INNER)).status == status


# --- many processes --------------------------------------------------------------------------------------------


def measure_inner(pool):
    assert dict(pool.compile([BF16_SET, INNER])) == {BF16_SET: Done(), INNER: Done()}
    assert isinstance(pool.load(INNER), Done)
    return pool.visit(INNER)


def test_processes_answer_as_this_one_does(job, tmp_path):
    here = BlockBench(job)
    here.answer(("compile", INNER))
    with BlockWorkerPool(job, 2, serve=hooked_block(note_requests, tmp_path)) as pool:
        assert dict(pool.compile([BF16_SET, INNER, OUTER])) == {BF16_SET: Done(), INNER: Done(), OUTER: Done()}
        assert pool.load(INNER).error == pytest.approx(here.answer(("load", INNER)).error, rel=0.05)
        assert pool.visit(INNER).bwd_us > 0
        assert pool.others() == []
        assert len(active_children()) == len(list(tmp_path.iterdir())) == 2
    assert active_children() == []


@pytest.mark.parametrize(
    "calls",
    [
        ([BF16_SET], [INNER], [CONTROL_SET]),
        ([BF16_SET], [INNER, CONTROL_SET]),
        ([BF16_SET, INNER, OUTER, CONTROL_SET],),  # a plan that goes on with its finalists
    ],
)
def test_bf16_again_comes_from_another_process(job, tmp_path, calls):
    with BlockWorkerPool(job, 2, serve=hooked_block(note_requests, tmp_path)) as pool:
        for sets in calls:
            assert dict(pool.compile(sets)) == dict.fromkeys(sets, Done())
    notes = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert [("compile " in lines) + ("compile bf16 again" in lines) for lines in notes.values()] == [1, 1]


@pytest.mark.parametrize("at", ["open", "compile", "load", "visit"])
def test_a_process_that_dies_is_named_with_its_set(job, tmp_path, at):
    roles = BF16_SET if at == "open" else INNER
    with (
        pytest.raises(BlockWorkerDiedError, match=f"^{re.escape(KILLED)}$") as caught,
        BlockWorkerPool(job, 1, serve=hooked_block(die_at, tmp_path, at, roles)) as pool,
    ):
        measure_inner(pool)
    assert caught.value.roles == roles
    assert active_children() == []


@pytest.mark.parametrize(
    "at", ["compile", *(pytest.param(step, marks=pytest.mark.slow) for step in ("open", "load", "visit"))]
)
def test_a_step_that_never_ends_is_ended_within_the_limit(job, tmp_path, at):
    roles = BF16_SET if at == "open" else INNER
    serve = hooked_block(hang_at, tmp_path, at, roles)
    with (
        pytest.raises(BlockWorkerDiedError, match=rf"^{TOO_LONG}$") as caught,
        BlockWorkerPool(job, 2, serve=serve, limits=Limits(step_s=LIMIT_S)) as pool,
    ):
        measure_inner(pool)
    assert caught.value.roles == roles
    assert active_children() == []


@pytest.mark.parametrize("at", ["open", "compile", "load", "visit"])
def test_when_the_time_is_up_a_process_that_is_busy_for_ever_is_not_waited_for(job, tmp_path, at):
    roles = BF16_SET if at == "open" else INNER
    serve = hooked_block(hang_at, tmp_path, at, roles)
    with (
        pytest.raises(StoppedError, match=rf"^{TIME_IS_UP}$"),
        BlockWorkerPool(job, 1, until=time.monotonic() + 0.5, serve=serve) as pool,
    ):
        measure_inner(pool)
    assert active_children() == []


def test_when_the_time_was_up_before_nobody_is_waited_for(job):
    with (
        pytest.raises(StoppedError, match=rf"^{TIME_IS_UP}$"),
        BlockWorkerPool(job, 2, until=time.monotonic() - 1.0, serve=sleep_for_ever),
    ):
        pass


def test_a_plan_whose_block_hangs_in_a_process_stops_when_it_was_told_to():
    with pytest.raises(StoppedError, match=rf"^{TIME_IS_UP}$"):
        plan(HangsInChildren(), [block_input()], recipe="rowwise", protocol=PROTOCOL, workers=1, stop_after_s=0.5)


def test_a_block_that_cannot_be_made_ends_the_processes(job, tmp_path):
    job.blueprint.inputs["x"] = torch.zeros(16, 33, dtype=torch.bfloat16)  # not what the block takes
    with (
        pytest.raises(BlockWorkerDiedError, match="the block cannot be made on the device: RuntimeError"),
        BlockWorkerPool(job, 1, serve=hooked_block(note_requests, tmp_path)),
    ):
        pass
    assert active_children() == []


class RefusesToBeLoaded:
    """It can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("no number",)


def test_a_block_that_other_processes_cannot_have_is_an_error(job):
    unknown = replace(job, blueprint=RefusesToBeLoaded())
    with pytest.raises(BlockWorkerDiedError, match="not to be had in another process"), BlockWorkerPool(unknown, 1):
        pass
    with (
        pytest.raises(InputError, match="expected what can be pickled, unless workers is 0"),
        BlockWorkerPool(replace(job, blueprint=lambda: None), 1),
    ):
        pass
    assert active_children() == []


def test_processes_are_as_many_as_the_device_has_memory_for(monkeypatch):
    def workers(memory_gib):
        return useful_block_workers(blueprint, replaced(GPU, memory_gib=memory_gib), compiled)

    monkeypatch.setattr(plan_protocol, "default_workers", lambda device: 14)
    compiled = replaced(PROTOCOL, compile=True)
    with torch.device("meta"):
        template = torch.nn.ModuleDict({"w": torch.nn.Linear(8192, 28672, bias=False)})
    blueprint = SimpleNamespace(shapes={"w": LinearShape(8192, 8192, 28672)}, template=template)
    assert [workers(gib) for gib in (1.0, 40.0, 1000.0)] == [1, 6, 14]
    template.experts = torch.nn.Parameter(torch.empty(8, 8192, 28672, device="meta"))  # no linears, but there
    assert [workers(gib) for gib in (40.0, 80.0, 1000.0)] == [1, 2, 14]
    assert useful_block_workers(blueprint, GPU, PROTOCOL) == 0  # as nothing is compiled
