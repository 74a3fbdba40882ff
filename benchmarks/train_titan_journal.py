"""The files of one setup of benchmarks/train_titan.py. They only grow: a killed writer loses its last line at most."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
from train_titan_output import Header, Setup, Visit
from train_titan_trace import StepTrace


class Journal(NamedTuple):
    """visits: of the timed runs. log: what torchtitan said in all of them."""

    visits: Path
    log: Path

    @classmethod
    def of(cls, setup: Setup, folder: Path) -> Journal:
        return cls(folder / f"{setup.name}.jsonl", folder / f"{setup.name}.log")


def opened(journal: Journal, header: Header) -> tuple[Header, list[Visit]]:
    """Begin a journal, or go on with one. Raises SystemExit if it is of something else."""
    return header, [msgspec.json.decode(line, type=Visit) for line in lines_of(journal.visits, header)]


def lines_of(file: Path, header: Header) -> list[bytes]:
    """The lines after the header, with which a new file begins. Raises SystemExit if it is of something else."""
    cut_to_whole_lines(file)
    if not file.stat().st_size:
        append(file, header)
    first, *lines = file.read_bytes().splitlines()
    found = msgspec.json.decode(first, type=Header)
    for name in header.__struct_fields__:
        if getattr(found, name) != getattr(header, name):
            raise SystemExit(
                f"{file}: {name}: expected {getattr(header, name)}, as this command has it; found "
                f"{getattr(found, name)}; give another folder to --out"
            )
    return lines


def cut_to_whole_lines(file: Path) -> None:
    """Take away a last line that was not written to its end, as its writer was killed."""
    with open(file, "ab+") as opened_file:
        opened_file.seek(0)
        opened_file.truncate(opened_file.read().rfind(b"\n") + 1)


def append(file: Path, line: Header | Visit | StepTrace) -> None:
    with open(file, "ab") as opened_file:
        opened_file.write(msgspec.json.encode(line) + b"\n")
