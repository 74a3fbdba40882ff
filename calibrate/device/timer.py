"""Timing rounds: forward and backward of each arm, cold cache. The only module that touches CUDA events and graphs.

In: arms. Out: one sample (forward, backward) in microseconds per arm and round. `CudaTimer` reads GPU time of graph
replays, `CpuTimer` wall-clock time; both are used the same way: prepare every arm, run rounds, free.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

WARM_UP_RUNS = 2  # load and tune the kernels, then once more undisturbed
FLUSH_L2_MULTIPLE = 4  # reading less than twice the L2 leaves part of it; 4 also outlasts the launch of what follows
TUNING_RUNS = (3, 9)  # of a launch configuration; those after the first three only where they are short
SHORT_RUN_US = 300.0  # a longer run differs by less than 1 % from the next
HEAD_START = 4  # flushes: 0.25 ms on an H200, by which the host stays ahead of the GPU while it launches runs
CPU_FLUSH_BYTES = 64 * 2**20  # more than the last-level cache share of 2 cores on current servers


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one arm, in microseconds."""

    fwd_us: float
    bwd_us: float


class Arm(Protocol):
    """What is timed: one way to compute a linear, or a block of layers."""

    def forward(self) -> Tensor: ...

    def backward(self, output: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, slots=True)
class Results:
    """What the timed code computed; of a linear, output (m, n), and the gradients of x (m, k) and of weight (n, k)."""

    output: Tensor
    gradients: tuple[Tensor, ...]

    @property
    def grad_x(self) -> Tensor:
        return self.gradients[0]

    @property
    def grad_weight(self) -> Tensor:
        return self.gradients[1]


Prepared = TypeVar("Prepared")
Result = TypeVar("Result")
Order = Sequence[int]
"""The arms of a round in the order they run, by index."""


class Timer(Protocol[Prepared]):
    """Times arms on one device."""

    def prepare(self, arm: Arm) -> Prepared:
        """Warm up and, on a GPU, capture."""

    def results(self, prepared: Prepared) -> Results:
        """Run once and return what was computed, for the numeric check."""

    def rounds(self, prepared: Sequence[Prepared], orders: Sequence[Order]) -> list[list[Sample]]:
        """Run a round for each order. Returns each round's samples, in the order of `prepared`."""

    def forget_results(self, prepared: Prepared) -> None:
        """They are not asked for any more: other arms may compute in their memory."""

    def least_us(self, launch: Callable[[], object]) -> float:
        """The shortest of a few runs of what `launch` runs, cache cold, in microseconds."""

    def flush(self) -> None:
        """Make the cache cold, for what is timed next."""

    def free(self, prepared: Sequence[Prepared]) -> None:
        """Give back what these arms hold on the device, and wait until it has finished."""


