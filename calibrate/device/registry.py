"""What is measured and with what: the device and the software, as the table states them."""

from __future__ import annotations

import os
import socket
from importlib import metadata

import torch

import fp8gate
from fp8gate.calibrate.device.cuda.nvml import nvml, nvml_handle
from fp8gate.filter.contract.devices import cpu_name
from fp8gate.filter.contract.table import Device, Software


def choose_device(kind: str | None) -> torch.device:
    """The CUDA GPU if there is one, else the CPU; or the kind asked for. Raises ValueError if it is not there."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA GPU here")
    return torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe_device(device: torch.device) -> Device:
    """The device's facts, from torch and, for a GPU's power limit, NVML."""
    if device.type == "cpu":
        memory_gib = _gib(physical_memory_bytes())
        return Device(name=cpu_name(), kind="cpu", threads=torch.get_num_threads(), memory_gib=memory_gib)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        name=properties.name,
        kind="cuda",
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=_gib(properties.total_memory),
        l2_mib=round(properties.L2_cache_size / 2**20, 1),
        power_limit_w=_power_limit_w(str(properties.uuid)),
    )


def device_identity(device: torch.device, local_rank: int = 0) -> str:
    """This one device among all: a GPU's UUID, whatever its machine or container is called, or a CPU's machine."""
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"{socket.gethostname()} cpu {local_rank}"


def physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_software(device: torch.device) -> Software:
    """The releases in use."""
    on_gpu = device.type == "cuda"
    return Software(
        torch=str(torch.__version__),
        torchao=metadata.version("torchao"),
        triton=_triton_version() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        driver=_driver() if on_gpu else None,
        fp8gate=fp8gate.__version__,
    )


def _gib(size_bytes: int) -> float:
    return round(size_bytes / 2**30, 1)


def _triton_version() -> str:
    import triton  # its distribution has several names, the module has one

    return str(triton.__version__)


def _power_limit_w(uuid: str) -> float | None:
    """None for what has none of its own, such as a part of a GPU."""
    with nvml() as functions:
        try:
            return float(functions.nvmlDeviceGetPowerManagementLimit(nvml_handle(uuid)) / 1000)
        except functions.NVMLError_NotSupported:
            return None


def _driver() -> str:
    with nvml() as functions:
        return str(functions.nvmlSystemGetDriverVersion())
