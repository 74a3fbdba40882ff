"""Worker processes: each point has one outcome, whatever becomes of them, and one at a time has the device.

The workers are real, on the CPU, and call hooks of `serving` at each of their steps.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from processes import is_alive
from samples import PROTOCOL, quick_points, replaced
from serving import (
    break_once,
    die_at_once,
    exit_at,
    fail_to_warm,
    hang_once,
    hooked,
    kill_once,
    lose_the_device,
    no_hook,
    sleep_for_ever,
    take_notes,
    wait_in_order,
    warm_slowly,
)

from fp8gate.calibrate.device.cuda.kind import Cuda
from fp8gate.calibrate.points import worker_pool
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.point_worker import Job, PointBench, serve_points
from fp8gate.calibrate.points.ready_point import make_ready
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.points.worker_pool import DeviceUse, Died, Finished, InThisProcess, WorkerPool
from fp8gate.calibrate.processes.child import NoChildError
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
PROTOCOLS = {"tensorwise": replaced(PROTOCOL, rounds=(8,))}
ANY_FILE = Path(__file__)
JOB = Job(CPU, PROTOCOLS, seed=0, timing_lock=ANY_FILE, flush_bytes=2**16)
TASKS = [Task(LinearShape(32, 32, n)) for n in (16, 32, 48, 64, 80)]
VICTIM = TASKS[1].shape
ANY_HOOK = hooked(no_hook)
LIMIT_S = 2  # of steps that take hundredths of a second, on a machine that may be under load


@dataclass(frozen=True, slots=True)
class Step:
    """What a worker did between two of its notes."""

    pid: int
    name: str
    n: int
    start: float
    end: float


def steps_in(folder, name):
    """All workers' steps of that name, by their start."""
    steps = []
    for path in folder.iterdir():
        notes = [line.split() for line in path.read_text().splitlines()]
        for (step, n, start), (_, _, end) in itertools.pairwise(notes):
            if step == name:
                steps.append(Step(int(path.name), step, int(n), float(start), float(end)))
    return sorted(steps, key=lambda step: step.start)


def outcomes_of(tasks, count, serve=ANY_HOOK, job=JOB, **options):
    with WorkerPool(job, count, serve=serve, **options) as pool:
        return list(pool.run(TaskQueue(tasks)))


def collect(pool, outcomes):
    """The outcomes of all tasks, up to an error."""
    for outcome in pool.run(TaskQueue(TASKS)):
        outcomes.append(outcome)


@pytest.mark.parametrize("count", [1, 2])
def test_every_task_finishes_once(count):
    outcomes = outcomes_of(TASKS, count)
    assert sorted(outcome.task.shape for outcome in outcomes) == [task.shape for task in TASKS]
    for outcome in outcomes:
        assert outcome.record.shape == outcome.task.shape
        assert outcome.record.status("tensorwise") == "measured"
        assert len(outcome.record.arms["bf16"].total_us) == 8
    assert len({outcome.record.process for outcome in outcomes}) == count


def test_nothing_to_do_starts_and_ends_workers():
    with WorkerPool(JOB, 2, serve=ANY_HOOK) as pool:
        pids = pool.pids
        assert all(is_alive(pid) for pid in pids)
        assert list(pool.run(TaskQueue([]))) == []
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_control_and_every_recipe_are_measured():
    recipes = {"tensorwise": PROTOCOLS["tensorwise"], "rowwise": PROTOCOLS["tensorwise"]}
    (outcome,) = outcomes_of([Task(VICTIM, control=True)], 1, job=replace(JOB, protocols=recipes))
    assert set(outcome.record.arms) == {"bf16", "bf16_again", "tensorwise", "rowwise"}
    assert {arm.status for arm in outcome.record.arms.values()} == {"measured"}


