"""What is measured and with what: the device and the software, as the table states them."""

from __future__ import annotations

import os
from importlib import metadata

import torch

import fp8gate
from fp8gate.filter.devices import cpu_name
from fp8gate.filter.table import Device, Software


def choose_device(kind: str | None) -> torch.device:
    """The CUDA GPU if there is one, else the CPU; or the kind asked for. Raises ValueError if it is not there."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA GPU here")
    return torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe_device(device: torch.device) -> Device:
    """The device's facts, from torch and, for a GPU's power limit, NVML."""
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(name=cpu_name(), kind="cpu", threads=torch.get_num_threads(), memory_gib=_gib(memory))
    properties = torch.cuda.get_device_properties(device)
    return Device(
        name=properties.name,
        kind="cuda",
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=_gib(properties.total_memory),
        l2_mib=round(properties.L2_cache_size / 2**20, 1),
        power_limit_w=_nvml_power_limit_w(str(properties.uuid)),
    )


def describe_software(device: torch.device) -> Software:
    """The releases in use."""
    on_gpu = device.type == "cuda"
    return Software(
        torch=str(torch.__version__),
        torchao=metadata.version("torchao"),
        triton=_triton_version() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        driver=_nvml_driver() if on_gpu else None,
        fp8gate=fp8gate.__version__,
    )


def _gib(size_bytes: int) -> float:
    return round(size_bytes / 2**30, 1)


def _triton_version() -> str:
    import triton  # its distribution has several names, the module has one

    return str(triton.__version__)


def _nvml_power_limit_w(uuid: str) -> float:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return float(pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000)


def _nvml_driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())
