"""The processes of a plan: all compile at once, one at a time has the device.

In: a `PlanJob`, sets of roles. Out: answers. Without processes, this one does the same.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.watch import other_processes
from fp8gate.calibrate.planning.block_worker import Answer, BlockBench, PlanJob, Request, serve_block
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET, RoleSet
from fp8gate.calibrate.processes.child import Child, ChildDiedError, Serve, end_all, wait_for
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.calibrate.processes.messages import Broken
from fp8gate.filter.contract.errors import UnfinishedError


class StoppedError(UnfinishedError):
    """Not all was measured, and what was is in the journal."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; run the same command to go on")


class BlockWorkerDiedError(StoppedError):
    """A process died over a set of roles."""

    def __init__(self, reason: str, roles: RoleSet) -> None:
        super().__init__(f"{reason}; try fewer --workers" if "memory" in reason else reason)
        self.reason, self.roles = reason, roles


class BlockWorkerPool:
    """The process that has compiled a set also loads and visits it. A context that ends the processes.

    count: of processes; 0 for this one alone. until: of `time.monotonic`, when every wait ends with a StoppedError.
    serve: what the processes run. limits: of each of their steps.
    """

    def __init__(
        self,
        job: PlanJob,
        count: int,
        *,
        until: float = math.inf,
        serve: Serve = serve_block,
        limits: Limits | None = None,
    ) -> None:
        self._job, self._count, self._until = job, count, until
        self._serve, self._limits = serve, limits or Limits()
        self._bench = BlockBench(job)
        self._watch = kind_of(job.device).make_watch(job.device)
        self._children: list[Child] = []
        self._compiled_by: dict[RoleSet, Child] = {}

    def __enter__(self) -> BlockWorkerPool:
        try:
            while len(self._children) < self._count:
                self._children.append(Child(self._serve, self._job, self._limits, starts_busy=False))
            self._open()
        except BaseException:
            end_all(self._children)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_all(self._children)

    def compile(self, sets: Sequence[RoleSet]) -> Iterator[tuple[RoleSet, Answer]]:
        """The answer about each set as soon as it is compiled. Raises BlockWorkerDiedError, StoppedError."""
        if not self._children:
            yield from ((roles, self._bench.answer(("compile", roles))) for roles in sets)
            return
        left = deque(sets)
        idle = sorted(self._children, key=list(self._compiled_by.values()).count)
        if CONTROL_SET in sets:  # a process shares tuned kernels: what bf16 is compared with must come from another
            left = deque(sorted(sets, key=lambda roles: roles not in (BF16_SET, CONTROL_SET)))  # while all are idle
            idle.sort(key=lambda child: child is self._compiled_by.get(BF16_SET))
        busy: dict[Child, RoleSet] = {}
        while left or busy:
            while left and idle:
                child, roles = idle.pop(0), left.popleft()
                self._compiled_by[roles] = child
                child.send(("compile", roles))
                busy[child] = roles
            for child in self._wait_for(list(busy)):
                roles = busy.pop(child)
                idle.append(child)
                yield roles, self._hear(child, roles)

    def others(self) -> list[str]:
        """Processes on the device that are not this plan's."""
        own = [os.getpid(), *(child.pid for child in self._children)]
        return other_processes(self._watch.processes(), own)

    def load(self, roles: RoleSet) -> Answer:
        """Raises BlockWorkerDiedError, StoppedError."""
        return self._ask(("load", roles))

    def visit(self, roles: RoleSet) -> Answer:
        """Raises BlockWorkerDiedError, StoppedError."""
        return self._ask(("visit", roles))

    def _open(self) -> None:
        """All at once, before anything is measured."""
        for child in self._children:
            child.send(("open", BF16_SET))
        waiting = set(self._children)
        while waiting:
            for child in self._wait_for(list(waiting)):
                waiting.remove(child)
                if isinstance(answer := self._hear(child, BF16_SET), Failure):
                    raise BlockWorkerDiedError(f"the block cannot be made on the device: {answer.detail}", BF16_SET)

    def _ask(self, request: Request) -> Answer:
        if not self._children:
            return self._bench.answer(request)
        child = self._compiled_by[request[1]]
        child.send(request)
        self._wait_for([child])
        return self._hear(child, request[1])

    def _wait_for(self, children: Sequence[Child]) -> list[Child]:
        heard = wait_for(children, self._until)
        if not heard:
            raise StoppedError("the time is up")
        return heard

    def _hear(self, child: Child, roles: RoleSet) -> Answer:
        try:
            answer: Any = child.receive()
        except ChildDiedError as error:
            raise BlockWorkerDiedError(str(error), roles) from error
        if isinstance(answer, Broken):
            raise BlockWorkerDiedError(f"the block cannot be made on the device: {answer.detail}", roles)
        return answer  # type: ignore[no-any-return]
