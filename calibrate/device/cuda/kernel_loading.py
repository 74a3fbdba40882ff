"""Let Inductor load the kernels that it has compiled only while no other process times."""

from __future__ import annotations

from typing import Any

from fp8gate.calibrate.device.timing_lock import TimingLock


def load_kernels_under(lock: TimingLock) -> None:
    """From now on, this process loads compiled kernels under the lock."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    load = CachingAutotuner._make_launchers

    def wait_and_load(autotuner: CachingAutotuner) -> Any:
        with lock.loading():
            return load(autotuner)  # type: ignore[no-untyped-call]

    CachingAutotuner._make_launchers = wait_and_load  # type: ignore[method-assign]
