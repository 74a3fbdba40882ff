"""The processes of a plan: all compile at once, one at a time has the device.

In: a `PlanJob`, sets of roles. Out: answers. Without processes, this one does the same.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING

from fp8gate.calibrate.arms.block import BlockError
from fp8gate.calibrate.device.watch import foreign, make_watch
from fp8gate.calibrate.planning.block_worker import Answer, BlockBench, Failure, PlanJob, Request, serve
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET, RoleSet
from fp8gate.calibrate.processes.forkserver import start_server

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

GOODBYE_S = 5.0  # for a process to end by itself


class BlockWorkerDiedError(RuntimeError):
    """A process died over a set of roles, its second argument: of a crash, or for want of memory."""


class BlockWorkerPool:
    """Whoever has compiled a set loads and visits it. A context that ends the processes.

    count: of processes; 0 for this one alone.
    """

    def __init__(self, job: PlanJob, count: int) -> None:
        self._job, self._count = job, count
        self._alone = BlockBench(job)
        self._watch = make_watch(job.device)
        self._members: list[_Member] = []
        self._homes: dict[RoleSet, _Member] = {}

    def __enter__(self) -> BlockWorkerPool:
        if self._count:
            context = start_server()
            self._members = [_Member.started(context, self._job) for _ in range(self._count)]
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            member.connection.close()
        for member in self._members:
            member.process.join(0 if error else GOODBYE_S)
            member.process.kill()
            member.process.join()

    def compile(self, sets: Sequence[RoleSet]) -> Iterator[tuple[RoleSet, Answer]]:
        """Each as soon as it is compiled. Raises MemberDiedError."""
        if not self._members:
            yield from ((roles, self._alone.answer(("compile", roles))) for roles in sets)
            return
        left = deque(sets)
        idle = sorted(self._members, key=list(self._homes.values()).count)
        if CONTROL_SET in sets:  # a process shares tuned kernels: what bf16 differs from must come from another
            idle.sort(key=lambda member: member is self._homes.get(BF16_SET))
        busy: dict[Connection, tuple[_Member, RoleSet]] = {}
        while left or busy:
            while left and idle:
                member, roles = idle.pop(0), left.popleft()
                self._homes[roles] = member
                member.send(("compile", roles))
                busy[member.connection] = member, roles
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                member, roles = busy.pop(connection)
                idle.append(member)
                yield roles, member.hear(roles)

    def others(self) -> list[str]:
        """Processes on the device that are not this plan's."""
        own = [os.getpid(), *(member.process.pid for member in self._members if member.process.pid)]
        return foreign(self._watch.processes(), own)

    def load(self, roles: RoleSet) -> Answer:
        """Raises MemberDiedError."""
        return self._ask(("load", roles))

    def visit(self, roles: RoleSet) -> Answer:
        """Raises MemberDiedError."""
        return self._ask(("visit", roles))

    def _open(self) -> None:
        """All at once, before anything is measured."""
        try:
            for member in self._members:
                member.send(("open", BF16_SET))
            for member in self._members:
                if isinstance(answer := member.hear(BF16_SET), Failure):
                    raise BlockWorkerDiedError(f"the block cannot be made on the device: {answer.detail}", BF16_SET)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _ask(self, request: Request) -> Answer:
        if not self._members:
            return self._alone.answer(request)
        member = self._homes[request[1]]
        member.send(request)
        return member.hear(request[1])


@dataclass(frozen=True, slots=True)
class _Member:
    process: ForkServerProcess
    connection: Connection

    @classmethod
    def started(cls, context: ForkServerContext, job: PlanJob) -> _Member:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, _pickled(job)), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def send(self, request: Request) -> None:
        with contextlib.suppress(OSError):  # it died; hearing will say so
            self.connection.send(request)

    def hear(self, roles: RoleSet) -> Answer:
        try:
            answer: Answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(GOODBYE_S)
            died = f"its process ended with exit code {self.process.exitcode}"
            raise BlockWorkerDiedError(f"{died}; for want of memory, try fewer --workers", roles) from error
        return answer


def _pickled(job: PlanJob) -> bytes:
    """By value: the way tensors are handed to child processes shares memory and file handles."""
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BlockError(f"block: expected a module that can be pickled, unless workers is 0; {error}") from error