def test_only_one_at_a_time_has_the_device_while_others_compile(tmp_path):
    outcomes_of(TASKS, 3, hooked(take_notes, tmp_path, {"compiling": 0.1, "measuring": 0.1}))
    turns, compilations = steps_in(tmp_path, "measuring"), steps_in(tmp_path, "compiling")
    assert len(turns) == len(compilations) == len(TASKS)
    assert len({turn.pid for turn in turns}) == 3
    for one, following in itertools.pairwise(turns):
        assert one.end < following.start
    assert any(
        compilation.start < turn.end and turn.start < compilation.end and compilation.pid != turn.pid
        for compilation in compilations
        for turn in turns
    )


def test_nobody_measures_while_another_starts_its_libraries(tmp_path):
    outcomes_of(TASKS, 3, hooked(warm_slowly, tmp_path))
    turns = [float(line) for line in (tmp_path / "turns").read_text().split()]
    assert len(turns) == len(TASKS)
    assert min(turns) > float((tmp_path / "warm").read_text())


def test_a_worker_that_cannot_start_them_is_replaced_and_not_waited_for(tmp_path):
    assert {type(outcome) for outcome in outcomes_of(TASKS, 2, hooked(fail_to_warm, tmp_path))} == {Finished}


def test_the_worker_that_waits_longest_has_the_next_turn(tmp_path):
    order = [16, 48, 32]
    outcomes_of(TASKS[:3], 3, hooked(wait_in_order, tmp_path, order))
    assert [int(n) for n in (tmp_path / "turns").read_text().split()] == order


@pytest.mark.parametrize("step", ["compiling", "ready", "measuring"])
def test_a_killed_worker_is_replaced_and_its_task_comes_back(tmp_path, step):
    queue = TaskQueue(TASKS)
    died, finished = [], []
    with WorkerPool(JOB, 2, serve=hooked(kill_once, tmp_path, step, VICTIM, signal.SIGKILL)) as pool:
        before = set(pool.pids)
        for outcome in pool.run(queue):
            if isinstance(outcome, Died):
                died.append(outcome)
                assert queue.may_try_after_death(outcome.task)
                assert len(before & set(pool.pids)) == 1
                assert all(is_alive(pid) for pid in pool.pids)
            else:
                finished.append(outcome.task)
        assert len(pool.pids) == 2
    assert died == [Died(TASKS[1], "its process was killed by signal 9 (out of memory?)")]
    assert sorted(task.shape for task in finished) == [task.shape for task in TASKS]


def test_a_task_that_is_not_given_back_stays_lost(tmp_path):
    outcomes = outcomes_of(TASKS, 2, hooked(kill_once, tmp_path, "measuring", VICTIM, signal.SIGSEGV))
    (died,) = (outcome for outcome in outcomes if isinstance(outcome, Died))
    assert died == Died(TASKS[1], "its process was killed by signal 11")
    assert len([outcome for outcome in outcomes if isinstance(outcome, Finished)]) == len(TASKS) - 1


def test_points_that_end_their_process_do_not_end_the_sweep():
    good, bad = TASKS[::2], [TASKS[1], TASKS[3]]
    serve = hooked(exit_at, {task.shape for task in bad}, 3)
    outcomes = outcomes_of([good[0], *bad, *bad, good[1], *bad, good[2]], 1, serve)
    assert [outcome.task for outcome in outcomes if isinstance(outcome, Finished)] == good
    died = [outcome for outcome in outcomes if isinstance(outcome, Died)]
    assert died == [Died(task, "its process ended with exit code 3") for task in 3 * bad]
    assert len(2 * bad) > worker_pool.MAX_USELESS


@pytest.mark.parametrize("step", ["compiling", "measuring"])
def test_a_step_that_takes_too_long_is_ended_and_not_said_to_lack_memory(tmp_path, step):
    serve = hooked(hang_once, tmp_path, step, VICTIM)
    outcomes = outcomes_of(TASKS[:3], 1, serve, limits=Limits(step_s=LIMIT_S))
    assert [outcome.task for outcome in outcomes] == TASKS[:3]
    assert [type(outcome) for outcome in outcomes] == [Finished, Died, Finished]
    assert outcomes[1].detail == f"it took more than {LIMIT_S} s to compile or to measure"


