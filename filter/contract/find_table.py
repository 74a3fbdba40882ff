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
MAX_NAMED = 20  # devices that an error names; the table of each is read for its name


def find_table(
    recipe: Recipe, *, device: str | None = None, tables: str | os.PathLike[str] | None = None
) -> tuple[Table, Path]:
    """The table and the file it came from.

    tables: a table file, or a folder of `<device slug>/<recipe>.yaml`. device: a name as the driver reports it. None
    means the device of the file if `tables` is a file, and otherwise the one that torch sees here. A name that is given
    may be spelled otherwise than in the table, as long as the slug is the same. A name that torch gives may not.
    Raises TableError if there is no such table (the message names the devices that have one), if it is not valid, or
    if it is for another recipe or device. Raises InputError if no device is named and torch is not installed.
    """
    location = Path(tables or os.environ.get(ENVIRONMENT) or packaged_thresholds())
    if not os.path.isdir(location):  # Path.is_dir raises for a path that is too long
        return _checked(read_table(location), location, recipe, device), location
    name = device or local_device_name()
    path = location / device_slug(name) / f"{recipe}.yaml"
    if not os.path.isfile(path):
        raise TableError(_no_table(location, recipe, name))
    table = _checked(read_table(path), path, recipe, name)
    if device is None and table.device.name != name:
        raise TableError(
            f"{path}: $.device.name: expected {name}, found {table.device.name}, another device whose folder has the "
            "same name; keep the tables of each in a folder of their own, and pass tables=DIR"
        )
    return table, path


def packaged_thresholds() -> Path:
    """The folder of the tables that come with fp8gate."""
    from importlib import resources

    return Path(str(resources.files("fp8gate") / "thresholds"))


def measured_devices(folder: Path, recipe: Recipe) -> list[str]:
    """The devices that have a table for this recipe in a folder, named as their tables name them.

    A table that cannot be used is named by its path in the folder. Only the first MAX_NAMED tables are read.
    """
    paths = sorted(folder.glob(f"*/{recipe}.yaml"))
    more = [f"and {len(paths) - MAX_NAMED} more"] if len(paths) > MAX_NAMED else []
    return [*(_measured_device(path) for path in paths[:MAX_NAMED]), *more]


def _measured_device(path: Path) -> str:
    try:
        return read_table(path).device.name
    except TableError:
        return f"{path.parent.name}/{path.name} (no valid table)"


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
