"""The timer of CUDA GPUs: GPU time of graph replays by CUDA events, with a cold L2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fp8gate.calibrate.device.timer import TUNING_RUNS, WARM_UP_RUNS, Arm, Order, Results, Sample

FLUSH_L2_MULTIPLE = 4  # a read of less than twice the L2 leaves part of it; 4 also outlasts the launch of what follows
SHORT_RUN_US = 300.0  # a longer run differs by less than 1 % from the next
HEAD_START = 4  # flushes: they take 0.25 ms on an H200, so that the host stays ahead of the GPU while it launches runs


@dataclass(slots=True)
class CapturedArm:
    """Forward and backward as CUDA graphs, and their static outputs until those are forgotten."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    outputs: Results | None


class CudaTimer:
    """GPU time by CUDA events around graph replays. A read flushes the L2 before each.

    shares_memory: all arms compute in one pool of memory. An arm computes everything that it reads, except its
    operands. So once its results are forgotten, the next arm may use the same memory: many blocks need no more than
    one. flush_bytes: how much is read, None for FLUSH_L2_MULTIPLE of the L2.
    """

    def __init__(self, device: torch.device, *, shares_memory: bool = False, flush_bytes: int | None = None) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush_buffer = torch.ones(
            (flush_bytes or FLUSH_L2_MULTIPLE * l2_bytes) // 4, device=device, dtype=torch.float32
        )
        self._flush_result = torch.empty((), device=device, dtype=torch.float32)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # cuBLAS keeps memory for each used
        self._pool = None
        if shares_memory:
            self._anchor = torch.cuda.CUDAGraph()  # keeps the pool alive: it ends with its last graph
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
        """Enqueue a head start and all rounds before the host waits, so that it stays ahead of the GPU."""
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
        """Enqueue a flush, an event, what is timed, and another event."""
        start, end = _event(), _event()
        self.flush()
        start.record()
        launch()
        end.record()
        return start, end

    def flush(self) -> None:
        torch.sum(self._flush_buffer, dim=0, out=self._flush_result)  # a read: a write would leave dirty lines


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e3
