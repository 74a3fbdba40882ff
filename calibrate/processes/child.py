"""A child process, as its parent sees it: started, spoken to, waited for within limits, and ended.

In: a function that serves a `Channel`, a job. Out: the child's messages, or a `ChildDiedError` that says how it died.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fp8gate.calibrate.processes.channel import Channel, run_child
from fp8gate.calibrate.processes.forkserver import kill_server, start_server
from fp8gate.calibrate.processes.limits import Limits, ended_after
from fp8gate.filter.contract.errors import InputError, UnfinishedError

Serve = Callable[[Channel, Any], None]


class ChildDiedError(UnfinishedError):
    """A child has ended before it answered; the message says how."""


class NoChildError(UnfinishedError):
    """No child can be started."""


class Child:
    """One child process. It is busy from its start, or a message to it, until it sends one."""

    def __init__(self, serve: Serve, job: object, limits: Limits, *, starts_busy: bool) -> None:
        """starts_busy: it will send a message before it is spoken to.

        Raises InputError for a job that cannot be pickled, NoChildError if no process can be started.
        """
        self._limits = limits
        self._is_stuck = False
        pickled = _pickled(job)
        context = start_server()
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=run_child, args=(theirs, serve, pickled), daemon=True)
        try:
            with ended_after(limits.start_s, kill_server) as is_late:
                self.process.start()
        except (EOFError, ConnectionError) as error:
            self._connection.close()
            how = f"took more than {limits.start_s:.0f} s" if is_late.is_set() else "died; is there enough memory?"
            raise NoChildError(f"the process that starts workers {how}") from error
        finally:
            theirs.close()
        self.busy_since: float | None = time.monotonic() if starts_busy else None

    @property
    def pid(self) -> int:
        assert self.process.pid, "it was started"
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def expect_more(self) -> None:
        """It has one more message to answer, sent before its last answer came."""
        self.busy_since = time.monotonic()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.busy_since = time.monotonic()

    def send(self, message: object) -> None:
        """Give it a message to work on. If it has died, `receive` will say so."""
        self.busy_since = time.monotonic()
        with contextlib.suppress(OSError), ended_after(self._limits.step_s, self._end_as_stuck):
            self._connection.send(message)

    def receive(self) -> Any:
        """The message that `wait_for` found. Raises ChildDiedError if it has ended instead."""
        if self._is_stuck:
            raise ChildDiedError(self._how_it_died())
        try:
            with ended_after(self._limits.step_s, self._end_as_stuck):
                message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ChildDiedError(self._how_it_died()) from error
        self.busy_since = None
        return message

    def dismiss(self) -> None:
        """Let it end: at once if it is busy, else when it has tidied up."""
        if self.busy_since is None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
        else:
            self.process.kill()

    def end(self, until: float | None = None) -> None:
        """Make sure that it is gone, once it was dismissed.

        until: of `time.monotonic`, when it has had long enough to end by itself; None for the limit from now on.
        """
        until = time.monotonic() + self._limits.ending_s if until is None else until
        self.process.join(0 if self.busy_since is not None else max(0.0, until - time.monotonic()))
        self.process.kill()
        self.process.join(self._limits.ending_s)
        self._connection.close()

    def _find_stuck(self, now: float) -> bool:
        """Whether its step takes too long; then it is killed, and `receive` says so."""
        if self.busy_since is not None and now >= self.busy_since + self._limits.step_s:
            self._end_as_stuck()
        return self._is_stuck

    def _end_as_stuck(self) -> None:
        self._is_stuck = True
        self.process.kill()

    def _how_it_died(self) -> str:
        if self._is_stuck:
            return f"it took more than {self._limits.step_s:.0f} s to compile or to measure"
        self.process.join(self._limits.ending_s)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"its process ended with exit code {code}"


def wait_for(children: Sequence[Child], until: float = math.inf) -> list[Child]:
    """The children that have sent a message, ended or are stuck, as soon as there are any; none if `until` comes first.

    until: of `time.monotonic`. At least one child must be busy.
    """
    assert any(child.busy_since is not None for child in children), "somebody must have something to answer"
    by_connection = {child._connection: child for child in children}
    while True:
        stuck_at = [child.busy_since + child._limits.step_s for child in children if child.busy_since is not None]
        ready = wait(list(by_connection), max(0.0, min(until, *stuck_at) - time.monotonic()))
        heard = [by_connection[connection] for connection in ready if isinstance(connection, Connection)]
        now = time.monotonic()  # an answer that came in time counts, however late it is read
        heard += [child for child in children if child not in heard and child._find_stuck(now)]
        if heard or now >= until:
            return heard


def end_all(children: Sequence[Child]) -> None:
    """End them together, within the limit of one."""
    for child in children:
        child.dismiss()
    until = time.monotonic() + max((child._limits.ending_s for child in children), default=0.0)
    for child in children:
        child.end(until)


def _pickled(job: object) -> bytes:
    """By value: multiprocessing would share the memory of tensors, and their file handles, with the child."""
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"expected what can be pickled, unless workers is 0; {error}") from error
