"""Device names: the folder name of a device, and the name of the device in this machine."""

from __future__ import annotations

import re
from pathlib import Path

from fp8gate.filter.contract.errors import InputError


def device_slug(name: str) -> str:
    """The folder name of a device: "NVIDIA H200" -> "nvidia-h200".

    Two names mean the same device exactly when their slugs are equal. Raises InputError for a name without letters or
    digits.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise InputError(f"device: expected a name such as 'NVIDIA H200', got {name!r}")
    return slug


def require_own_file(path: Path, found: str, device: str) -> None:
    """Raises InputError, before a file of a device is replaced, if it is of a device of another name.

    Names such as "NVIDIA H200" and "NVIDIA-H200" share a folder, and one must not replace the other.
    """
    if found != device:
        raise InputError(f"{path}: $.device.name: expected {device!r}, found {found!r}; give another --out")


def local_device_name() -> str:
    """The name of the GPU that torch sees, or of the CPU if there is none.

    It imports torch, so call it only if no name was given. Raises InputError if torch is not installed: then the user
    has to name the device.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError(
            "device: torch is not here to ask: name it, such as --device H200, or device='H200'"
        ) from error

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name()


def cpu_name() -> str:
    """The processor's model as Linux reports it. On other systems Python's `platform` is asked."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"CPU {line.split(':', 1)[1].strip()}"
    import platform

    return f"CPU {platform.processor() or platform.machine()}"
