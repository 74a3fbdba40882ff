"""How many processes this machine and its GPU bear.

In: the GPU's memory. Out: a number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fp8gate.calibrate.device.description import physical_memory_bytes
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.table import Device, SweepProtocol

SPARE_CORES = 2  # one for whoever is timing, one for the rest of the machine
MAX_WORKER_BYTES = 4 * 2**30
"""A worker that has held more ends after its point, and another takes its place. On an H200 machine they hold 1.5 to
2 GiB after 100 points."""
MAX_WORKERS = 16  # 14 leave an H200 idle for 1 % of a sweep
WORKER_DEVICE_GIB = 2.0
"""Set aside for each worker on the GPU: CUDA's context and kernels, the buffer that flushes L2 (240 MiB on an H200),
cuBLAS's workspaces. An allowance, not a measurement."""
MAX_DEVICE_SHARE = 0.25  # of the GPU's memory, for all workers together
CGROUP = Path("/sys/fs/cgroup")


def default_workers(device_gib: float | None = None, sweeps: int = 1) -> int:
    """As many as have a core each, MAX_WORKER_BYTES of memory, and WORKER_DEVICE_GIB of a share of the GPU's.

    sweeps: how many ranks of one sweep share this machine; cores of which each has
    its own, as a launcher may bind them, are not divided.
    """
    cores = usable_cores()
    if cores * sweeps > (os.cpu_count() or cores):
        cores //= sweeps
    limits = [cores - SPARE_CORES, usable_memory_bytes() // sweeps // MAX_WORKER_BYTES - 1, MAX_WORKERS]
    if device_gib is not None:
        limits.append(int(device_gib * MAX_DEVICE_SHARE / WORKER_DEVICE_GIB))
    return max(1, min(limits))


def useful_workers(device: Device, protocols: Mapping[Recipe, SweepProtocol], sweeps: int = 1) -> int:
    """None where nothing is compiled: workers exist to do that beside the timing."""
    if not any(protocol.compile for protocol in protocols.values()):
        return 0
    return default_workers(device.memory_gib if device.kind == "cuda" else None, sweeps)


def usable_cores() -> int:
    """The cores this process may use: a scheduler or a container may have left it fewer than there are."""
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