def test_a_worker_that_waits_for_its_turn_is_not_stuck(tmp_path):
    """The last of four waits for three turns, which take longer than one step may."""
    serve = hooked(take_notes, tmp_path, {"measuring": 0.55})
    outcomes = outcomes_of(TASKS[:4], 4, serve, limits=Limits(step_s=1.5))
    assert [type(outcome) for outcome in outcomes] == [Finished] * 4


def test_workers_that_never_warm_up_are_an_error():
    limits = Limits(step_s=1.0, ending_s=0.5)
    complaint = "4 processes in a row could not measure anything: it took more than 1 s to compile or to measure"
    with (
        WorkerPool(JOB, worker_pool.MAX_USELESS + 1, serve=sleep_for_ever, limits=limits) as pool,
        pytest.raises(NoChildError, match=complaint),
    ):
        collect(pool, [])
    assert not any(is_alive(pid) for pid in pool.pids)


@pytest.mark.parametrize("count", [1, 2])
def test_workers_that_cannot_start_are_an_error(count):
    outcomes = []
    with (
        WorkerPool(JOB, count, serve=die_at_once) as pool,
        pytest.raises(NoChildError, match=r"process ended with exit code 3$"),
    ):
        collect(pool, outcomes)
    assert {type(outcome) for outcome in outcomes} == {Died}
    assert len(outcomes) == worker_pool.MAX_USELESS
    assert not any(is_alive(pid) for pid in pool.pids)


def test_a_device_lost_in_a_few_workers_is_tried_again():
    outcomes = outcomes_of(TASKS, 1, hooked(lose_the_device, {task.shape for task in TASKS if task is not TASKS[2]}))
    assert [outcome.task for outcome in outcomes] == TASKS
    assert [type(outcome) for outcome in outcomes] == [Died, Died, Finished, Died, Died]
    for outcome in outcomes:
        if isinstance(outcome, Died):
            assert outcome.detail == "the device failed in its process (CUDA error: unspecified launch failure)"


def test_a_device_lost_in_worker_after_worker_is_an_error():
    outcomes = []
    serve = hooked(lose_the_device, {task.shape for task in TASKS})
    with WorkerPool(JOB, 1, serve=serve) as pool, pytest.raises(DeviceLostError) as caught:
        collect(pool, outcomes)
    assert [outcome.task for outcome in outcomes] == TASKS[: worker_pool.MAX_LOST - 1]
    assert caught.value.record.shape == TASKS[worker_pool.MAX_LOST - 1].shape


def test_a_lost_device_says_what_happened():
    with pytest.raises(DeviceLostError) as caught:
        outcomes_of(TASKS, 2, hooked(lose_the_device, {task.shape for task in TASKS}))
    assert caught.value.reason == "CUDA error: unspecified launch failure"


def test_a_worker_that_holds_much_memory_makes_room_for_another():
    outcomes = outcomes_of(TASKS[:3], 1, max_worker_bytes=2**20)
    assert [type(outcome) for outcome in outcomes] == [Finished] * 3
    assert len({outcome.record.process for outcome in outcomes}) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_a_repeat_is_of_another_process(count):
    tasks = TASKS[:2] + [Task(task.shape, repeat=True) for task in TASKS[:2]]
    outcomes = outcomes_of(tasks, count)
    processes = {outcome.task: outcome.record.process for outcome in outcomes}
    assert set(processes) == set(tasks)
    assert len(outcomes) == len(tasks)
    for task in TASKS[:2]:
        assert processes[task] != processes[Task(task.shape, repeat=True)]
    for outcome in outcomes:
        assert outcome.record.repeat == outcome.task.repeat


