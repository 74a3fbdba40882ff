"""A kind of device, and everything in which one kind differs from another.

A further kind is one more module like `cpu.py` beside this one, entered in `registry.py` and in the table's schema
(`DeviceKindName`). Importing a kind loads no torch: its methods do.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fp8gate.calibrate.device.timer import Timer
    from fp8gate.calibrate.device.timing_lock import TimingLock
    from fp8gate.calibrate.device.watch import Watch

from fp8gate.filter.contract.table import Device, DeviceKindName, Grid, TimerName

FAR = 1.25
"""A speedup is measured again if it is so many times what lies between its neighbours on the grid. Of 2304 speedups of
two H200 sweeps, the furthest was 1.24 times that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseLimits:
    """From when on the numbers of a point are noise, which decides nothing.

    width: of the bounds, high / low. apart: of two measurements of the same point, the larger speedup over the smaller.
    waited: seconds that the threads waited for a processor, per second of measuring. measures_twice: whether every
    point is measured by a second process later; otherwise a share of the points is, and those that look like noise.
    far: a speedup looks like noise if it is so many times what lies between its neighbours on the grid.
    repeats: of so many points of each class of `Bounds`, a second process shows what differs from run to run.
    between_runs: how far ln(speedup) is taken to differ from run to run, in each class, where repeats are too few.
    board_us: by how much boards differ in each direction of every arm (`Bounds.board_us`); None: not known to differ.
    """

    width: float
    apart: float
    waited: float
    measures_twice: bool
    far: float = FAR
    repeats: int = 0
    between_runs: tuple[float, float] = (0.0, 0.0)
    board_us: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuringDefaults:
    """How devices of one kind are measured, unless asked otherwise.

    timer: its name in protocols. compiles: arms are compiled, and captured as CUDA graphs. control: how far bf16 timed
    against itself may be from 1. rounds: see `SweepProtocol`; 8 would give bounds at 99 %, but those of the extremes.
    noise: when numbers are noise. grids: by name, "quick", "default" and "full". refined:
    those of which a sweep measures a coarse grid and the points near which float8 breaks even (grid/refinement.py).
    unaligned_points: for each recipe, so many points are measured with fewer tokens too (grid/unaligned.py).
    max_point_flop: forward plus backward of the largest point of a grid that is measured. worker_gib: set aside on the
    device for each worker process; 0 where workers take none of it. visit_*: how long a plan's visit idles, settles and
    counts, and what share a set must gain to be followed. square: m = k = n of the products that tell the device's
    peak.
    copy_bytes: of the source of a copy, more than any cache.
    """

    timer: TimerName
    compiles: bool
    control: float
    rounds: tuple[int, ...]
    noise: NoiseLimits
    grids: Mapping[str, Grid]
    refined: frozenset[str]
    unaligned_points: int
    max_point_flop: int
    worker_gib: float
    visit_pause_s: float
    visit_settle_s: float
    visit_run_s: float
    visit_noise: float
    square: int
    copy_bytes: int


class DeviceKind(ABC):
    """What the rest of `calibrate` asks of a kind of device."""

    name: DeviceKindName
    noun: str
    """What people call such a device, as in "a CUDA GPU"."""
    defaults: MeasuringDefaults

    @abstractmethod
    def count(self) -> int:
        """How many devices of this kind could compile for themselves here, found out without starting any."""

    @abstractmethod
    def is_usable(self) -> bool:
        """Whether torch can compute on a device of this kind here."""

    @abstractmethod
    def claim(self, local_rank: int, local_world: int, environment: MutableMapping[str, str] = os.environ) -> None:
        """Let this process and its children see only the device of its local rank; to be called before torch starts.

        Raises InputError if there are fewer devices than local ranks.
        """

    @abstractmethod
    def describe(self, device: torch.device) -> Device:
        """The device's facts, as a table states them."""

    def software(self) -> dict[str, str | None]:
        """The releases that matter on this kind of device alone, by their field in `Software`."""
        return {}

    @abstractmethod
    def identity(self, device: torch.device, local_rank: int) -> str:
        """A name for this one device among all devices of all machines."""

    @abstractmethod
    def lock_name(self, device: torch.device) -> str:
        """A name for this one device on this machine."""

    def has_own_lock(self, local_rank: int) -> bool:
        """Whether this rank holds the lock of its device; otherwise another rank of the machine holds it for all."""
        return True

    @abstractmethod
    def make_timer(
        self, device: torch.device, *, shares_memory: bool = False, flush_bytes: int | None = None
    ) -> Timer[Any]:
        """The timer. If the kind tunes kernels at their first launch, they are tuned by this timer from now on.

        shares_memory: see `CudaTimer`. flush_bytes: how much is read to make the cache cold, None for enough.
        """

    @abstractmethod
    def make_watch(self, device: torch.device) -> Watch:
        """What the device tells about itself."""

    @abstractmethod
    def load_kernels_under(self, lock: TimingLock) -> None:
        """From now on, this process loads compiled kernels only while no other process times."""

    @abstractmethod
    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has finished. Raises what the device says if it failed."""

    @abstractmethod
    def release_memory(self, device: torch.device) -> None:
        """Give back the memory that torch keeps on the device for later."""

    @abstractmethod
    def profiler_activity(self) -> Any:
        """What torch.profiler records of this kind of device."""

    @abstractmethod
    def event_us(self, event: Any) -> float:
        """The time of a profiler's event that is its own, in microseconds."""
