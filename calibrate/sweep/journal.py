"""The append-only journal: what was measured survives Ctrl-C, kill -9 and power loss, and is never measured twice.

Each set-up (device, software, protocol) has its own file beside the tables, `journal-<fingerprint>.jsonl`: a header
line, then one line for each record. Records of different set-ups are never mixed.
"""

from __future__ import annotations

import fcntl
import os
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.setup import Header, Setup
from fp8gate.filter.contract.errors import InputError

_Line = TypeVar("_Line")
_Header = TypeVar("_Header", bound="Header")
_Record = TypeVar("_Record")
_Journal = TypeVar("_Journal", bound="Journal[Any, Any]")


class JournalError(InputError):
    """A journal that cannot be used; the message names the file and the line."""


class Journal(Generic[_Header, _Record]):
    """The records of one set-up, kept in a folder. Open it as a context: one process at a time can.

    fresh: start empty. An earlier journal is kept beside it, as `set_aside`.
    """

    record_type: ClassVar[type]

    def __init__(self, folder: Path, setup: _Header, *, fresh: bool = False) -> None:
        self.path = folder / f"journal-{setup.fingerprint}.jsonl"
        self.setup = setup
        self.fresh = fresh
        self.set_aside: Path | None = None
        self.records: list[_Record] = []

    def __enter__(self: _Journal) -> _Journal:
        """Read what is there; a last line cut short by a kill is dropped.

        Raises JournalError if another process has it open, if a complete line cannot be read, or if the header is
        of another set-up.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise JournalError(f"{self.path}: another sweep is writing to it") from error
        try:
            if self.fresh:
                self._put_aside()
            self._load()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: _Record) -> None:
        """Add a record; on return it is on disk."""
        self._write(record)
        self.records.append(record)

    def others(self) -> list[Path]:
        """Journals of other set-ups in the same folder."""
        return sorted(p for p in self.path.parent.glob("journal-*.jsonl") if p != self.path)

    def _put_aside(self) -> None:
        content = self.path.read_bytes()
        if content:
            now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
            self.set_aside = self.path.with_name(f"{self.path.name}.{now}")
            self.set_aside.write_bytes(content)
            self._file.truncate(0)

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            self._file.truncate(len(complete))
        lines = complete.splitlines()
        if not lines:
            self._write(self.setup)
            return
        if self._decode(lines[0], 1, type(self.setup)) != self.setup:
            raise JournalError(f"{self.path}:1: is of another set-up; expected {self.setup}")
        self.records = [self._decode(line, i, self.record_type) for i, line in enumerate(lines[1:], start=2)]

    def _decode(self, line: bytes, number: int, kind: type[_Line]) -> _Line:
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise JournalError(f"{self.path}:{number}: {error}; --fresh starts a new journal") from error

    def _write(self, line: _Header | _Record) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class SweepJournal(Journal[Setup, PointRecord]):
    """The points of a sweep."""

    record_type = PointRecord
