"""Tables as people name them on a command line: a file, or a folder such as thresholds/nvidia-h200.

In: a path. Out: its tables, by file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fp8gate.filter.contract.plans.plan import PLANS
from fp8gate.filter.contract.plans.plan_file import Plans, read_plans
from fp8gate.filter.contract.recipes import VARIANTS, Variant
from fp8gate.filter.contract.table import Incomplete, Table, TableError, read_table


def read_tables(path: Path) -> dict[Path, Table]:
    """The table of a file, or all tables of a folder. Raises TableError if there is none, or if one cannot be read."""
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    if not files:
        raise TableError(f"{path}: expected a table, or a folder of tables such as thresholds/nvidia-h200; found none")
    return {file: read_table(file) for file in files}


def read_all(folder: Path) -> tuple[dict[Path, Table], dict[Path, Plans]]:
    """All tables and plans under a folder, by file; or the table of a file.

    Raises TableError or PlanError for a file that cannot be used, TableError if there is no table.
    """
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.yaml"))
    of_plans = [path for path in paths if path.parent.name == PLANS]
    tables = {path: read_table(path) for path in paths if path not in of_plans}
    if not tables:
        raise TableError(f"{folder}: expected tables such as nvidia-h200/rowwise.yaml; found none")
    return tables, {path: read_plans(path) for path in of_plans}


def incomplete_of(tables: Mapping[Path, Table]) -> dict[Path, Incomplete]:
    """Those whose sweep was stopped, and how far it came."""
    return {path: table.incomplete for path, table in tables.items() if table.incomplete}


def by_variant(files: Mapping[Path, Table]) -> dict[Variant, tuple[Path, Table]]:
    """The tables of one device, in the order of the recipes. Raises TableError for two of one recipe and casts."""
    found: dict[Variant, tuple[Path, Table]] = {}
    for file, table in files.items():
        if table.variant in found:
            raise TableError(
                f"{file}: $.recipe: expected one table of {table.variant} on {table.device.name}; "
                f"{found[table.variant][0]} is another: fp8gate diff compares two"
            )
        found[table.variant] = file, table
    return {variant: found[variant] for variant in VARIANTS if variant in found}
