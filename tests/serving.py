"""What the child processes of tests run. Without pytest, whose import would take each of them half a second.

`serve_hooked_points` and `serve_hooked_block` are what real workers run, with a hook that is called at each step; most
of the other functions are such hooks. A hook keeps in its folder what has happened, for all processes to see.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from samples import point_record

from fp8gate.calibrate.planning.block_worker import BlockBench, PlanJob, serve_block
from fp8gate.calibrate.planning.search import RoleSet
from fp8gate.calibrate.points import point_worker
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.point_worker import BrokenError, Job, PointBench, Ready, serve_points
from fp8gate.calibrate.processes.channel import Channel
from fp8gate.filter.contract.shapes import LinearShape

FOR_EVER_S = 3600.0
Hook = Callable[[str, LinearShape | None], None]


def serve_orders(channel: Channel, job: object) -> None:
    """Do what each message says, then answer with it and the job."""
    while True:
        order, *details = channel.receive()
        if order == "sleep":
            time.sleep(*details)
        elif order == "exit":
            os._exit(*details)
        elif order == "signal":
            os.kill(os.getpid(), *details)
            time.sleep(FOR_EVER_S)
        channel.send((order, job))


def sleep_for_ever(channel: Channel, job: object, **_: object) -> None:
    time.sleep(FOR_EVER_S)


def die_at_once(channel: Channel, job: object, *, early: bool) -> None:
    os._exit(3)


# --- a sweep's workers -----------------------------------------------------------------------------------------


def serve_hooked_points(hook: Hook, channel: Channel, job: Job, *, early: bool) -> None:
    """A sweep's worker that calls `hook(step, shape)` at each step: warming, compiling, ready, measuring, measured."""
    torch.set_num_threads(1)
    make_ready, measure, warm_up, send = point_worker.make_ready, PointBench.measure, PointBench.warm_up, channel.send
    shape: LinearShape | None = None

    def hooked_warm_up(bench: PointBench) -> None:
        hook("warming", None)
        warm_up(bench)

    def hooked_make_ready(task: Any, *rest: Any) -> Any:
        nonlocal shape
        shape = task.shape
        hook("compiling", shape)
        return make_ready(task, *rest)

    def hooked_measure(bench: PointBench, point: Any) -> Any:
        hook("measuring", shape)
        record = measure(bench, point)
        hook("measured", shape)
        return record

    def hooked_send(message: object) -> None:
        send(message)
        if isinstance(message, Ready):
            hook("ready", shape)

    point_worker.make_ready, PointBench.measure, PointBench.warm_up = hooked_make_ready, hooked_measure, hooked_warm_up
    channel.send = hooked_send
    serve_points(channel, job, early=early)


def hooked(hook: Callable[..., None], *args: object) -> Callable[..., None]:
    """For WorkerPool's `serve`: workers that call `hook(*args, step, shape)`."""
    return functools.partial(serve_hooked_points, functools.partial(hook, *args))


def no_hook(step: str, shape: LinearShape | None) -> None:
    pass


def first_time(folder: Path, name: str) -> bool:
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def kill_once(folder: Path, at: str, victim: LinearShape, number: int, step: str, shape: LinearShape | None) -> None:
    """Send this signal to the process that is the first to take this step with the victim's shape."""
    if (step, shape) == (at, victim) and first_time(folder, "killed"):
        os.kill(os.getpid(), number)
        time.sleep(FOR_EVER_S)
    if step == "measuring":
        time.sleep(0.05)  # so that others wait for their turn


def hang_once(folder: Path, at: str, victim: LinearShape, step: str, shape: LinearShape | None) -> None:
    if (step, shape) == (at, victim) and first_time(folder, "hung"):
        time.sleep(FOR_EVER_S)


def exit_at(shapes: set[LinearShape], code: int, step: str, shape: LinearShape | None) -> None:
    if step == "compiling" and shape in shapes:
        os._exit(code)


def lose_the_device(shapes: set[LinearShape], step: str, shape: LinearShape | None) -> None:
    if step == "measuring" and shape and shape in shapes:
        raise DeviceLostError(point_record((shape.m, shape.k, shape.n)), "CUDA error: unspecified launch failure")


def break_once(folder: Path, step: str, shape: LinearShape | None) -> None:
    if step == "measuring" and first_time(folder, "broken"):
        raise BrokenError("NVMLError: Unknown Error")


def fail_to_warm(folder: Path, step: str, shape: LinearShape | None) -> None:
    """The first worker cannot start the device's libraries."""
    if step == "warming" and first_time(folder, "failed"):
        raise BrokenError("CUDA error: initialization error")


def warm_slowly(folder: Path, step: str, shape: LinearShape | None) -> None:
    """The first worker takes long to start the device's libraries; every turn is written down."""
    if step == "warming" and first_time(folder, "slow"):
        time.sleep(0.5)
        (folder / "warm").write_text(str(time.monotonic()))
    if step == "measuring":
        with open(folder / "turns", "a") as file:
            file.write(f"{time.monotonic()}\n")


def take_notes(folder: Path, seconds: dict[str, float], step: str, shape: LinearShape | None) -> None:
    """Write each step down, and take so many seconds for it."""
    if shape is None:
        return
    with open(folder / str(os.getpid()), "a") as file:
        file.write(f"{step} {shape.n} {time.monotonic()}\n")
    time.sleep(seconds.get(step, 0.0))


def wait_in_order(folder: Path, order: list[int], step: str, shape: LinearShape | None) -> None:
    """Points are ready in the order of their n, while the first one is measured. Every turn is written down."""
    if shape is None:
        return
    at = order.index(shape.n)
    if step == "compiling" and at > 0:
        wait_for_file(folder / f"measuring {order[0]}")
        if at > 1:
            wait_for_file(folder / f"ready {order[at - 1]}")
            time.sleep(0.2)  # the pool hears of one after the other
    if step == "measuring":
        with open(folder / "turns", "a") as file:
            file.write(f"{shape.n}\n")
    (folder / f"{step} {shape.n}").touch()
    if step == "measuring" and at == 0:
        wait_for_file(folder / f"ready {order[-1]}")
        time.sleep(0.2)


# --- a plan's workers ------------------------------------------------------------------------------------------


def serve_hooked_block(hook: Callable[[str, RoleSet], None], channel: Channel, job: PlanJob) -> None:
    """A plan's worker that calls `hook(what, roles)` before it answers each request."""
    torch.set_num_threads(1)
    answer = BlockBench.answer

    def hooked_answer(bench: BlockBench, request: Any) -> Any:
        hook(*request)
        return answer(bench, request)

    BlockBench.answer = hooked_answer
    serve_block(channel, job)


def hooked_block(hook: Callable[..., None], *args: object) -> Callable[..., None]:
    """For BlockWorkerPool's `serve`: workers that call `hook(*args, what, roles)`."""
    return functools.partial(serve_hooked_block, functools.partial(hook, *args))


def note_requests(folder: Path, what: str, roles: RoleSet) -> None:
    """Each process notes what it is asked, in a file of its number."""
    with open(folder / str(os.getpid()), "a") as file:
        file.write(f"{what} {' '.join(sorted(roles))}\n")


def hang_at(folder: Path, at: str, victim: RoleSet, what: str, roles: RoleSet) -> None:
    note_requests(folder, what, roles)
    if (what, roles) == (at, victim):
        time.sleep(FOR_EVER_S)


def die_at(folder: Path, at: str, victim: RoleSet, what: str, roles: RoleSet) -> None:
    note_requests(folder, what, roles)
    if (what, roles) == (at, victim):
        os.kill(os.getpid(), signal.SIGKILL)
