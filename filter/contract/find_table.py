"""Find the table for a recipe and device.

The first of these that is given is searched: the argument `tables`, the environment variable FP8GATE_THRESHOLDS, the
tables that come with fp8gate.
"""

from __future__ import annotations

import os
from pathlib import Path

from fp8gate.filter.contract.devices import device_slug, local_device_name
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.table import Table, TableError, read_table

ENVIRONMENT = "FP8GATE_THRESHOLDS"


def find_table(
    recipe: Recipe, *, device: str | None = None, tables: str | os.PathLike[str] | None = None
) -> tuple[Table, Path]:
    """The table and the file it came from.

    tables: a table file, or a folder of `<device slug>/<recipe>.yaml`. device: a name as the driver reports it. None
    means the device of the file if `tables` is a file, and otherwise the one that torch sees here.
    Raises TableError if there is no such table (the message names the devices that have one), if it is not valid, or
    if it is for another recipe or device. Raises InputError if no device is named and torch is not installed.
    """
    location = Path(tables or os.environ.get(ENVIRONMENT) or packaged_thresholds())
    if not location.is_dir():
        return _checked(read_table(location), location, recipe, device), location
    device = device or local_device_name()
    path = location / device_slug(device) / f"{recipe}.yaml"
    if not path.is_file():
        raise TableError(_no_table(location, recipe, device))
    return _checked(read_table(path), path, recipe, device), path


def packaged_thresholds() -> Path:
    """The folder of the tables that come with fp8gate."""
    from importlib import resources

    return Path(str(resources.files("fp8gate") / "thresholds"))


def measured_devices(folder: Path, recipe: Recipe) -> list[str]:
    """The devices that have a table for this recipe in a folder, named as their tables name them."""
    return [read_table(path).device.name for path in sorted(folder.glob(f"*/{recipe}.yaml"))]


def _checked(table: Table, path: Path, recipe: Recipe, device: str | None) -> Table:
    if table.recipe != recipe:
        raise TableError(f"{path}: $.recipe: expected {recipe}, found {table.recipe}")
    if device is not None and device_slug(table.device.name) != device_slug(device):
        raise TableError(f"{path}: $.device.name: expected {device}, found {table.device.name}")
    return table


def _no_table(folder: Path, recipe: Recipe, device: str) -> str:
    known = ", ".join(measured_devices(folder, recipe)) or "none"
    return (
        f"{folder}: no {recipe} table for {device!r} ({device_slug(device)}/{recipe}.yaml); devices there: {known}. "
        f"To measure this device, run on it: fp8gate calibrate --recipes {recipe} --out DIR; then pass tables=DIR"
    )
