"""NVML, the driver's management library: started here and nowhere else. Light to import: no torch.

In: nothing. Out: its functions, for as long as a context lasts; handles of GPUs; how many there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fp8gate.filter.contract.errors import InputError


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """NVML's functions. Raises InputError if it cannot answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
        yield pynvml
    except pynvml.NVMLError as error:
        raise InputError(f"device: expected NVML to answer, the driver's management library; got {error}") from error


def nvml_handle(uuid: str) -> Any:
    """NVML's handle of the GPU, or part of one, that torch knows by this UUID."""
    with nvml() as functions:
        try:
            return functions.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except functions.NVMLError_NotFound:
            return functions.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def gpu_count() -> int:
    """The GPUs of this machine, without starting CUDA; 0 if there is no driver."""
    try:
        with nvml() as functions:
            return int(functions.nvmlDeviceGetCount())
    except InputError:
        return 0
