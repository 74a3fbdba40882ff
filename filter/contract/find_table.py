"""Find the table for a recipe and device: in `tables=`, else in FP8GATE_THRESHOLDS, else among the packaged ones."""

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

    tables: a table file, or a folder of `<device slug>/<recipe>.yaml`. device: a name as the driver reports it;
    None takes the device of the file if `tables` is one, and else asks torch for the local one.
    Raises TableError if there is no such table, naming the devices there are, or if it is not valid, or if it is
    one for another recipe or device.
    """
    place = Path(tables or os.environ.get(ENVIRONMENT) or packaged_thresholds())
    if not place.is_dir():
        return _checked(read_table(place), place, recipe, device), place
    device = device or local_device_name()
    path = place / device_slug(device) / f"{recipe}.yaml"
    if not path.is_file():
        raise TableError(_no_table(place, recipe, device))
    return _checked(read_table(path), path, recipe, device), path


def packaged_thresholds() -> Path:
    """The folder of the tables that come with fp8gate."""
    from importlib import resources

    return Path(str(resources.files("fp8gate") / "thresholds"))


def measured_devices(place: Path, recipe: Recipe) -> list[str]:
    """Names of the devices that have a table for this recipe in a folder, as their files state them."""
    return [read_table(path).device.name for path in sorted(place.glob(f"*/{recipe}.yaml"))]


def _checked(table: Table, path: Path, recipe: Recipe, device: str | None) -> Table:
    if table.recipe != recipe:
        raise TableError(f"{path}: $.recipe: expected {recipe}, found {table.recipe}")
    if device is not None and device_slug(table.device.name) != device_slug(device):
        raise TableError(f"{path}: $.device.name: expected {device}, found {table.device.name}")
    return table


def _no_table(place: Path, recipe: Recipe, device: str) -> str:
    known = ", ".join(measured_devices(place, recipe)) or "none"
    return (
        f"{place}: no {recipe} table for {device!r} ({device_slug(device)}/{recipe}.yaml); devices there: {known}. "
        f"To measure this device, run on it: fp8gate calibrate --recipes {recipe} --out DIR; then pass tables=DIR"
    )
