"""What the device ran, kernel by kernel (op by op on a CPU), from torch.profiler.

In: something to run, whose passes begin with a flush of the cache. Out: the events of each pass, and what kind each is.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fp8gate.calibrate.device.timer import Timer

Kind = Literal["product", "cast"]
PRODUCT_KERNELS = re.compile("gemm|gemv|nvjet|xmma|cutlass|cublas|splitk", re.IGNORECASE)
PRODUCT_OPS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm"})
TRITON, TRITON_PRODUCTS = "triton_", ("triton_tem_", "triton_mm")
"""Inductor names a fused kernel by the ops around it, `_scaled_mm` among them; only its templates are products."""
FLUSHES = 4  # enough to see that all are alike


class ProfileError(RuntimeError):
    """The profiler has not recorded what ran."""


@dataclass(frozen=True, slots=True)
class Event:
    """A kernel, copy or memset of a GPU, or an op of a CPU; of an op, the time that no op within it took."""

    name: str
    time_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """All events of one name. calls: in one pass. time_us: of all of them in one pass, on average."""

    name: str
    kind: Kind
    calls: int
    time_us: float


def kind_of(name: str) -> Kind:
    """A matrix product, by the name of its kernel or op, or else a cast: whatever is not known to be a product."""
    if name.startswith(TRITON):
        return "product" if name.startswith(TRITON_PRODUCTS) else "cast"
    return "product" if name in PRODUCT_OPS or PRODUCT_KERNELS.search(name) else "cast"


def record(device: torch.device, run: Callable[[], object], before: Callable[[], object]) -> list[Event]:
    """What the device runs during `run`, in order. `before` runs with the profiler on, and is not recorded.

    Both must wait for the device.
    """
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # starting CUPTI again has crashed graphs that were captured before
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as profiler:
        before()
        profiler.step()
        run()
    events = sorted(profiler.events() or [], key=lambda event: (event.time_range.start, -event.time_range.end))
    return [_event(event, device) for event in events if _is_of(device, event)]


def flush_names(timer: Timer[Any], device: torch.device) -> list[str]:
    """The names of what a flush of the cache runs. Raises ProfileError if several flushes do not run the same."""

    def flush() -> None:
        for _ in range(FLUSHES):
            timer.flush()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    names = [event.name for event in record(device, flush, flush)]
    for size in range(1, len(names) // 2 + 1):
        if names[size:] == names[:-size]:
            return names[-size:]
    raise ProfileError(f"expected {FLUSHES} flushes of the cache that run the same; the profiler recorded {names}")


def passes(events: Sequence[Event], flush: Sequence[str]) -> list[list[Event]]:
    """The events after each flush, up to the next, if there are any: the host's head start is flushes alone.

    What comes before the first flush belongs to no pass.
    """
    names, size = [event.name for event in events], len(flush)
    starts = [i for i in range(len(names)) if names[i : i + size] == list(flush)]
    bounds = [*starts, len(names)]
    found = (list(events[start + size : end]) for start, end in zip(starts, bounds[1:], strict=True))
    return [one for one in found if one]


def summed(same: Sequence[Sequence[Event]]) -> tuple[Kernel, ...]:
    """The kernels of passes that ran the same, in the order they first ran.

    Raises ProfileError if they did not, or ran nothing.
    """
    calls = Counter(event.name for event in same[0])
    for other in same:
        if not other or Counter(event.name for event in other) != calls:
            raise ProfileError(
                f"expected passes that all run the same; the profiler recorded {[e.name for e in same[0]]}, "
                f"then {[e.name for e in other]}"
            )
    times_us: dict[str, float] = defaultdict(float)
    for event in (event for one in same for event in one):
        times_us[event.name] += event.time_us
    return tuple(
        Kernel(name=name, kind=kind_of(name), calls=count, time_us=times_us[name] / len(same))
        for name, count in calls.items()
    )


def _is_of(device: torch.device, event: Any) -> bool:
    """Not, on a GPU, the calls that launch kernels, nor the profiler's own marks."""
    return event.device_type.name.lower() == device.type and not event.is_user_annotation


def _event(event: Any, device: torch.device) -> Event:
    on_cpu = device.type == "cpu"
    return Event(event.name, event.self_cpu_time_total if on_cpu else event.time_range.elapsed_us())
