"""The kinds of device that can be measured, and the one that is at hand.

In: a torch device, or its kind's name. Out: its `DeviceKind`, and what tables state about device and software.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.device.cuda.kind import Cuda
from fp8gate.calibrate.device.kind import DeviceKind
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import Device, DeviceKindName, Software

if TYPE_CHECKING:
    import torch

KINDS: dict[DeviceKindName, DeviceKind] = {kind.name: kind for kind in (Cuda(), Cpu())}
"""The first that is usable here is measured, unless another is asked for."""


def kind_of(device: torch.device) -> DeviceKind:
    """What kind of device this is. Raises InputError for one that fp8gate cannot measure."""
    for kind in KINDS.values():
        if kind.name == device.type:
            return kind
    raise InputError(f"device: expected one of {', '.join(KINDS)}; got {device.type}")


def asked_kinds(name: DeviceKindName | None) -> list[DeviceKind]:
    """The kind of this name, or every kind for None."""
    return list(KINDS.values()) if name is None else [KINDS[name]]


def choose_device(name: DeviceKindName | None) -> torch.device:
    """The device of the kind asked for, or of the first kind that is usable. Raises InputError if it is not there."""
    import torch

    kinds = asked_kinds(name)
    for kind in kinds:
        if kind.is_usable():
            return torch.device(kind.name)
    raise InputError(f"device: {kinds[0].name} was asked for, but torch sees no {kinds[0].noun} here")


def require_compiler(device: torch.device, argument: str) -> None:
    """Raises InputError if nothing is compiled for the device. argument: one that says how Inductor compiles."""
    kind = kind_of(device)
    if not kind.defaults.compiles:
        raise InputError(f"{argument}: says how Inductor compiles; on a {kind.noun} nothing is compiled")


def describe_device(device: torch.device) -> Device:
    """The device's facts, as a table states them."""
    return kind_of(device).describe(device)


def describe_software(device: torch.device) -> Software:
    """The releases in use."""
    import torch

    import fp8gate

    return Software(
        torch=str(torch.__version__),
        torchao=metadata.version("torchao"),
        fp8gate=fp8gate.__version__,
        **kind_of(device).software(),
    )
