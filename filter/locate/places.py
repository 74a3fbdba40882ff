"""The places where tables and plans lie: where they are searched, and where new ones are written.

In: nothing, or the place that the user names. Out: folders. A thresholds folder holds `<device slug>/<recipe>.yaml` and
`<device slug>/plans/*.yaml`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fp8gate.filter.contract.errors import InputError

ENVIRONMENT = "FP8GATE_THRESHOLDS"
THRESHOLDS = "thresholds"
IN_A_CHECKOUT = ("pyproject.toml", "calibrate", "filter", THRESHOLDS)


class Place(NamedTuple):
    """A thresholds folder, a device's folder or a table file. what: what it is to the user, for messages."""

    path: Path
    what: str


def places(tables: str | os.PathLike[str] | None = None) -> list[Place]:
    """Where tables and plans are searched, in order. Each exists, except one that the user names.

    tables: the only place, if it is given. Otherwise the only place is the one that FP8GATE_THRESHOLDS names, if it is
    set. Otherwise there are the checkout that the process runs in, the user's folder, and the package.
    """
    if named := tables or os.environ.get(ENVIRONMENT):
        return [Place(Path(named).expanduser(), "tables" if tables else ENVIRONMENT)]
    return list(_default_places())


def shown(path: str | os.PathLike[str]) -> str:
    """A file as messages show it: from the working directory on, or from the place on that it lies in."""
    file = Path(path)
    here = [(Path.cwd(), "")] if os.path.isdir(".") else []
    for folder, what in (*here, *((place.path, f" ({place.what})") for place in _default_places())):
        if file.is_relative_to(folder):
            return f"{file.relative_to(folder)}{what}"
    return str(path)


def is_searched(folder: Path) -> bool:
    """Whether tables in a thresholds folder are found without being told, once they are there."""
    return os.path.realpath(folder) in {os.path.realpath(path) for path in (default_out(), *(p.path for p in places()))}


def default_out() -> Path:
    """Where `calibrate` and `plan` write unless told otherwise, and where the filter then finds it.

    The folder that FP8GATE_THRESHOLDS names, if it is set; the checkout's, if the process runs in one; or the user's.
    Raises InputError if FP8GATE_THRESHOLDS names a single table or a single device's folder.
    """
    named = os.path.expanduser(os.environ.get(ENVIRONMENT, ""))
    if not named:
        return checkout_thresholds() or user_thresholds()
    if os.path.isfile(named) or any(Path(named).glob("*.yaml")):
        raise InputError(f"{ENVIRONMENT}: expected a folder of device folders to write to, got {named}; give --out")
    return Path(named)


def checkout_thresholds() -> Path | None:
    """The thresholds folder of the fp8gate checkout that the working directory lies in, or None."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return None
    for folder in (here, *here.parents):
        if all(os.path.exists(folder / name) for name in IN_A_CHECKOUT):
            return folder / THRESHOLDS
    return None


def user_thresholds() -> Path:
    """The thresholds folder among the user's data. It may not exist yet."""
    from platformdirs import user_data_path

    return user_data_path("fp8gate", appauthor=False) / THRESHOLDS


def packaged_thresholds() -> Path:
    """The thresholds folder that comes with fp8gate."""
    from importlib import resources  # takes longer to import than all of fp8gate

    return Path(str(resources.files("fp8gate") / THRESHOLDS))


def _default_places() -> Iterator[Place]:
    checkout = checkout_thresholds()
    candidates = [Place(checkout, "this checkout")] if checkout else []
    candidates += [Place(user_thresholds(), "your own"), Place(packaged_thresholds(), "packaged")]
    seen = set()
    for place in candidates:
        real = os.path.realpath(place.path)
        if real not in seen and os.path.isdir(real):
            seen.add(real)
            yield place
