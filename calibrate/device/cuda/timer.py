"""The timer of CUDA GPUs: GPU time by CUDA events inside a CUDA graph, with a cold L2.

The flush, the events and what is timed are nodes of one graph, so that nothing that the host does is in a number. With
events around the launch of a graph it is: on an H200 whose host was loaded, as it is by a sweep's compilers, products
of 25 us came out as up to 59 us. With events inside they were as on a quiet host, within 1 % (LOG.md, 2026-11-26).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fp8gate.calibrate.device.timer import TUNING_RUNS, WARM_UP_RUNS, Arm, Order, Results, Sample

FLUSH_L2_MULTIPLE = 4  # a read of less than twice the L2 leaves part of it; 4 also outlasts the launch of what follows
SHORT_RUN_US = 300.0  # a longer run differs by less than 1 % from the next
HEAD_START = 4  # flushes: they take 0.25 ms on an H200, so that the host stays ahead of the GPU while it launches runs
ROUNDS_IN_GRAPH, LONG_ROUND_US = 4, 5000.0
"""After each replay the host reads the events, and the GPU idles for about 50 us. Of rounds that are shorter than
LONG_ROUND_US a graph has several."""


@dataclass(slots=True)
class CapturedArm:
    """Rounds of forward and backward as one CUDA graph, and the last round's static outputs until those are forgotten.

    events: of each round: before and after the forward, before and after the backward.
    """

    graph: torch.cuda.CUDAGraph
    events: list[tuple[torch.cuda.Event, ...]]
    outputs: Results | None

    def samples(self) -> list[Sample]:
        """Of the last replay, which must have ended."""
        return [Sample(_elapsed_us(*one[:2]), _elapsed_us(*one[2:])) for one in self.events]


class CudaTimer:
    """GPU time by CUDA events inside graphs. A read flushes the L2 before each forward and each backward.

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
        start, end = _event(), _event()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                start.record()
                arm.backward(arm.forward())
                end.record()
        torch.cuda.synchronize(self.device)
        rounds = ROUNDS_IN_GRAPH if _elapsed_us(start, end) < LONG_ROUND_US else 1
        torch.cuda.empty_cache()  # a capture cannot free what the warm-up left in the allocator's cache
        graph, events = torch.cuda.CUDAGraph(), [tuple(_event(external=True) for _ in range(4)) for _ in range(rounds)]
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            for one in events:
                results = self._round(arm, one)
        return CapturedArm(graph, events, results)

    def _round(self, arm: Arm, events: tuple[torch.cuda.Event, ...]) -> Results:
        self.flush()
        events[0].record()
        output = arm.forward()
        events[1].record()
        self.flush()
        events[2].record()
        gradients = arm.backward(output)
        events[3].record()
        return Results(output.detach(), gradients)

    def results(self, prepared: CapturedArm) -> Results:
        assert prepared.outputs
        prepared.graph.replay()
        return prepared.outputs

    def forget_results(self, prepared: CapturedArm) -> None:
        torch.cuda.synchronize(self.device)
        prepared.outputs = None

    def rounds(self, prepared: Sequence[CapturedArm], orders: Sequence[Order]) -> list[list[Sample]]:
        """At least as many rounds as there are orders: all of a graph, for each arm in turn."""
        found: list[list[Sample]] = []
        for order in orders:
            if len(found) >= len(orders):
                break
            for i in order:
                prepared[i].graph.replay()
            torch.cuda.synchronize(self.device)
            found += [list(one) for one in zip(*(arm.samples() for arm in prepared), strict=False)]
        return found

    def free(self, prepared: Sequence[CapturedArm]) -> None:
        torch.cuda.synchronize(self.device)
        for arm in prepared:
            arm.graph.reset()
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


def _event(*, external: bool = False) -> torch.cuda.Event:
    """external: recorded as a node of a graph."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
    return event


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e3
