"""How many worker processes fit on this machine and its device.

In: the device's memory. Out: a number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fp8gate.calibrate.device.cpu import physical_memory_bytes
from fp8gate.calibrate.device.registry import KINDS
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.table import Device, SweepProtocol

SPARE_CORES = 2  # one for the process that times, one for the rest of the machine
MAX_WORKER_BYTES = 4 * 2**30
"""A worker that has held more ends after its point, and another takes its place. On an H200 machine they hold 1.5 to
2 GiB after 100 points."""
MAX_WORKERS = 16  # 14 leave an H200 idle for 1 % of a sweep
MAX_DEVICE_SHARE = 0.25  # of the GPU's memory, for all workers together
CGROUP = Path("/sys/fs/cgroup")


def default_workers(device: Device, sweeps: int = 1) -> int:
    """As many workers as have a core, MAX_WORKER_BYTES of memory and their part of the device's memory each.

    sweeps: how many ranks of one sweep share this machine. Cores are divided among them, unless a launcher has bound
    each rank to cores of its own.
    """
    cores = usable_cores()
    if cores * sweeps > (os.cpu_count() or cores):
        cores //= sweeps
    limits = [cores - SPARE_CORES, usable_memory_bytes() // sweeps // MAX_WORKER_BYTES - 1, MAX_WORKERS]
    worker_gib = KINDS[device.kind].defaults.worker_gib
    if worker_gib:
        limits.append(int(device.memory_gib * MAX_DEVICE_SHARE / worker_gib))
    return max(1, min(limits))


def useful_workers(device: Device, protocols: Mapping[Recipe, SweepProtocol], sweeps: int = 1) -> int:
    """0 where nothing is compiled: workers exist to compile while another process times."""
    if not any(protocol.compile for protocol in protocols.values()):
        return 0
    return default_workers(device, sweeps)


def usable_cores() -> int:
    """The cores that this process may use: a scheduler or a container may allow it fewer than there are."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return min(allowed, max(1, int(quota) // int(period))) if quota.isdigit() else allowed


def usable_memory_bytes() -> int:
    """The memory of the machine, or of the container."""
    limit, memory = _cgroup("memory.max"), physical_memory_bytes()
    return min(memory, int(limit)) if limit.isdigit() else memory


def _cgroup(name: str) -> str:
    """A limit of the container, as Linux (cgroup v2) shows it; "max" or nothing if there is none."""
    path = CGROUP / name
    return path.read_text().strip() if path.is_file() else ""
