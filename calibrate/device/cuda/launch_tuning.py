"""Let Inductor choose launch configurations by this package's timer instead of its own.

Inductor runs every configuration of a kernel at its first launch, and keeps the one with the shortest time. Its own
timing flushes L2 for 15 us before each run. While other processes compile, the host needs longer than that to launch
the next run, so that Inductor times launches (about 25 us) instead of kernels. It then picks a lucky configuration, up
to 3 times slower than the best (measured on one NVIDIA H200, LOG.md). It also takes 19 ms a configuration.

In: a timer. Out: nothing. It tunes every kernel that this process launches for the first time from now on.
"""

from __future__ import annotations

from collections.abc import Callable

from fp8gate.calibrate.device.cuda.timer import CudaTimer


def tune_by(timer: CudaTimer) -> None:
    """Replace Inductor's timing of launch configurations in this process."""
    from torch._inductor.runtime import triton_heuristics
    from torch._inductor.runtime.benchmarking import InductorBenchmarker

    class ByTimer(InductorBenchmarker):
        def benchmark_gpu(self, _callable: Callable[[], object], **_: object) -> float:
            """Milliseconds, as Inductor asks."""
            return timer.least_us(_callable) / 1e3

    triton_heuristics.benchmarker = ByTimer()  # type: ignore[attr-defined]  # imported there, not defined
