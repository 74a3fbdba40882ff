"""Worker processes: each point has one outcome, whatever becomes of them, and one at a time has the device.

The workers are real, on the CPU. `hooked` is the worker's function with a hook called at each of its steps, there.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import queue
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samples import PROTOCOL, point_record, quick_points, replaced

from fp8gate.calibrate.device import timer
from fp8gate.calibrate.points import point_worker, worker_pool
from fp8gate.calibrate.points.measure_point import DeviceLostError, make_ready
from fp8gate.calibrate.points.point_worker import Job, PointBench, Ready
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.points.worker_pool import DeviceUse, Died, Finished, InThisProcess, WorkerPool, WorkersDiedError
from fp8gate.calibrate.sweep.run_sweep import make_setup
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
PROTOCOLS = {"tensorwise": replaced(PROTOCOL, rounds=(8,))}
QUIET = Path(__file__)  # any file will do
JOB = Job(CPU, PROTOCOLS, seed=0, quiet=QUIET)
TASKS = [Task(LinearShape(32, 32, n)) for n in (16, 32, 48, 64, 80)]
VICTIM = TASKS[1].shape
GIB = 2**30


def hooked(hook, connection, job, *, early):
    """A worker that calls `hook(step, shape)` at each step, and whose points take milliseconds."""
    torch.set_num_threads(1)
    timer.CPU_FLUSH_BYTES = 2**16
    make_ready, measure, warm_up = point_worker.make_ready, PointBench.measure, PointBench.warm_up
    shape = None

    def hooked_warm_up(bench):
        hook("warming", None)
        warm_up(bench)

    def hooked_make_ready(task, *rest):
        nonlocal shape
        shape = task.shape
        hook("compiling", shape)
        return make_ready(task, *rest)

    def hooked_measure(bench, point):
        hook("measuring", shape)
        record = measure(bench, point)
        hook("measured", shape)
        return record

    class HookedConnection:
        recv = connection.recv

        def send(self, message):
            connection.send(message)
            if isinstance(message, Ready):
                hook("ready", shape)

    point_worker.make_ready, PointBench.measure, PointBench.warm_up = hooked_make_ready, hooked_measure, hooked_warm_up
    point_worker.work(HookedConnection(), job, early=early)


@pytest.fixture(autouse=True)
def hook_into(monkeypatch):
    """Lets workers that start from now on call this function; by default none."""

    def set_hook(function, *args):
        monkeypatch.setattr(worker_pool, "work", functools.partial(hooked, functools.partial(function, *args)))

    set_hook(no_hook)
    return set_hook


def no_hook(step, shape):
    pass


def kill_once(folder, at, number, step, shape):
    """Send this signal to the process that is the first to take this step with the victim's shape."""
    if (step, shape) == (at, VICTIM) and first_time(folder, "killed"):
        os.kill(os.getpid(), number)
        time.sleep(60)
    if step == "measuring":
        time.sleep(0.1)  # so that others wait for their turn


def hang_once(folder, at, step, shape):
    if (step, shape) == (at, VICTIM) and first_time(folder, "hung"):
        time.sleep(60)


def exit_at(shapes, code, step, shape):
    if step == "compiling" and shape in shapes:
        os._exit(code)


def lose_the_device(shapes, step, shape):
    if step == "measuring" and shape in shapes:
        record = point_record((shape.m, shape.k, shape.n))
        raise DeviceLostError(record) from RuntimeError("CUDA error: unspecified launch failure")


def note(folder, seconds, step, shape):
    """Write each step down, and take so long for it; seconds: of each step, or of each shape's."""
    if shape is None:
        return
    with open(folder / str(os.getpid()), "a") as file:
        file.write(f"{step} {shape.n} {time.monotonic()}\n")
    own = seconds.get(step, 0.0)
    time.sleep(own.get(shape.n, 0.0) if isinstance(own, dict) else own)


def die_at_once(connection, job, *, early):
    os._exit(3)


def warm_slowly(folder, step, shape):
    """The first worker takes long to start its libraries; everybody's turns are written down."""
    if step == "warming" and first_time(folder, "slow"):
        time.sleep(1.0)
        (folder / "warm").write_text(str(time.monotonic()))
    if step == "measuring":
        with open(folder / "turns", "a") as file:
            file.write(f"{time.monotonic()}\n")


def fail_to_warm(folder, step, shape):
    if step == "warming" and first_time(folder, "failed"):
        raise point_worker.BrokenError("CUDA error: initialization error")


def first_time(folder, name):
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


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


def outcomes_of(tasks, count, job=JOB):
    with WorkerPool(job, count) as crew:
        return list(crew.run(TaskQueue(tasks)))


def collect(crew, outcomes):
    """The outcomes of all tasks, up to an error."""
    for outcome in crew.run(TaskQueue(TASKS)):
        outcomes.append(outcome)


