"""The CPU as a device: wall-clock times of eager calls. It runs the whole harness where there is no GPU."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fp8gate.calibrate.device.kind import DeviceKind, MeasuringDefaults, NoiseLimits
from fp8gate.calibrate.device.timer import TUNING_RUNS, WARM_UP_RUNS, Arm, Order, Results, Sample
from fp8gate.calibrate.device.timing_lock import TimingLock
from fp8gate.filter.contract.devices import cpu_name
from fp8gate.filter.contract.table import Device, Grid

if TYPE_CHECKING:
    import torch

FLUSH_BYTES = 64 * 2**20  # more than the last-level cache share of 2 cores on current servers
MAX_POINT_FLOP = 6 * 2**29  # about 30 ms in bf16 on 2 cores, and five times that in float8
CONTROL = 0.2  # wall-clock times of a shared machine: only gross faults show
NOISE = NoiseLimits(width=1.6, apart=1.3, waited=0.1, measures_twice=True)
"""Of 64 speedups on 2 idle cores, the widest bounds were 1.52 apart, two measurements of a point at most 1.22, and no
thread waited for more than 0.032 s a second. With one or four busy processes beside them, all waited for 0.63 to 1.7 s
a second. Then some bounds were narrow, and some measurements agreed, and were wrong by half (LOG.md, 2026-11-26)."""

Result = TypeVar("Result")


EVERY_POINT = Grid(m=(128, 512), k=(256, 512, 1024), n=(256, 512, 1024))


class Cpu(DeviceKind):
    """Nothing is compiled, and nothing tells how fast the processor runs."""

    name = "cpu"
    noun = "CPU"
    defaults = MeasuringDefaults(
        timer="wall_clock",
        compiles=False,
        control=CONTROL,
        rounds=(10, 30),
        noise=NOISE,
        grids={
            "quick": Grid(m=(64, 128), k=(128, 256), n=(128, 256)),
            "default": EVERY_POINT,
            "full": EVERY_POINT,
        },
        refined=frozenset(),
        unaligned_points=0,  # seen on GPUs only
        max_point_flop=MAX_POINT_FLOP,
        worker_gib=0.0,
        visit_pause_s=0.0,
        visit_settle_s=0.0,
        visit_run_s=0.1,
        visit_noise=0.1,  # wall-clock times of a shared machine
        square=512,  # 2.7e8 operations
        copy_bytes=2**27,
    )

    def count(self) -> int:
        return 0

    def is_usable(self) -> bool:
        return True

    def claim(self, local_rank: int, local_world: int, environment: MutableMapping[str, str] = os.environ) -> None:
        """The ranks of one machine share its processor."""

    def describe(self, device: torch.device) -> Device:
        import torch

        memory_gib = round(physical_memory_bytes() / 2**30, 1)
        return Device(name=cpu_name(), kind="cpu", threads=torch.get_num_threads(), memory_gib=memory_gib)

    def identity(self, device: torch.device, local_rank: int) -> str:
        return f"{socket.gethostname()} cpu {local_rank}"

    def lock_name(self, device: torch.device) -> str:
        return "cpu"

    def has_own_lock(self, local_rank: int) -> bool:
        """The ranks of one machine share its processor: the first holds the lock for all."""
        return local_rank == 0

    def make_timer(
        self, device: torch.device, *, shares_memory: bool = False, flush_bytes: int | None = None
    ) -> CpuTimer:
        return CpuTimer(flush_bytes)

    def make_watch(self, device: torch.device) -> CpuWatch:
        return CpuWatch()

    def load_kernels_under(self, lock: TimingLock) -> None:
        """What is compiled for a processor disturbs no other process when it is loaded."""

    def synchronize(self, device: torch.device) -> None:
        """Calls return when they have finished."""

    def release_memory(self, device: torch.device) -> None:
        """torch keeps no memory of the processor for later."""

    def profiler_activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CPU

    def event_us(self, event: Any) -> float:
        """Of an op, the time that no op within it took."""
        return float(event.self_cpu_time_total)


class CpuWatch:
    """A processor tells nothing about itself; Linux tells how long threads waited for one."""

    def slowdown(self) -> None:
        return None

    def is_power_limited(self) -> bool:
        return False

    def sm_clock_mhz(self) -> None:
        return None

    def waited_s(self) -> float | None:
        """As Linux counts it for each thread; None elsewhere."""
        found = [_waited_ns(thread) for thread in Path("/proc/self/task").glob("*/schedstat")]
        return sum(found) / 1e9 if found else None

    def processes(self) -> dict[int, str]:
        return {}


class CpuTimer:
    """Wall-clock time of direct calls. A read flushes the last-level cache before each.

    flush_bytes: how much is read, FLUSH_BYTES for None.
    """

    def __init__(self, flush_bytes: int | None = None) -> None:
        import torch

        self._flush_buffer = torch.ones((flush_bytes or FLUSH_BYTES) // 4, dtype=torch.float32)

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


def physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _waited_ns(thread: Path) -> int:
    """The second number of a thread's schedstat: how long it was ready to run and had no processor."""
    try:
        return int(thread.read_text().split()[1])
    except OSError:  # it has just ended
        return 0
