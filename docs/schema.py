"""Write docs/schema/table.schema.json and plan.schema.json: what editors check tables and plans against.

In: the Structs that fp8gate itself reads files with. Out: JSON Schema, draft 2020-12, as msgspec derives it, with what
msgspec cannot know: `schema` must be there, `columns` is fixed, and the docstrings lose their indentation.
Run it: make docs
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec

from fp8gate.filter.contract import table
from fp8gate.filter.contract.plans import plan

FOLDER = Path(__file__).with_name("schema")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[Path, str]:
    """Each schema file and its text."""
    return {
        FOLDER / "table.schema.json": _text(table.Table, table.COLUMNS),
        FOLDER / "plan.schema.json": _text(plan.Plan, plan.COLUMNS),
    }


def _text(kind: type[msgspec.Struct], columns: tuple[str, ...]) -> str:
    return json.dumps(_schema(kind, columns), indent=2) + "\n"


def _schema(kind: type[msgspec.Struct], columns: tuple[str, ...]) -> dict[str, Any]:
    derived = msgspec.json.schema(kind)
    definitions: dict[str, Any] = derived["$defs"]
    for definition in definitions.values():
        if "description" in definition:
            definition["description"] = _for_editors(definition["description"])
    file = definitions.pop(kind.__name__)
    file["properties"]["columns"] = {"const": list(columns)}
    file["required"] = ["schema", *file["required"], "columns"]
    return {"$schema": DIALECT, **file, "$defs": definitions}


def _for_editors(docstring: str) -> str:
    """Without the paragraphs and lines about the errors that Python code raises."""
    text, _, _ = inspect.cleandoc(docstring).partition("\nRaises ")
    return text.strip()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in schemas().items():
        path.write_text(text)