@dataclass(slots=True)
class CapturedArm:
    """Forward and backward as CUDA graphs, and their static outputs until those are forgotten."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    outputs: Results | None


class CudaTimer:
    """GPU time by CUDA events around graph replays, L2 flushed by reading before each.

    is_pooled: arms share one pool of memory. Each computes all it reads but its operands, so once its results are
    forgotten the next may use the same memory, and many blocks need no more than one.
    """

    def __init__(self, device: torch.device, *, is_pooled: bool = False) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush_buffer = torch.ones(FLUSH_L2_MULTIPLE * l2_bytes // 4, device=device, dtype=torch.float32)
        self._flush_result = torch.empty((), device=device, dtype=torch.float32)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # cuBLAS keeps memory for each used
        self._pool = None
        if is_pooled:
            self._anchor = torch.cuda.CUDAGraph()  # keeps the pool, which ends with its last graph
            self._flush_result.zero_()  # a kernel cannot be loaded within a capture
            torch.cuda.synchronize(device)
            with torch.cuda.graph(self._anchor, stream=self._stream):
                self._flush_result.zero_()
            self._pool = self._anchor.pool()

    def prepare(self, arm: Arm) -> CapturedArm:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                arm.backward(arm.forward())
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a capture cannot free what the warm-up left in the allocator's cache
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool, stream=stream):
            output = arm.forward()
        with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
            gradients = arm.backward(output)
        return CapturedArm(forward, backward, Results(output.detach(), gradients))

    def results(self, prepared: CapturedArm) -> Results:
        assert prepared.outputs
        prepared.forward.replay()
        prepared.backward.replay()
        return prepared.outputs

    def forget_results(self, prepared: CapturedArm) -> None:
        torch.cuda.synchronize(self.device)
        prepared.outputs = None

    def rounds(self, prepared: Sequence[CapturedArm], orders: Sequence[Order]) -> list[list[Sample]]:
        """All rounds are enqueued before the host waits, after a head start, so that it stays ahead of the GPU."""
        for _ in range(HEAD_START):
            self.flush()
        events = [
            {i: (self._timed(prepared[i].forward.replay), self._timed(prepared[i].backward.replay)) for i in order}
            for order in orders
        ]
        torch.cuda.synchronize(self.device)
        return [
            [Sample(_elapsed_us(*one[i][0]), _elapsed_us(*one[i][1])) for i in range(len(prepared))] for one in events
        ]

    def free(self, prepared: Sequence[CapturedArm]) -> None:
        torch.cuda.synchronize(self.device)
        for arm in prepared:
            arm.forward.reset()
            arm.backward.reset()
            for tensor in (arm.outputs.output, *arm.outputs.gradients) if arm.outputs else ():
                tensor.untyped_storage().resize_(0)
        torch.cuda.empty_cache()

    def least_us(self, launch: Callable[[], object]) -> float:
        launch()
        least = math.inf
        for runs in TUNING_RUNS:
            for _ in range(HEAD_START):
                self.flush()
            events = [self._timed(launch) for _ in range(runs)]
            torch.cuda.synchronize(self.device)
            least = min(least, *(_elapsed_us(*pair) for pair in events))
            if least > SHORT_RUN_US:
                break
        return least

    def _timed(self, launch: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue flush, event, what is timed, event."""
        start, end = _event(), _event()
        self.flush()
        start.record()
        launch()
        end.record()
        return start, end

    def flush(self) -> None:
        torch.sum(self._flush_buffer, dim=0, out=self._flush_result)  # a read: a write would leave dirty lines


class CpuTimer:
    """Wall-clock time of direct calls, the last-level cache flushed by reading before each."""

    def __init__(self) -> None:
        self._flush_buffer = torch.ones(CPU_FLUSH_BYTES // 4, dtype=torch.float32)

    def prepare(self, arm: Arm) -> Arm:
        for _ in range(WARM_UP_RUNS):
            arm.backward(arm.forward())
        return arm

    def results(self, prepared: Arm) -> Results:
        output = prepared.forward()
        return Results(output.detach(), prepared.backward(output))

    def forget_results(self, prepared: Arm) -> None:
        """Nothing is kept."""

    def rounds(self, prepared: Sequence[Arm], orders: Sequence[Order]) -> list[list[Sample]]:
        timed = [{i: self._time(prepared[i]) for i in order} for order in orders]
        return [[one[i] for i in range(len(prepared))] for one in timed]

    def free(self, prepared: Sequence[Arm]) -> None:
        """Nothing is held beside the operands."""

    def least_us(self, launch: Callable[[], object]) -> float:
        launch()
        return min(self._timed(launch)[1] for _ in range(TUNING_RUNS[0]))

    def flush(self) -> None:
        self._flush_buffer.sum()

    def _time(self, arm: Arm) -> Sample:
        output, fwd_us = self._timed(arm.forward)
        _, bwd_us = self._timed(lambda: arm.backward(output))
        return Sample(fwd_us, bwd_us)

    def _timed(self, call: Callable[[], Result]) -> tuple[Result, float]:
        """What the call returns, and its microseconds."""
        self.flush()
        start = time.perf_counter_ns()
        result = call()
        return result, (time.perf_counter_ns() - start) / 1e3


def balanced_orders(arms: int, rounds: int, rng: random.Random) -> list[list[int]]:
    """Orders for rounds, in pairs of an order and its reverse: of two arms, each comes first equally often."""
    orders: list[list[int]] = []
    while len(orders) < rounds:
        order = rng.sample(range(arms), arms)
        orders += [order, order[::-1]]
    return orders[:rounds]


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e3
