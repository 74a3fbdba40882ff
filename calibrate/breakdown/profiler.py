"""What the device ran, kernel by kernel (op by op on a CPU), from torch.profiler.

In: a function that runs passes, each of which begins with a flush of the cache. Out: the kernels of a pass, each with
its kind and its mean time.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import profile, schedule

from fp8gate.calibrate.breakdown.breakdown_record import Kernel, KernelKind
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timer import Timer
from fp8gate.calibrate.processes.library_noise import PROFILER_LINES, without_lines
from fp8gate.filter.contract.errors import UnfinishedError

PRODUCT_KERNELS = re.compile("gemm|gemv|nvjet|xmma|cutlass|cublas|splitk", re.IGNORECASE)
PRODUCT_OPS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm"})
TRITON, TRITON_PRODUCTS = "triton_", ("triton_tem_", "triton_mm")
"""Inductor names a fused kernel after the ops around it, and `_scaled_mm` may be one of them. Only the kernels that it
makes from its templates are products."""
FLUSHES = 4  # enough to see that all of them run the same kernels


class ProfileError(UnfinishedError):
    """The profiler has not recorded what ran."""


@dataclass(frozen=True, slots=True)
class Event:
    """A kernel, copy or memset on a GPU, or an op on a CPU.

    time_us: the duration. For an op, the time in ops that it calls is left out.
    """

    name: str
    time_us: float


def kernel_kind(name: str) -> KernelKind:
    """Tell a matrix product by the name of its kernel or op. Everything else counts as a cast."""
    if name.startswith(TRITON):
        return "product" if name.startswith(TRITON_PRODUCTS) else "cast"
    return "product" if name in PRODUCT_OPS or PRODUCT_KERNELS.search(name) else "cast"


def record(device: torch.device, run: Callable[[], object], before: Callable[[], object]) -> list[Event]:
    """What the device runs during `run`, in order. `before` runs while the profiler is on, but is not recorded.

    Both functions must wait for the device before they return.
    """
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # starting CUPTI again has crashed graphs that were captured before
    steps = schedule(wait=0, warmup=1, active=1, repeat=1)
    with (
        without_lines(PROFILER_LINES),
        profile(activities=[kind_of(device).profiler_activity()], schedule=steps) as profiler,
    ):
        before()
        profiler.step()
        run()
    events = sorted(profiler.events() or [], key=lambda event: (event.time_range.start, -event.time_range.end))
    return [_event(event, device) for event in events if _ran_on(device, event)]


def flush_names(timer: Timer[Any], device: torch.device) -> list[str]:
    """The names of the events of one flush of the cache. Raises ProfileError if the flushes do not run the same."""

    def flush() -> None:
        for _ in range(FLUSHES):
            timer.flush()
        kind_of(device).synchronize(device)

    names = [event.name for event in record(device, flush, flush)]
    for size in range(1, len(names) // 2 + 1):
        if names[size:] == names[:-size]:
            return names[-size:]
    raise ProfileError(f"expected {FLUSHES} flushes of the cache that run the same; the profiler recorded {names}")


def passes(events: Sequence[Event], flush: Sequence[str]) -> list[list[Event]]:
    """The events between each flush and the next.

    Two flushes with nothing between them make no pass: the timer runs such flushes to give the host a head start.
    Events before the first flush are left out.
    """
    names, size = [event.name for event in events], len(flush)
    starts = [i for i in range(len(names)) if names[i : i + size] == list(flush)]
    bounds = [*starts, len(names)]
    found = (list(events[start + size : end]) for start, end in zip(starts, bounds[1:], strict=True))
    return [pass_ for pass_ in found if pass_]


def summed(same: Sequence[Sequence[Event]]) -> tuple[Kernel, ...]:
    """The kernels of passes that ran the same, in the order in which they first ran.

    Raises ProfileError if the passes ran different kernels, or none.
    """
    calls = Counter(event.name for event in same[0])
    for other in same:
        if not other or Counter(event.name for event in other) != calls:
            raise ProfileError(
                f"expected passes that all run the same; the profiler recorded {[e.name for e in same[0]]}, "
                f"then {[e.name for e in other]}"
            )
    times_us: dict[str, float] = defaultdict(float)
    for event in (event for pass_ in same for event in pass_):
        times_us[event.name] += event.time_us
    return tuple(
        Kernel(name=name, kind=kernel_kind(name), calls=count, time_us=times_us[name] / len(same))
        for name, count in calls.items()
    )


def _ran_on(device: torch.device, event: Any) -> bool:
    """Whether the device ran it. A GPU did not run the calls that launch kernels, nor the profiler's own marks."""
    return event.device_type.name.lower() == device.type and not event.is_user_annotation


def _event(event: Any, device: torch.device) -> Event:
    return Event(event.name, kind_of(device).event_us(event))
