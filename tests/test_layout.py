"""The house: a folder imports only from those above it, and none holds more than a newcomer takes in at a glance."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_MODULES = 10
FILTER = ("contract", "locate", "model", "observe", "decision", "policy", "planned", "ranks", "", "explain")
"""Each may import from those before it. "": the modules that lie directly in filter/."""
FOR_ALL = "terminal_table"
"""The module directly in filter/ that imports nothing of fp8gate: everything may import it."""
CALIBRATE = (
    "device",
    "timing",
    "arms",
    "processes",
    "points",
    "grid",
    "sweep",
    "ranks",
    "planning",
    "breakdown",
    "comparison",
    "report",
)


def modules() -> list[Path]:
    return sorted(path for folder in ("calibrate", "filter") for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Dotted names of fp8gate's modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def place(parts: tuple[str, ...]) -> int:
    """How far down the house a module is: it may import from what has no higher number."""
    side, *inner = parts
    if inner[:1] == [FOR_ALL]:
        return -1
    if side == "filter":
        return FILTER.index(inner[0] if inner and inner[0] in FILTER else "")
    return len(FILTER) + CALIBRATE.index(inner[0])


def wrong_imports(parts: tuple[str, ...], source: str) -> list[str]:
    """What a module, given by its path's parts, imports from further down."""
    found = []
    for name in imported(source):
        package, *rest = name.split(".")
        if package != "fp8gate" or not rest:
            continue
        if rest[0] == "cli" or (rest[0] in ("calibrate", "filter") and place(tuple(rest)) > place(parts)):
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_above(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts in (("calibrate", "__init__"), ("filter", "__init__")):
        assert not list(imported(path.read_text()))
    else:
        assert wrong_imports(parts, path.read_text()) == []


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("filter", "contract", "table"), "from fp8gate.filter.decision.lookup import Lookup"),
        (("filter", "auto_filter"), "from fp8gate.filter.explain.explanation import explain"),
        (("filter", "auto_filter"), "def f():\n    import fp8gate.calibrate.device.capacity"),
        (("calibrate", "timing", "steady_run"), "from fp8gate.calibrate.sweep import grid"),
        (("calibrate", "report", "page"), "from fp8gate.cli import app"),
    ],
)
def test_an_import_against_the_direction_is_found(parts: tuple[str, ...], source: str) -> None:
    assert len(wrong_imports(parts, source)) == 1


def test_every_folder_has_its_place() -> None:
    for side, known in (("calibrate", CALIBRATE), ("filter", FILTER)):
        folders = {path.name for path in (ROOT / side).iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert {folder for folder in folders if list((ROOT / side / folder).glob("*.py"))} == set(known) - {""}


def test_no_folder_has_more_modules_than_one_takes_in_at_a_glance() -> None:
    package = ROOT / "src" / "fp8gate"
    for folder in {path.parent for path in modules()} | {
        package,
        package / "casts",
        package / "cli",
        package / "torchtitan",
    }:
        found = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(found) <= MAX_MODULES, f"{folder.relative_to(ROOT)}: {sorted(found)}"


def test_the_map_names_every_folder() -> None:
    text = (ROOT / "calibrate" / "__init__.py").read_text()
    assert [line.split("/")[0].strip() for line in text.splitlines() if "/  " in line] == list(CALIBRATE)
