"""What the tests of the documents share: the scripts in docs/, and the pages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_text(*names: str) -> str:
    """Pages of docs/ as one line, so that a sentence is found wherever its lines break."""
    return " ".join(" ".join((ROOT / "docs" / name).read_text().split()) for name in names)
