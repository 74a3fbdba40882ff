"""The one reader and writer of YAML, for tables, plans and grids. It reads plain data only.

In: a file or a text. Out: plain data, or an error of the caller's type that names the file and the line.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgspec
import yaml

SCHEMA = 1
SIGNIFICANT_DIGITS = 4  # two sweeps differ by 0.6 % (median): a fifth digit would be noise in every diff


def read_text(path: str | os.PathLike[str], error: type[ValueError]) -> str:
    """A file's text. Raises `error` if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path}: cannot be read: {cause}") from cause


def load_plain_yaml(text: str, *, source: str, error: type[ValueError]) -> Any:
    """Parse YAML. It must be plain data, without other tags and without a key that a mapping has twice.

    Raises `error`, with the source and the line, for anything else.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # parsing makes no garbage, and a collection would visit every object of the process, torch's too
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as cause:
        # PyYAML's constructors raise the last five if an explicit tag does not fit its value.
        raise error(f"{source}: not plain YAML data: {' '.join(str(cause).split())}") from cause
    finally:
        if was_enabled:
            gc.enable()


def require_schema(data: Any, *, source: str, error: type[ValueError]) -> None:
    """Raise `error` if the file has another schema. Call this before the fields are checked: they would all differ."""
    if isinstance(data, dict) and data.get("schema") != SCHEMA:
        found = data.get("schema", "nothing")
        raise error(f"{source}: $.schema: expected {SCHEMA}, the version this fp8gate reads; found {found}")


def convert(data: Any, kind: type[msgspec.Struct], *, source: str, error: type[ValueError]) -> Any:
    """Plain data as `kind`. Raises `error`, with the source and the field, if it does not fit."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as cause:
        raise error(f"{source}: {cause}") from cause


def write_atomically(path: Path, text: str) -> None:
    """Replace the file. At every moment it holds either the old text or the new one."""
    import tempfile  # imported here, as code that only reads should not wait for it

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared table from everyone else
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


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


def _fsync_folder(folder: Path) -> None:
    """Bring the rename to disk, not only the file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is 10 times faster, and optional


class _PlainLoader(_FastLoader):  # type: ignore[misc, valid-type]
    """Constructs plain data. It refuses a key that is there twice, as PyYAML would drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {sorted(twice)[0]!r} is there twice", node.start_mark
            )
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")
_PlainLoader.yaml_constructors = {
    f"tag:yaml.org,2002:{tag}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{tag}"] for tag in _PLAIN_TAGS
}
_PlainLoader.yaml_constructors[None] = yaml.SafeLoader.yaml_constructors[None]  # construct_undefined: raises
