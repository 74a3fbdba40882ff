"""CUDA GPUs as a kind of device: compiled arms in CUDA graphs, timed by events, watched by NVML."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from fp8gate.calibrate.device.cuda.nvml import gpu_count, nvml, nvml_handle
from fp8gate.calibrate.device.kind import DeviceKind, MeasuringDefaults, NoiseLimits
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import Device, Grid

if TYPE_CHECKING:
    import torch

    from fp8gate.calibrate.device.cuda.timer import CudaTimer
    from fp8gate.calibrate.device.cuda.watch import GpuWatch
    from fp8gate.calibrate.device.timing_lock import TimingLock

VISIBLE = "CUDA_VISIBLE_DEVICES"
MAX_POINT_FLOP = 6 * 2**41
"""Forward plus backward of one bf16 run: about 20 ms on an H200, where a point takes 1 s. A larger point is
compute-bound, and its nearest neighbour below decides the same way."""
WORKER_GIB = 2.0
"""Set aside for each worker on the GPU: CUDA's context and kernels, the buffer that flushes L2 (240 MiB on an H200),
cuBLAS's workspaces. An allowance, not a measurement."""
CONTROL = 0.005
ROUNDS = (10,)
"""No second run near the threshold. Of 30 speedups within 3 % of 1.0, from 120 us on, two H100 boards gave 1.0 %
(median) and 2.8 % (95th percentile) apart by their runs of 0.05 s, 0.8 and 3.2 % by second runs of a whole and a
quarter of a second (LOG.md, 2026-11-26)."""
BOARD_US = 2.0
"""On two of four H100 boards all arms, bf16 too, take longer in each direction than on the other two, short or long: by
1.2 to 2.1 us where bf16 takes less than 120 us (medians by arm, direction and size, all four pairs; LOG.md,
2026-11-26). So it is the time between the events, not the kernels. The two of each kind agree within 0.5 us."""
NOISE = NoiseLimits(
    width=1.25,
    apart=1.1,
    waited=math.inf,
    measures_twice=False,
    repeats=40,
    between_runs=(0.08, 0.045),
    board_us=BOARD_US,
)
"""Of 2442 speedups of two H200 sweeps, 41 have bounds that are further apart; half are within 1.01. Of their repeats in
another process, the furthest was 9.1 % from the first. between_runs: two H200 sweeps on two boards differ by no more at
95 % of the points, in the recipe that differs most (`python benchmarks/two_sweeps.py`). The largest difference of 40
repeats covers 95 % of the points in 87 % of all sweeps, that of 20 in 64 %."""
UNALIGNED_POINTS = 8
"""Speedups of single shapes scatter by 4 % around the factor, so the median of 8 is known within 2 % (one sigma)."""
VISIT_SETTLE_S, VISIT_RUN_S, VISIT_PAUSE_S = 0.2, 1.0, 0.15
"""A GPU at its power limit needs 0.2 s to reach the clock of what runs, and keeps to the limit over about a second.
Such windows agree within 0.44 %. A GPU draws more after a pause, so each visit begins with the same pause (H200,
LOG.md, 2026-11-24)."""
VISIT_NOISE = 0.008  # of the ratio of two visits: whole seconds of one arm differ by 0.8 % (one sigma, 2026-11-25)


def _powers(low: int, high: int) -> tuple[int, ...]:
    return tuple(2**e for e in range(low.bit_length() - 1, high.bit_length()))


EVERY_POINT = Grid(m=(*_powers(1024, 16384), 65536), k=(128, *_powers(512, 32768)), n=_powers(128, 32768))