def is_alive(pid):
    """Zombies are not: whoever started them will hear of their end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


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
    with WorkerPool(JOB, 2) as crew:
        pids = crew.pids
        assert all(is_alive(pid) for pid in pids)
        assert list(crew.run(TaskQueue([]))) == []
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_control_and_every_recipe_are_measured():
    recipes = {"tensorwise": PROTOCOLS["tensorwise"], "rowwise": PROTOCOLS["tensorwise"]}
    (outcome,) = outcomes_of([Task(VICTIM, control=True)], 1, replace(JOB, protocols=recipes))
    assert set(outcome.record.arms) == {"bf16", "bf16_again", "tensorwise", "rowwise"}
    assert {arm.status for arm in outcome.record.arms.values()} == {"measured"}


def test_only_one_at_a_time_has_the_device_while_others_compile(hook_into, tmp_path):
    hook_into(note, tmp_path, {"compiling": 0.1, "measuring": 0.1})
    outcomes_of(TASKS, 3)
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


def test_nobody_measures_while_another_starts_its_libraries(hook_into, tmp_path):
    hook_into(warm_slowly, tmp_path)
    outcomes_of(TASKS, 3)
    turns = [float(line) for line in (tmp_path / "turns").read_text().split()]
    assert len(turns) == len(TASKS)
    assert min(turns) > float((tmp_path / "warm").read_text())


def test_who_cannot_start_them_is_replaced_and_not_waited_for(hook_into, tmp_path):
    hook_into(fail_to_warm, tmp_path)
    assert {type(outcome) for outcome in outcomes_of(TASKS, 2)} == {Finished}


def test_who_waits_longest_has_the_next_turn(hook_into, tmp_path):
    hook_into(note, tmp_path, {"compiling": {48: 0.2, 32: 0.5}, "measuring": {16: 0.8}})
    outcomes_of(TASKS[:3], 3)
    assert [turn.n for turn in steps_in(tmp_path, "measuring")] == [16, 48, 32]


@pytest.mark.parametrize("step", ["compiling", "ready", "measuring"])
def test_a_killed_worker_is_replaced_and_its_task_comes_back(hook_into, tmp_path, step):
    hook_into(kill_once, tmp_path, step, signal.SIGKILL)
    schedule = TaskQueue(TASKS)
    died, finished = [], []
    with WorkerPool(JOB, 2) as crew:
        before = set(crew.pids)
        for outcome in crew.run(schedule):
            if isinstance(outcome, Died):
                died.append(outcome)
                assert schedule.may_try_after_death(outcome.task)
                assert len(before & set(crew.pids)) == 1
                assert all(is_alive(pid) for pid in crew.pids)
            else:
                finished.append(outcome.task)
        assert len(crew.pids) == 2
    assert died == [Died(TASKS[1], "its process was killed by signal 9 (out of memory?)")]
    assert sorted(task.shape for task in finished) == [task.shape for task in TASKS]


def test_a_task_that_is_not_given_back_stays_lost(hook_into, tmp_path):
    hook_into(kill_once, tmp_path, "measuring", signal.SIGSEGV)
    outcomes = outcomes_of(TASKS, 2)
    (died,) = (outcome for outcome in outcomes if isinstance(outcome, Died))
    assert died == Died(TASKS[1], "its process was killed by signal 11")
    assert len([outcome for outcome in outcomes if isinstance(outcome, Finished)]) == len(TASKS) - 1


def test_points_that_end_their_process_do_not_end_the_sweep(hook_into):
    good, bad = TASKS[::2], [TASKS[1], TASKS[3]]
    hook_into(exit_at, {task.shape for task in bad}, 3)
    outcomes = outcomes_of([good[0], *bad, *bad, good[1], *bad, good[2]], 1)
    assert [outcome.task for outcome in outcomes if isinstance(outcome, Finished)] == good
    died = [outcome for outcome in outcomes if isinstance(outcome, Died)]
    assert died == [Died(task, "its process ended with exit code 3") for task in 3 * bad]
    assert len(2 * bad) > worker_pool.MAX_STILLBORN


@pytest.mark.parametrize("step", ["compiling", "measuring"])
def test_a_step_that_takes_too_long_is_ended(hook_into, monkeypatch, tmp_path, step):
    hook_into(hang_once, tmp_path, step)
    monkeypatch.setattr(worker_pool, "POLL_S", 0.05)
    with WorkerPool(JOB, 1) as crew:
        outcomes = []
        for outcome in crew.run(TaskQueue(TASKS[:3])):
            is_next = outcome.task == TASKS[0]
            monkeypatch.setattr(worker_pool, "MAX_STEP_S", 0.5 if is_next else 60.0)  # a fresh worker may take longer
            outcomes.append(outcome)
    assert [outcome.task for outcome in outcomes] == TASKS[:3]
    assert [type(outcome) for outcome in outcomes] == [Finished, Died, Finished]


def test_whose_step_took_too_long_is_not_said_to_lack_memory(hook_into, monkeypatch, tmp_path):
    hook_into(hang_once, tmp_path, "compiling")
    monkeypatch.setattr(worker_pool, "POLL_S", 0.05)
    monkeypatch.setattr(worker_pool, "MAX_STEP_S", 0.5)
    (died,) = outcomes_of([TASKS[1]], 1)
    assert died.task == TASKS[1]
    assert "out of memory" not in died.detail


def test_who_waits_for_its_turn_is_not_stuck(hook_into, monkeypatch, tmp_path):
    hook_into(note, tmp_path, {"measuring": 0.5})
    monkeypatch.setattr(worker_pool, "POLL_S", 0.05)
    with WorkerPool(JOB, 3) as crew:
        outcomes = []
        for outcome in crew.run(TaskQueue(TASKS[:3])):
            monkeypatch.setattr(
                worker_pool, "MAX_STEP_S", 1.0
            )  # less than the start and two turns that the last one waits for
            outcomes.append(outcome)
    assert [type(outcome) for outcome in outcomes] == [Finished] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_workers_that_cannot_start_are_an_error(monkeypatch, count):
    monkeypatch.setattr(worker_pool, "work", die_at_once)
    outcomes = []
    with WorkerPool(JOB, count) as crew, pytest.raises(WorkersDiedError, match=r"process ended with exit code 3$"):
        collect(crew, outcomes)
    assert {type(outcome) for outcome in outcomes} == {Died}
    assert len(outcomes) == worker_pool.MAX_STILLBORN
    assert not any(is_alive(pid) for pid in crew.pids)


def test_a_device_lost_in_a_few_workers_is_tried_again(hook_into):
    hook_into(lose_the_device, {task.shape for task in TASKS if task is not TASKS[2]})
    outcomes = outcomes_of(TASKS, 1)
    assert [outcome.task for outcome in outcomes] == TASKS
    assert [type(outcome) for outcome in outcomes] == [Died, Died, Finished, Died, Died]
    for outcome in outcomes:
        if isinstance(outcome, Died):
            assert outcome.detail == "the device failed in its process (CUDA error: unspecified launch failure)"


def test_a_device_lost_in_worker_after_worker_is_an_error(hook_into):
    hook_into(lose_the_device, {task.shape for task in TASKS})
    outcomes = []
    with WorkerPool(JOB, 1) as crew, pytest.raises(DeviceLostError) as caught:
        collect(crew, outcomes)
    assert [outcome.task for outcome in outcomes] == TASKS[: worker_pool.MAX_LOST - 1]
    assert caught.value.args[0].shape == TASKS[worker_pool.MAX_LOST - 1].shape


def test_a_lost_device_says_what_happened(hook_into):
    hook_into(lose_the_device, {task.shape for task in TASKS})
    with pytest.raises(DeviceLostError) as caught:
        outcomes_of(TASKS, 2)
    assert "unspecified launch failure" in str(caught.value.__cause__)


def test_a_worker_that_holds_much_memory_makes_room_for_another(monkeypatch):
    monkeypatch.setattr(worker_pool, "MAX_WORKER_BYTES", 2**20)
    outcomes = outcomes_of(TASKS[:3], 1)
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


def test_a_repeat_is_of_another_process_though_the_first_one_died(hook_into, tmp_path):
    hook_into(kill_once, tmp_path, "measuring", signal.SIGKILL)
    schedule = TaskQueue([Task(VICTIM), Task(VICTIM, repeat=True)])
    finished = []
    with WorkerPool(JOB, 1) as crew:
        for outcome in crew.run(schedule):
            if isinstance(outcome, Died):
                assert schedule.may_try_after_death(outcome.task)
            else:
                finished.append(outcome)
    assert sorted(outcome.task.repeat for outcome in finished) == [False, True]
    assert len({outcome.record.process for outcome in finished}) == 2


@pytest.mark.parametrize("make_crew", [functools.partial(WorkerPool, count=2), InThisProcess])
def test_what_is_given_back_is_measured_again(make_crew):
    schedule = TaskQueue(TASKS[:3])
    finished = []
    with quick_points(), make_crew(JOB) as crew:
        for outcome in crew.run(schedule):
            if outcome.task not in finished:
                assert schedule.may_retry(outcome.task)
            finished.append(outcome.task)
    assert sorted(task.shape for task in finished) == sorted(2 * [task.shape for task in TASKS[:3]])


def test_without_workers_the_same_is_measured_here():
    tasks = [*TASKS, Task(VICTIM, repeat=True)]
    with quick_points(), InThisProcess(JOB) as crew:
        outcomes = list(crew.run(TaskQueue(tasks)))
        assert crew.pids == [os.getpid()]
    assert [outcome.task for outcome in outcomes] == tasks
    for outcome in outcomes:
        assert (outcome.record.shape, outcome.record.repeat) == (outcome.task.shape, outcome.task.repeat)
        assert outcome.record.process == os.getpid()
        assert outcome.record.status("tensorwise") == "measured"


def test_ctrl_c_does_not_end_workers():
    with WorkerPool(JOB, 2) as crew:
        before = set(crew.pids)
        outcomes = []
        for outcome in crew.run(TaskQueue(TASKS)):
            if not outcomes:
                os.kill(outcome.record.process, signal.SIGINT)
            outcomes.append(outcome)
        assert set(crew.pids) == before
    assert [type(outcome) for outcome in outcomes] == [Finished] * len(TASKS)


def test_no_worker_outlives_the_sweep_whatever_it_does(hook_into, tmp_path):
    hook_into(hang_once, tmp_path, "compiling")
    with WorkerPool(JOB, 3) as crew:
        pids = crew.pids
        next(crew.run(TaskQueue(TASKS[:2])))  # one now hangs, the others are idle
        assert all(is_alive(pid) for pid in pids)
        leaving_at = time.monotonic()
    assert len(pids) == 3
    assert not any(is_alive(pid) for pid in pids)
    assert time.monotonic() - leaving_at < worker_pool.GOODBYE_S


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_a_compiled_point(monkeypatch):
    monkeypatch.setattr(worker_pool, "work", point_worker.work)
    protocols = {
        recipe: replaced(PROTOCOL, compile=True, inductor=RECIPES[recipe].inductor)
        for recipe in ("tensorwise", "rowwise")
    }
    (outcome,) = outcomes_of([Task(LinearShape(64, 64, 64))], 1, replace(JOB, protocols=protocols))
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
@pytest.mark.parametrize("crew", [InThisProcess, lambda job: WorkerPool(job, 2)], ids=["here", "workers"])
def test_a_device_that_cannot_be_used_is_no_fault_of_the_points(crew):
    """Its reason is said, and no point has failed."""
    job = replace(JOB, device=torch.device("cuda"))
    schedule, outcomes = TaskQueue(TASKS), []
    with crew(job) as measuring, pytest.raises(WorkersDiedError, match=r"CUDA|NVIDIA|cuda"):
        outcomes.extend(measuring.run(schedule))
    assert outcomes == []


def break_once(folder, step, shape):
    if step == "measuring" and first_time(folder, "broken"):
        raise point_worker.BrokenError("NVMLError: Unknown Error")


def test_a_device_that_could_not_be_used_once_is_tried_again(hook_into, tmp_path):
    hook_into(break_once, tmp_path)
    with WorkerPool(JOB, 2) as crew:
        outcomes = list(crew.run(TaskQueue(TASKS)))
    assert sorted(outcome.task.shape for outcome in outcomes) == sorted(task.shape for task in TASKS)
    assert {type(outcome) for outcome in outcomes} == {Finished}


def test_on_a_gpu_a_worker_that_comes_later_touches_it_only_where_nobody_times(monkeypatch, tmp_path):
    def opens(bench):
        with pytest.raises(BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.append("opens")

    path, log, nothing_more = tmp_path / "quiet", [], queue.SimpleQueue()
    path.touch()
    nothing_more.put(None)
    monkeypatch.setattr(point_worker, "listen", lambda connection: nothing_more)
    monkeypatch.setattr(point_worker, "load_kernels_in", lambda quiet: log.append("loads there"))
    monkeypatch.setattr(point_worker, "signal", SimpleNamespace(signal=lambda *_: None, SIGINT=0, SIG_IGN=0))
    monkeypatch.setattr(point_worker, "gc", SimpleNamespace(freeze=lambda: None))
    monkeypatch.setattr(PointBench, "_open", opens)
    point_worker.work(None, replace(JOB, device=torch.device("cuda"), quiet=path), early=False)
    assert log == ["loads there", "opens"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_point_on_a_gpu_compiled_tuned_captured_and_timed():
    device = torch.device("cuda")
    job = Job(device, make_setup(device).protocols, seed=0, quiet=QUIET)
    bench = PointBench(job)
    bench.warm_up()
    record = bench.measure(make_ready(Task(LinearShape(2048, 1024, 512)), job.protocols, device))
    assert {name: (arm.status, arm.detail) for name, arm in record.arms.items()} == dict.fromkeys(
        ("bf16", *RECIPES), ("measured", "")
    )
    assert all(0.1 < record.speedup(recipe, job.protocols[recipe]).estimate < 1 for recipe in RECIPES)