def test_a_repeat_is_of_another_process_though_the_first_one_died(tmp_path):
    queue = TaskQueue([Task(VICTIM), Task(VICTIM, repeat=True)])
    finished = []
    with WorkerPool(JOB, 1, serve=hooked(kill_once, tmp_path, "measuring", VICTIM, signal.SIGKILL)) as pool:
        for outcome in pool.run(queue):
            if isinstance(outcome, Died):
                assert queue.may_try_after_death(outcome.task)
            else:
                finished.append(outcome)
    assert sorted(outcome.task.repeat for outcome in finished) == [False, True]
    assert len({outcome.record.process for outcome in finished}) == 2


HERE_OR_IN_WORKERS = pytest.mark.parametrize(
    "make_pool", [InThisProcess, functools.partial(WorkerPool, count=2, serve=ANY_HOOK)], ids=["here", "in workers"]
)


@HERE_OR_IN_WORKERS
def test_what_is_given_back_is_measured_again(make_pool):
    queue = TaskQueue(TASKS[:3])
    finished = []
    with quick_points(), make_pool(JOB) as pool:
        for outcome in pool.run(queue):
            if outcome.task not in finished:
                assert queue.may_retry(outcome.task)
            finished.append(outcome.task)
    assert sorted(task.shape for task in finished) == sorted(2 * [task.shape for task in TASKS[:3]])


def test_without_workers_the_same_is_measured_here():
    tasks = [*TASKS, Task(VICTIM, repeat=True)]
    with quick_points(), InThisProcess(JOB) as pool:
        outcomes = list(pool.run(TaskQueue(tasks)))
        assert pool.pids == [os.getpid()]
    assert [outcome.task for outcome in outcomes] == tasks
    for outcome in outcomes:
        assert (outcome.record.shape, outcome.record.repeat) == (outcome.task.shape, outcome.task.repeat)
        assert outcome.record.process == os.getpid()
        assert outcome.record.status("tensorwise") == "measured"


@HERE_OR_IN_WORKERS
def test_when_the_time_is_up_nothing_begins(make_pool):
    with make_pool(JOB) as pool:
        assert list(pool.run(TaskQueue(TASKS), until=time.monotonic())) == []


def test_when_the_time_is_up_a_worker_that_hangs_is_not_waited_for(tmp_path):
    with WorkerPool(JOB, 2, serve=hooked(hang_once, tmp_path, "compiling", VICTIM)) as pool:
        pids = pool.pids
        assert len(list(pool.run(TaskQueue(TASKS[2:])))) == len(TASKS[2:])
        assert list(pool.run(TaskQueue([TASKS[1]]), until=time.monotonic() + 0.2)) == []
    assert not any(is_alive(pid) for pid in pids)


def test_ctrl_c_does_not_end_workers():
    with WorkerPool(JOB, 2, serve=ANY_HOOK) as pool:
        before = set(pool.pids)
        outcomes = []
        for outcome in pool.run(TaskQueue(TASKS)):
            if not outcomes:
                os.kill(outcome.record.process, signal.SIGINT)
            outcomes.append(outcome)
        assert set(pool.pids) == before
    assert [type(outcome) for outcome in outcomes] == [Finished] * len(TASKS)


def test_no_worker_outlives_the_sweep_whatever_it_does(tmp_path):
    """One hangs and is not waited for, the others are idle and end by themselves."""
    limits = Limits(ending_s=60.0)
    with WorkerPool(JOB, 3, serve=hooked(hang_once, tmp_path, "compiling", VICTIM), limits=limits) as pool:
        pids = pool.pids
        next(pool.run(TaskQueue(TASKS[:2])))
        assert all(is_alive(pid) for pid in pids)
        leaving_at = time.monotonic()
    assert len(pids) == 3
    assert not any(is_alive(pid) for pid in pids)
    assert time.monotonic() - leaving_at < limits.ending_s


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_a_compiled_point():
    protocols = {
        recipe: replaced(PROTOCOL, compile=True, inductor=RECIPES[recipe].inductor)
        for recipe in ("tensorwise", "rowwise")
    }
    job = replace(JOB, protocols=protocols)
    (outcome,) = outcomes_of([Task(LinearShape(64, 64, 64))], 1, serve_points, job=job)
    record = outcome.record
    assert {arm.status for arm in record.arms.values()} == {"measured"}, record.arms
    for recipe in protocols:
        point = record.point(recipe, protocols[recipe])
        assert point.status in ("measured", "ambiguous")
        assert min(record.arms[recipe].total_us) > 0
        assert point.speedup_low <= point.speedup <= point.speedup_high
    assert record.stages.compiling_s > 0


