"""What is here: device, software, tables and plans that the filter would find, journals, the host's load.

In: nothing. Out: a `Checkup`. torch is asked for the device if it is installed, and only then imported.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from fp8gate.casts import VARIABLE
from fp8gate.cli.doctor.found_files import FoundFile, found_plans, found_tables, out_folder
from fp8gate.filter.contract.devices import device_slug, local_device_name
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import PLANS
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.software_check import DRIVER_VERSION
from fp8gate.filter.contract.table import read_table
from fp8gate.filter.decision.measured_settings import casts_of_environment
from fp8gate.filter.locate.find_table import find_table, table_files
from fp8gate.filter.locate.places import places

PACKAGES = ("fp8gate", "torch", "torchao", "triton", "transformers")
SMALLEST = 16  # of the sizes that a float8 product takes


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """The device that torch sees. capability, driver: of a GPU. runs_float8: whether a float8 product ran just now."""

    name: str
    kind: str
    memory_gib: float | None
    capability: str | None
    driver: str | None
    runs_float8: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkup:
    """device: None without torch. missing: recipes without a table for it. measured: the devices that have
    tables. measured_gpu: one of them that can be asked about. out: where `calibrate` and `plan` write.

    casts: the value of FP8GATE_CASTS, None if it is not set. casts_problem: what is wrong with that. out_problem: why
    nothing can be written there. waiting: journals that are newer than what they are for. load: of the last minute,
    None where the system does not tell.
    """

    device: DeviceFacts | None
    versions: dict[str, str | None]
    places: dict[str, str]
    casts: str | None
    casts_problem: str | None
    tables: tuple[FoundFile, ...]
    missing: tuple[str, ...]
    measured: tuple[str, ...]
    measured_gpu: str | None
    plans: tuple[FoundFile, ...]
    out: str | None
    out_problem: str | None
    waiting: tuple[str, ...]
    load: float | None
    processors: int


def check_up() -> Checkup:
    device = _device() if util.find_spec("torch") else None
    searched = places()
    tables = (
        tuple(found_tables(device.name)) if device and any(os.path.exists(place.path) for place in searched) else ()
    )
    out, out_problem = out_folder()
    measured = tuple(sorted(set(_measured())))
    return Checkup(
        device=device,
        versions={"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        places={str(one.path): one.what + ("" if os.path.exists(one.path) else ", not there yet") for one in searched},
        casts=os.environ.get(VARIABLE),
        casts_problem=_casts_problem(),
        tables=tables,
        missing=tuple(recipe for recipe in RECIPES if recipe not in {table.what for table in tables}) if device else (),
        measured=measured,
        measured_gpu=_measured_gpu(measured),
        plans=tuple(found_plans(device.name)) if device else (),
        out=None if out is None else str(out),
        out_problem=out_problem,
        waiting=tuple(map(str, _waiting(out / device_slug(device.name)))) if device and out else (),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        processors=os.cpu_count() or 1,
    )


def _casts_problem() -> str | None:
    try:
        casts_of_environment("rowwise")
    except InputError as error:
        return str(error)
    return None


def _device() -> DeviceFacts:
    import torch

    name, is_gpu = local_device_name(), torch.cuda.is_available()
    properties = torch.cuda.get_device_properties() if is_gpu else None
    return DeviceFacts(
        name=name,
        kind="cuda" if is_gpu else "cpu",
        memory_gib=round(properties.total_memory / 2**30, 1) if properties else _memory_gib(),
        capability=f"{properties.major}.{properties.minor}" if properties else None,
        driver=_driver() if is_gpu else None,
        runs_float8=_runs_float8("cuda" if is_gpu else "cpu"),
    )


def _runs_float8(device: str) -> bool:
    import torch

    one = torch.ones((), device=device)
    operand = torch.ones(SMALLEST, SMALLEST, device=device).to(torch.float8_e4m3fn)
    try:
        product = torch._scaled_mm(operand, operand.t(), one, one, out_dtype=torch.bfloat16)
    except torch.OutOfMemoryError:  # says nothing about float8
        raise
    except (RuntimeError, NotImplementedError):  # a GPU before 8.9, or a build of torch without it
        return False
    return bool((product == SMALLEST).all())


def _memory_gib() -> float | None:
    from fp8gate.calibrate.device.cpu import physical_memory_bytes

    return round(physical_memory_bytes() / 2**30, 1)


def _driver() -> str | None:
    """As the kernel module states it: NVML may not be installed."""
    words = DRIVER_VERSION.read_text().split() if DRIVER_VERSION.is_file() else []
    return next((word for word in words if word.count(".") in (1, 2) and word.replace(".", "").isdigit()), None)


def _version(package: str) -> str | None:
    """None if it is not installed."""
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # torch's nightly builds bring triton under another name
        return "of unknown version"


def _measured() -> Iterator[str]:
    """The devices that have tables, as `--device` finds them: a folder that is itself a place can have any name."""
    folders = {place.path for place in places()}
    for path in table_files():
        if path.parent.parent in folders:
            yield path.parent.name
        elif path.is_file():
            with contextlib.suppress(InputError):
                yield device_slug(read_table(path).device.name)


def _measured_gpu(measured: tuple[str, ...]) -> str | None:
    """The first that has the tables of all recipes, which `fp8gate explain --recipe all` asks for."""
    for slug in measured:
        with contextlib.suppress(InputError):
            if {find_table(recipe, device=slug)[0].device.kind for recipe in RECIPES} == {"cuda"}:
                return slug
    return None


def _waiting(folder: Path) -> Iterator[Path]:
    """Journals with records to which nothing was written since, as a kill leaves them."""
    for here in (folder, folder / PLANS):
        done = max((path.stat().st_mtime for path in here.glob("*.yaml")), default=0.0)
        for journal in sorted(here.glob("journal-*.jsonl")):
            if journal.stat().st_mtime > done and journal.read_bytes().count(b"\n") > 1:
                yield journal
