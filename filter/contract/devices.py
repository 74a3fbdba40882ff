"""Device names: how one is turned into a folder name, and which device is here."""

from __future__ import annotations

import re
from pathlib import Path


def device_slug(name: str) -> str:
    """The folder name of a device: "NVIDIA H200" -> "nvidia-h200".

    Two names are the same device exactly when their slugs are equal. Raises ValueError for a name without
    letters or digits.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise ValueError(f"device: expected a name such as 'NVIDIA H200', got {name!r}")
    return slug


def local_device_name() -> str:
    """The accelerator torch sees here, or else the CPU. Imports torch, so call it only when asked to.

    Raises ValueError if torch is not installed: then the device has to be named.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ValueError("device: expected a name, such as 'NVIDIA H200', as torch is not here to ask") from error

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name()


def cpu_name() -> str:
    """The processor's model, as Linux reports it; elsewhere as Python's `platform` does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"CPU {line.split(':', 1)[1].strip()}"
    import platform

    return f"CPU {platform.processor() or platform.machine()}"
