"""Find the table for a recipe and device in the places where tables lie.

In: a recipe, a device's name or None for the one here, a place or None for all of them. Out: a table and its file.
Try it: fp8gate doctor
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fp8gate.filter.contract.devices import device_slug, local_device_name
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import VARIANTS, Casts, Recipe, Variant, other_casts, other_casts_option
from fp8gate.filter.contract.table import Table, TableError, read_table
from fp8gate.filter.locate.device_names import match_device, suggestions
from fp8gate.filter.locate.places import ENVIRONMENT, Place, places

_WITH_INDUCTORS = (
    " With Inductor's casts there is one: leave out --casts and FP8GATE_CASTS, or casts.enable() in Python."
)
MAX_NAMED = 20  # devices that an error names; the table of each is read for its name


class NoTableError(TableError):
    """There is no table of a recipe and casts for a device, wherever it was looked for."""


class MisfiledError(TableError):
    """A table that lies where one of another recipe, casts or device belongs. The message says where it belongs."""


def find_table(
    recipe: Recipe,
    *,
    casts: Casts = "inductor",
    device: str | None = None,
    tables: str | os.PathLike[str] | None = None,
) -> tuple[Table, Path]:
    """The table and the file it came from.

    casts: who compiled those of what was measured. tables: a thresholds folder, a device's folder or a table file; None
    searches all `places`. device: a name as people write it, see `match_device`. None means the device of `tables` if
    that is a file or a device's folder, and otherwise the one that torch sees here, by its exact name.
    Raises NoTableError, a TableError, if there is no such table (the message names the devices that have one), and
    TableError if it is not valid, or if it is for another recipe, device or casts. Raises InputError if a name fits
    several devices, or if no device is named and torch is not installed.
    """
    variant, searched = Variant(recipe, casts), places(tables)
    if tables is not None or len(searched) == 1:
        file = _single_file(searched[0].path, variant)
        if file:
            is_given = file == searched[0].path
            table = _given(file, variant) if is_given else _filed(file, variant)
            if device is not None and match_device(device, [device_slug(table.device.name)]) is None:
                raise TableError(f"{file}: $.device.name: expected {device}, found {table.device.name}")
            return table, file
    name = device or local_device_name()
    slug = _find_slug(searched, variant, device) if device else device_slug(name)
    for place in searched:
        path = place.path / (slug or device_slug(name)) / variant.file
        if os.path.isfile(path):
            table = _filed(path, variant, name)
            _require_this_device(table, path, None if device else name)
            return table, path
    raise NoTableError(_no_table(searched, variant, name))


def table_files(
    location: str | os.PathLike[str] | None = None, *, device: str | None = None, recipe: Recipe | None = None
) -> list[Path]:
    """The files of all tables in a place, or in all `places`, by device and in the order of the recipes.

    location: a thresholds folder, a device's folder or a table file. device: only this device's, named as in
    `find_table`. A file is among them whatever its name. Raises TableError if a location that is given holds no table.
    """
    found: dict[Path, None] = {}
    for place in places(location):
        found.update(dict.fromkeys(_files_in(place.path)))
    files = [file for file in found if recipe is None or file.stem == recipe or os.path.isfile(location or "")]
    if device is not None:
        slug = match_device(device, sorted({file.parent.name for file in files}))
        files = [file for file in files if file.parent.name == slug]
    if not files and location is not None:
        raise TableError(
            f"{location}: expected a table, a device's folder such as thresholds/nvidia-h200, or a folder of those; "
            "found no table"
        )
    return files


def measured_devices(folders: Iterable[Path], variant: Variant) -> list[str]:
    """The devices that have a table of this variant in one of these folders, named as their tables name them.

    A table that cannot be used is named by its path in the folder. Only the first MAX_NAMED tables are read.
    """
    paths = sorted(_by_slug(folders, variant).items())
    more = [f"and {len(paths) - MAX_NAMED} more"] if len(paths) > MAX_NAMED else []
    return [*(_measured_device(path) for _, path in paths[:MAX_NAMED]), *more]


def _single_file(location: Path, variant: Variant) -> Path | None:
    """The table that a place stands for whatever the device: the file itself, or the variant's in a device's folder."""
    if not os.path.isdir(location):  # Path.is_dir raises for a path that is too long
        return location
    if os.path.isfile(location / variant.file):
        return location / variant.file
    if any(os.path.isfile(location / other.file) for other in VARIANTS):
        instead = _WITH_INDUCTORS if os.path.isfile(location / Variant(variant.recipe).file) else ""
        measure = _how_to_measure(variant)
        raise NoTableError(
            f"{location}: no {variant.recipe} table{variant.with_casts} among this device's.{instead} {measure}"
        )
    return None


def _files_in(location: Path) -> Iterator[Path]:
    if not os.path.isdir(location):
        yield location
        return
    order = {variant.file: i for i, variant in enumerate(VARIANTS)}
    own = [path for path in location.glob("*.yaml") if not path.name.startswith(".")]
    found = own or [path for path in location.glob("*/*.yaml") if path.name in order]
    yield from sorted(found, key=lambda path: (path.parent, order.get(path.name, len(order)), path.name))


def _find_slug(searched: Sequence[Place], variant: Variant, device: str) -> str | None:
    return match_device(device, sorted(_by_slug([place.path for place in searched], variant)))


def _by_slug(folders: Iterable[Path], variant: Variant) -> dict[str, Path]:
    """Device slug -> its table of the variant, in the last of these folders that has one."""
    return {path.parent.name: path for folder in folders for path in folder.glob(f"*/{variant.file}")}


def _require_this_device(table: Table, path: Path, name: str | None) -> None:
    """Raises TableError if a name that the driver gave is another device's. None: the user gave the name."""
    if name is not None and table.device.name != name:
        raise TableError(
            f"{path}: $.device.name: expected {name}, found {table.device.name}, another device whose folder has the "
            f"same name; keep the tables of each in a thresholds folder of its own, and name that by {ENVIRONMENT}"
        )


