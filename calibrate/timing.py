"""Timing one round: forward and backward of each arm, cold cache. The only module that touches CUDA events and graphs.

In: arms. Out: one sample (forward, backward) in microseconds per arm and round. `CudaTimer` reads GPU time of graph
replays, `CpuTimer` wall-clock time; both are used the same way: prepare every arm, then run rounds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fp8gate.calibrate.linears import Arm

WARM_UP_RUNS = 3  # compile and autotune, then settle the allocator, then once more undisturbed
FLUSH_L2_MULTIPLE = 4  # reading less than twice the L2 leaves part of it; 4 also outlasts the launch of what follows
CPU_FLUSH_BYTES = 64 * 2**20  # more than the last-level cache share of 2 cores on current servers


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one arm, in microseconds."""

    fwd_us: float
    bwd_us: float


@dataclass(frozen=True, slots=True)
class Results:
    """What the timed code computed: output (m, n), grad_x (m, k), grad_weight (n, k)."""

    output: Tensor
    grad_x: Tensor
    grad_weight: Tensor


Prepared = TypeVar("Prepared")


class Timer(Protocol[Prepared]):
    """Times arms on one device."""

    def prepare(self, arm: Arm) -> Prepared:
        """Compile, warm up and, on a GPU, capture."""

    def results(self, prepared: Prepared) -> Results:
        """Run once and return what was computed, for the numeric check."""

    def round(self, prepared: Sequence[Prepared]) -> list[Sample]:
        """Time each once, in the order given."""

    def release(self) -> None:
        """Give back what the arms of a point held, once they are dropped."""


@dataclass(frozen=True, slots=True)
class CapturedArm:
    """Forward and backward as CUDA graphs, and their static outputs."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    outputs: Results


class CudaTimer:
    """GPU time by CUDA events around graph replays, L2 flushed by reading before each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush_buffer = torch.ones(FLUSH_L2_MULTIPLE * l2_bytes // 4, device=device, dtype=torch.float32)
        self._flush_result = torch.empty((), device=device, dtype=torch.float32)

    def prepare(self, arm: Arm) -> CapturedArm:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                arm.backward(arm.forward())
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a capture cannot free what the warm-up left in the allocator's cache
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, stream=stream):
            output = arm.forward()
        with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
            grad_x, grad_weight = arm.backward(output)
        return CapturedArm(forward, backward, Results(output.detach(), grad_x, grad_weight))

    def results(self, prepared: CapturedArm) -> Results:
        prepared.forward.replay()
        prepared.backward.replay()
        return prepared.outputs

    def round(self, prepared: Sequence[CapturedArm]) -> list[Sample]:
        events = [(self._timed(arm.forward), self._timed(arm.backward)) for arm in prepared]
        torch.cuda.synchronize(self.device)
        return [Sample(_elapsed_us(*fwd), _elapsed_us(*bwd)) for fwd, bwd in events]

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _timed(self, graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue flush, event, replay, event. Nothing waits here: the host stays ahead of the GPU."""
        start, end = _event(), _event()
        torch.sum(self._flush_buffer, dim=0, out=self._flush_result)  # a read: a write would leave dirty lines
        start.record()
        graph.replay()
        end.record()
        return start, end


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
        return Results(output.detach(), *prepared.backward(output))

    def round(self, prepared: Sequence[Arm]) -> list[Sample]:
        return [self._time(arm) for arm in prepared]

    def release(self) -> None:
        """Nothing is cached on the CPU."""

    def _time(self, arm: Arm) -> Sample:
        self._flush_buffer.sum()
        start = time.perf_counter_ns()
        output = arm.forward()
        forward_end = time.perf_counter_ns()
        self._flush_buffer.sum()
        backward_start = time.perf_counter_ns()
        arm.backward(output)
        end = time.perf_counter_ns()
        return Sample((forward_end - start) / 1e3, (end - backward_start) / 1e3)


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e3
