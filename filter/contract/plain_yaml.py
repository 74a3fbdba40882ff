"""The one reader and writer of YAML, for tables, plans and grids. It reads plain data only.

In: a file or a text, of anyone. Out: plain data, or an error of the caller's type that names the file and the field.
How a text is read in bounded time and memory is in `reading/`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from fp8gate.filter.contract.reading.file_bytes import UnreadableError, read_utf8
from fp8gate.filter.contract.reading.plain_values import require_plain_values
from fp8gate.filter.contract.reading.yaml_data import MAX_CHARACTERS, read_yaml

Kind = TypeVar("Kind")

SCHEMA = 1
SIGNIFICANT_DIGITS = 4  # two sweeps differ by 0.6 % (median): a fifth digit would be noise in every diff


def read_text(path: str | os.PathLike[str], error: type[ValueError], *, at_most: int = MAX_CHARACTERS) -> str:
    """A file's text. Raises `error` if it cannot be read, is no regular file, or has more than `at_most` bytes."""
    try:
        return read_utf8(path, at_most=at_most)
    except UnreadableError as cause:
        raise error(f"{path}: cannot be read: {cause}") from cause


def load_plain_yaml(text: str, *, source: str, error: type[ValueError]) -> Any:
    """Parse YAML. It must be plain data: `reading.yaml_data` and `reading.plain_values` say what that is.

    Raises `error`, with the source and the line or the field, for anything else.
    """
    try:
        with collections_paused():
            data = read_yaml(text)
    except yaml.YAMLError as cause:
        raise error(f"{source}: not plain YAML data: {' '.join(str(cause).split())}") from cause
    require_plain_values(data, source=source, error=error, on_one_line=True)
    return data


@contextlib.contextmanager
def collections_paused() -> Iterator[None]:
    """For what makes many objects and no garbage: a collection would visit every object of the process, torch's too."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def require_schema(data: Any, *, source: str, error: type[ValueError]) -> None:
    """Raise `error` if the file has another schema. Call this before the fields are checked: they would all differ."""
    if isinstance(data, dict) and data.get("schema") != SCHEMA:
        found = data.get("schema", "nothing")
        raise error(f"{source}: $.schema: expected {SCHEMA}, the version this fp8gate reads; found {found}")


def convert(data: Any, kind: type[Kind], *, source: str, error: type[ValueError]) -> Kind:
    """Plain data as `kind`. Raises `error`, with the source and the field, if it does not fit."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as cause:
        raise error(f"{source}: {cause}") from cause


def write_atomically(texts: Mapping[Path, str]) -> None:
    """Replace all of these files, or none if one of them cannot be. A file holds its old or its new text at any moment.

    Raises OSError, which names the file. New files have the permissions that the umask leaves.
    """
    temporaries: dict[Path, Path] = {}
    earlier: dict[Path, Path | None] = {}
    replaced: list[Path] = []
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporaries[path] = _beside(path)
            write_new(temporaries[path], text.encode())
            earlier[path] = _linked(path)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
            replaced.append(path)
    except BaseException:
        for path in replaced:
            _put_back(path, earlier[path])
        raise
    finally:
        for leftover in (*temporaries.values(), *filter(None, earlier.values())):
            leftover.unlink(missing_ok=True)
    for folder in {path.parent for path in texts}:
        fsync_folder(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError, such as that of a full disk, name the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; on return it is on disk. Raises OSError, which names the file."""
    with naming(path), open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Bring the rename to disk, not only the file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def yaml_line(key: str, value: Any) -> str:
    """`key: value` on one line, however long it is."""
    if key == "measured_at":  # already ISO 8601; PyYAML would quote the string
        return f"{key}: {value}\n"
    text: str = yaml.safe_dump({key: value}, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.strip()[1:-1] + "\n"


def round_to_measured(value: float) -> float:
    """Round to the digits that a measurement carries."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def format_number(value: float | None) -> str:
    """A rounded YAML float. It always has a dot, as YAML 1.1 reads a number such as 1e5 as text."""
    if value is None:
        return "null"
    text = repr(round_to_measured(value))
    return text if "." in text else text.replace("e", ".0e")


def _beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}")


def _linked(path: Path) -> Path | None:
    """Another name for the file that is there, under which it can be put back; None if there is none."""
    other = _beside(path)
    try:
        os.link(path, other)
    except FileNotFoundError:
        return None
    return other


def _put_back(path: Path, earlier: Path | None) -> None:
    if earlier is None:
        path.unlink()
    else:
        os.replace(earlier, path)
