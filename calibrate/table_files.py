"""Tables as people name them on a command line: a file, or a folder such as thresholds/nvidia-h200.

In: a path. Out: its tables, by file.
"""

from __future__ import annotations

from pathlib import Path

from fp8gate.filter.table import Table, TableError, read_table


def read_tables(path: Path) -> dict[Path, Table]:
    """The table of a file, or all of a folder. Raises TableError if there is none, or if one cannot be read."""
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    if not files:
        raise TableError(f"{path}: expected a table, or a folder of tables such as thresholds/nvidia-h200; found none")
    return {file: read_table(file) for file in files}
