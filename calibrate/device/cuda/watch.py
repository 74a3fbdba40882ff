"""A CUDA GPU's clock, its slowdowns and the processes on it, by NVML."""

from __future__ import annotations

from typing import Any

import torch

from fp8gate.calibrate.device.cuda.nvml import nvml, nvml_handle


class GpuWatch:
    """NVML's view of one GPU. What the driver does not tell just now is not known."""

    def __init__(self, device: torch.device) -> None:
        with nvml() as self._nvml:
            self._handle = nvml_handle(str(torch.cuda.get_device_properties(device).uuid))
        self._slowdowns = {
            self._nvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
            self._nvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
            self._nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
            self._nvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal slowdown",
        }

    def slowdown(self) -> str | None:
        """Why the GPU is slower than it should be now. The power limit is no reason: training runs at it."""
        reasons = self._reasons()
        return ", ".join(name for bit, name in self._slowdowns.items() if reasons & bit) or None

    def is_power_limited(self) -> bool:
        """Whether the clock is lowered now to keep to the power limit."""
        return bool(self._reasons() & self._nvml.nvmlClocksEventReasonSwPowerCap)

    def sm_clock_mhz(self) -> int | None:
        clock: int | None = self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        return clock

    def waited_s(self) -> None:
        """A GPU that replays a CUDA graph does not wait for the processor."""

    def processes(self) -> dict[int, str]:
        """Every process that computes on the GPU, by its number, as far as the driver tells."""
        found = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        return {process.pid: self._name(process.pid) for process in found}

    def _reasons(self) -> int:
        """Why the clock is not at its highest, as bits; 0 if the driver does not tell."""
        return self._ask("nvmlDeviceGetCurrentClocksEventReasons") or 0

    def _ask(self, question: str, *arguments: object) -> Any:
        try:
            return getattr(self._nvml, question)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def _name(self, pid: int) -> str:
        try:
            return str(self._nvml.nvmlSystemGetProcessName(pid))
        except self._nvml.NVMLError:  # of another container, or gone
            return "unknown"
