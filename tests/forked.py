"""Processes that tests start: commands of fp8gate whose points take milliseconds, scripts, and what is done to them.

They are forked from fp8gate's fork server, which has imported torch already, so that they start at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from samples import NEVER_NOISE, journal_points, quick_points

from fp8gate.calibrate.device import cpu
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.points import setup
from fp8gate.calibrate.points.point_worker import Job, PointBench, serve_points
from fp8gate.calibrate.points.worker_pool import WorkerPool
from fp8gate.calibrate.processes.channel import Channel
from fp8gate.calibrate.processes.forkserver import start_server
from fp8gate.calibrate.sweep import session
from fp8gate.cli import app
from fp8gate.filter.contract.table import Table, read_table

SHAPES = [(32, k, n) for k in (32, 48) for n in (32, 64)]
MAX_WAIT_S = 120.0  # for anything: it only takes so long where it fails


def sweep_arguments(folder: Path) -> list[str]:
    """The command line of a sweep of SHAPES whose tables and journal are in `folder` / "out"."""
    grid = folder / "grid.yaml"
    grid.write_text("m: [32]\nk: [32, 48]\nn: [32, 64]\n")
    return ["calibrate", "--device", "cpu", "--grid", str(grid), "--recipes", "rowwise", "--out", str(folder / "out")]


def table_in(folder: Path) -> Table:
    (path,) = folder.rglob("rowwise.yaml")
    return read_table(path)


def points_in_table(folder: Path) -> list[tuple[int, int, int]]:
    return [(point.m, point.k, point.n) for point in table_in(folder).points]


def wait_until(condition: Callable[[], object], *processes: Process) -> None:
    """processes: those that bring it about; fail if one ends before."""
    give_up_at = time.monotonic() + MAX_WAIT_S
    while not condition():
        for process in processes:
            assert process.is_alive, process.said
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def wait_for_points(folder: Path, count: int, *processes: Process) -> None:
    wait_until(lambda: len(journal_points(folder)) >= count, *processes)


class Processes:
    """All that a test has started. Their files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []

    def start(self, call: Callable[[], None], **environment: object) -> Process:
        """call: what the process does. It is pickled."""
        process = Process(self.folder / f"said {len(self.started)}")
        process.start(call, {name: str(value) for name, value in environment.items()})
        self.started.append(process)
        return process

    def start_command(
        self, *arguments: str, change: Callable[[], None] | None = None, **environment: object
    ) -> Process:
        """A command of fp8gate. change: called in its process before it; pickled."""
        return self.start(functools.partial(run_command, arguments, change), **environment)

    def kill(self) -> None:
        for process in self.started:
            process.kill()


class Process:
    """One process, and the file that it writes its output to."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def start(self, call: Callable[[], None], environment: Mapping[str, str]) -> None:
        self.process = start_server().Process(target=_run, args=(self.output, environment, call))
        self.process.start()

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def exit_code(self) -> int:
        """Once it has ended."""
        self.process.join(MAX_WAIT_S)
        assert self.process.exitcode is not None, self.said
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def press_ctrl_c(self) -> None:
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGINT)


def free_port() -> int:
    """For the store of torch.distributed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environments(world: int) -> list[dict[str, object]]:
    """What torchrun sets for each of the processes of one machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]


# In the processes.


def _run(output: Path, environment: Mapping[str, str], call: Callable[[], None]) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the fork server does not hear of Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    call()


def run_command(arguments: tuple[str, ...], change: Callable[[], None] | None) -> None:
    prepare()
    if change:
        change()
    app(arguments)


def run_script(path: Path, *arguments: object) -> None:
    """As `python path arguments` does."""
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def prepare() -> None:
    """Points take milliseconds, no control is off, and none is noise."""
    torch.set_num_threads(1)
    cpu.FLUSH_BYTES = 2**16
    Cpu.defaults = dataclasses.replace(Cpu.defaults, control=9.0, noise=NEVER_NOISE)
    setup.POINT_SETTLE_S, setup.POINT_RUN_S, setup.NEAR_S = 0.0, 0.0, 0.001
    session.WorkerPool = functools.partial(WorkerPool, serve=serve_quick_points)  # type: ignore[misc]


def serve_quick_points(channel: Channel, job: Job, *, early: bool) -> None:
    """A worker whose points take milliseconds."""
    with quick_points():
        serve_points(channel, job, early=early)


def before_call(owner: Any, name: str, number: int, act: Callable[[], object]) -> None:
    """Do this before the method is called for this time, counted from 1."""
    method, numbers = getattr(owner, name), itertools.count(1)

    def acted(*args: Any) -> Any:
        if next(numbers) == number:
            act()
        return method(*args)

    setattr(owner, name, acted)


class Gate:
    """A process waits at the gate, before a method is called for this time, until the test opens it or ends it.

    Call the gate in that process. By default it is before the process itself measures its point of that number.
    """

    def __init__(self, file: Path, number: int, owner: Any = PointBench, name: str = "measure") -> None:
        self.file, self.number, self.owner, self.name = file, number, owner, name

    def __call__(self) -> None:
        before_call(self.owner, self.name, self.number, self._wait)

    def _wait(self) -> None:
        self._reached.touch()
        wait_until(self.file.exists)

    @property
    def _reached(self) -> Path:
        return self.file.with_suffix(".reached")

    def wait_for(self, process: Process) -> None:
        """Until the process is at the gate."""
        wait_until(self._reached.exists, process)

    def open(self) -> None:
        self.file.touch()