def test_the_device_is_idle_between_turns():
    use = DeviceUse()
    assert (use.first_turn_at, use.idle_s) == (None, 0.0)
    for begin, end in [(10.0, 12.0), (15.0, 16.0), (16.5, 20.0)]:
        use.begin(begin)
        use.end(end)
    assert (use.first_turn_at, use.idle_s) == (10.0, 3.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
@HERE_OR_IN_WORKERS
def test_a_device_that_cannot_be_used_is_no_fault_of_the_points(make_pool):
    """Its reason is said, and no point has failed."""
    outcomes = []
    with (
        make_pool(replace(JOB, device=torch.device("cuda"))) as pool,
        pytest.raises(NoChildError, match=r"CUDA|NVIDIA|cuda"),
    ):
        outcomes.extend(pool.run(TaskQueue(TASKS)))
    assert outcomes == []


def test_a_device_that_could_not_be_used_once_is_tried_again(tmp_path):
    outcomes = outcomes_of(TASKS, 2, hooked(break_once, tmp_path))
    assert sorted(outcome.task.shape for outcome in outcomes) == sorted(task.shape for task in TASKS)
    assert {type(outcome) for outcome in outcomes} == {Finished}


def test_a_worker_whose_command_has_ended_while_it_started_says_what_is_gone(tmp_path):
    """The lock's file ends with the command. An exception that nobody caught would be on the user's terminal."""
    job = replace(JOB, timing_lock=tmp_path / "gone")
    with WorkerPool(job, 1) as pool, pytest.raises(NoChildError, match=r"No such file or directory.*gone"):
        list(pool.run(TaskQueue(TASKS)))


def test_on_a_gpu_a_worker_that_comes_later_touches_it_only_while_nobody_times(monkeypatch, tmp_path):
    class DismissingChannel:
        def receive(self):
            raise SystemExit

    def make_timer(*_, **__):
        with pytest.raises(BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.append("makes its timer")

    path, log = tmp_path / "timing", []
    path.touch()
    monkeypatch.setattr(Cuda, "load_kernels_under", lambda *_: log.append("loads kernels under the lock"))
    monkeypatch.setattr(Cuda, "make_timer", make_timer)
    monkeypatch.setattr(Cuda, "make_watch", lambda *_: log.append("makes its watch"))
    with pytest.raises(SystemExit):
        serve_points(DismissingChannel(), replace(JOB, device=torch.device("cuda"), timing_lock=path), early=False)
    assert log == ["loads kernels under the lock", "makes its timer", "makes its watch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_point_on_a_gpu_compiled_tuned_captured_and_timed():
    device = torch.device("cuda")
    job = Job(device, make_setup(device).protocols, seed=0, timing_lock=ANY_FILE)
    bench = PointBench(job)
    bench.warm_up()
    record = bench.measure(make_ready(Task(LinearShape(2048, 1024, 512)), job.protocols, device))
    assert {name: (arm.status, arm.detail) for name, arm in record.arms.items()} == dict.fromkeys(
        ("bf16", *RECIPES), ("measured", "")
    )
    assert all(0.1 < record.speedup(recipe, job.protocols[recipe]).estimate < 1 for recipe in RECIPES)
