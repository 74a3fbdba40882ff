"""Compare the software that a table was measured with to the software of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from fp8gate.filter.contract.table import Software

PACKAGES = ("torch", "torchao", "triton")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


def stale(software: Software) -> str | None:
    """The releases that differ ("torch 2.11.0, here 2.13.0"), or None if there are none.

    Builds ("+cu130") are not compared. A package that is not installed here, or a driver whose version cannot be read,
    counts as equal.
    """
    differences = []
    for package in (*PACKAGES, "driver"):
        measured = getattr(software, package)
        installed = _driver() if package == "driver" else installed_version(package)
        if measured and installed and _release(measured) != _release(installed):
            differences.append(f"{package} {_release(measured)}, here {_release(installed)}")
    return "; ".join(differences) or None


def installed_version(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    from importlib import metadata  # takes longer to import than all of fp8gate

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver, as its kernel module states it on Linux."""
    if not DRIVER_VERSION.is_file():
        return None
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", DRIVER_VERSION.read_text())
    return found[1] if found else None


def _release(version: str) -> str:
    return version.split("+")[0]