def _measured_device(path: Path) -> str:
    try:
        return read_table(path).device.name
    except TableError:
        return f"{path.parent.name}/{path.name} (no valid table)"


def _given(path: Path, variant: Variant) -> Table:
    """The table of a file that is given, whatever its name. Raises NoTableError if it is of another variant."""
    table = read_table(path)
    found = table.variant
    if found.recipe != variant.recipe:
        raise NoTableError(f"{path}: $.recipe: expected {variant.recipe}, found {found.recipe}")
    if found != variant:
        differs = f"{path}: $.protocol.casts: expected {variant.casts}, found {found.casts}"
        option = f"{differs}: {other_casts_option(found)}"
        raise NoTableError(f"{differs}: {other_casts(found)}", on_command_line=option)
    return table


def _filed(path: Path, variant: Variant, device: str | None = None) -> Table:
    """The table of a file that was found by its name. Raises MisfiledError if it is of another variant or device.

    device: whose folder the file lies in; None if that folder was given.
    """
    table = read_table(path)
    folder = path.parent if device is None else path.parent.with_name(device_slug(table.device.name))
    belongs = folder / table.variant.file
    if belongs == path:
        return table
    if table.recipe != variant.recipe:
        differs = f"$.recipe: expected {variant.recipe}, found {table.recipe}"
    elif table.variant != variant:
        differs = f"$.protocol.casts: expected {variant.casts}, found {table.protocol.casts}"
    else:
        differs = f"$.device.name: expected {device}, found {table.device.name}"
    todo = how_to_file(belongs, is_same=_is_of_same(belongs, table), otherwise="exchange the two")
    raise MisfiledError(f"{path}: {differs}. It belongs in {belongs}{todo}")


def how_to_file(belongs: Path, *, is_same: bool, otherwise: str) -> str:
    """What to do with a misfiled file, so that none is lost. is_same: whether the file that is there is of the same."""
    if not os.path.exists(belongs):
        return ": move it there"
    return ", where there is one already: keep one of them" if is_same else f", where another file is: {otherwise}"


def _is_of_same(path: Path, table: Table) -> bool:
    """Whether the file is a table of the same variant and device."""
    try:
        other = read_table(path)
    except TableError:
        return False
    return (other.variant, device_slug(other.device.name)) == (table.variant, device_slug(table.device.name))


def _no_table(searched: Sequence[Place], variant: Variant, device: str) -> str:
    folders = [place.path for place in searched]
    known = measured_devices(folders, variant)
    alike = suggestions(device, sorted(_by_slug(folders, variant)))
    meant = f" Did you mean {' or '.join(alike)}?" if alike else ""
    if known and not alike:
        meant = " To ask about one of these, name it: --device, or device= in Python."
    if _has_inductors(folders, variant, device):
        meant = f"{_WITH_INDUCTORS}{meant}"
    return (
        f"device: no {variant.recipe} table{variant.with_casts} for {device!r} in {', '.join(map(str, folders))}; "
        f"measured devices: {', '.join(known) or 'none'}.{meant} {_how_to_measure(variant)}"
    )


def _has_inductors(folders: Iterable[Path], variant: Variant, device: str) -> bool:
    """Whether the device has a table of the same recipe with Inductor's casts, where others were asked for."""
    if variant.casts == "inductor":
        return False
    try:
        return match_device(device, sorted(_by_slug(folders, Variant(variant.recipe)))) is not None
    except InputError:  # the name fits several devices
        return False


def _how_to_measure(variant: Variant) -> str:
    return f"To measure this device, run on it: fp8gate calibrate --recipes {variant.recipe}{variant.option}"