class Cuda(DeviceKind):
    """NVIDIA GPUs, as torch names them."""

    name = "cuda"
    noun = "CUDA GPU"
    defaults = MeasuringDefaults(
        timer="cuda_graph_events",
        compiles=True,
        control=CONTROL,
        rounds=ROUNDS,
        noise=NOISE,
        grids={
            "quick": Grid(m=(2048, 8192, 32768), k=(1024, 4096, 16384), n=(256, 1024, 4096, 16384)),
            "default": EVERY_POINT,
            "full": EVERY_POINT,
        },
        refined=frozenset({"default"}),
        unaligned_points=UNALIGNED_POINTS,
        max_point_flop=MAX_POINT_FLOP,
        worker_gib=WORKER_GIB,
        visit_pause_s=VISIT_PAUSE_S,
        visit_settle_s=VISIT_SETTLE_S,
        visit_run_s=VISIT_RUN_S,
        visit_noise=VISIT_NOISE,
        square=8192,  # 1.1e12 operations keep a GPU busy for about 1.5 ms
        copy_bytes=2**30,
    )

    def count(self) -> int:
        return gpu_count()

    def is_usable(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def claim(self, local_rank: int, local_world: int, environment: MutableMapping[str, str] = os.environ) -> None:
        """By CUDA_VISIBLE_DEVICES, unless a launcher has given each rank its own GPU already."""
        visible = [name for name in environment.get(VISIBLE, ",".join(_gpus())).split(",") if name]
        if len(visible) == 1 and local_world > 1 and VISIBLE in environment:
            return
        if visible and local_rank >= len(visible):
            raise InputError(
                f"{VISIBLE}: expected a GPU for each of {local_world} ranks on this machine; there are {len(visible)}"
            )
        if visible:
            environment[VISIBLE] = visible[local_rank]

    def describe(self, device: torch.device) -> Device:
        """From torch and, for the power limit, from NVML."""
        import torch

        properties = torch.cuda.get_device_properties(device)
        return Device(
            name=properties.name,
            kind="cuda",
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            l2_mib=round(properties.L2_cache_size / 2**20, 1),
            power_limit_w=_power_limit_w(str(properties.uuid)),
        )

    def software(self) -> dict[str, str | None]:
        import torch
        import triton  # its distribution has several names, the module has one

        return {"triton": str(triton.__version__), "cuda": torch.version.cuda, "driver": _driver()}

    def identity(self, device: torch.device, local_rank: int) -> str:
        """The GPU's UUID, whatever its machine or container is called."""
        return f"GPU-{_uuid(device)}"

    def lock_name(self, device: torch.device) -> str:
        return _uuid(device)

    def make_timer(
        self, device: torch.device, *, shares_memory: bool = False, flush_bytes: int | None = None
    ) -> CudaTimer:
        from fp8gate.calibrate.device.cuda.launch_tuning import tune_by
        from fp8gate.calibrate.device.cuda.timer import CudaTimer

        timer = CudaTimer(device, shares_memory=shares_memory, flush_bytes=flush_bytes)
        tune_by(timer)
        return timer

    def make_watch(self, device: torch.device) -> GpuWatch:
        from fp8gate.calibrate.device.cuda.watch import GpuWatch

        return GpuWatch(device)

    def load_kernels_under(self, lock: TimingLock) -> None:
        from fp8gate.calibrate.device.cuda.kernel_loading import load_kernels_under

        load_kernels_under(lock)

    def synchronize(self, device: torch.device) -> None:
        import torch

        torch.cuda.synchronize(device)

    def release_memory(self, device: torch.device) -> None:
        import torch

        torch.cuda.empty_cache()

    def profiler_activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CUDA

    def event_us(self, event: Any) -> float:
        return float(event.time_range.elapsed_us())


def _uuid(device: torch.device) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _gpus() -> list[str]:
    """The numbers of this machine's GPUs."""
    return [str(number) for number in range(gpu_count())]


def _power_limit_w(uuid: str) -> float | None:
    """None for a device without a limit of its own, such as a part of a GPU."""
    with nvml() as functions:
        try:
            return float(functions.nvmlDeviceGetPowerManagementLimit(nvml_handle(uuid)) / 1000)
        except functions.NVMLError_NotSupported:
            return None


def _driver() -> str:
    with nvml() as functions:
        return str(functions.nvmlSystemGetDriverVersion())
