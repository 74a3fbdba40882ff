"""The append-only journal: what was measured survives Ctrl-C, kill -9 and power loss, and is never measured twice.

Each set-up (device, software, protocol) has its own file beside the tables, `journal-<fingerprint>.jsonl`: a header
line, then one line for each record. Records of different set-ups are never mixed. Each line is a JSON array of a
checksum and of the content that it is of, `["3d2a90f1", {...}]`: a line that was changed after it was written is an
error, never a number.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import zlib
from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.setup import Header, Setup
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plain_yaml import fsync_folder, naming, write_new
from fp8gate.filter.contract.recipes import Recipe

START_ANEW = "--fresh starts a new journal and keeps this one beside it"
_REPLACES = "replaces"
"""A key of the header beside those of the set-up."""


class JournalRecord(Protocol):
    """What a journal keeps."""

    def problem(self) -> str | None:
        """What is inconsistent in it, or None: types alone do not tell."""


_Line = TypeVar("_Line")
_Header = TypeVar("_Header", bound="Header")
_Record = TypeVar("_Record", bound=JournalRecord)
_Journal = TypeVar("_Journal", bound="Journal[Any, Any]")


class JournalError(InputError):
    """A journal that cannot be used; the message names the file and the line."""


class Journal(Generic[_Header, _Record]):
    """The records of one set-up, kept in a folder. Open it as a context: one process at a time can.

    fresh: start empty. An earlier journal is kept beside it, as `set_aside`. replaces: the recipes whose earlier tables
    a fresh start is to replace. The header keeps them: a call that goes on with the journal finds them in `replaces`.
    had_no_checksums: it was written by a release before checksums; its lines were taken as they are, and now have
    checksums.
    """

    record_type: ClassVar[type]

    def __init__(self, folder: Path, setup: _Header, *, fresh: bool = False, replaces: Collection[Recipe] = ()) -> None:
        self.path = folder / f"journal-{setup.fingerprint}.jsonl"
        self.setup = setup
        self.fresh = fresh
        self.replaces = tuple(replaces) if fresh else ()
        self.set_aside: Path | None = None
        self.had_no_checksums = False
        self.records: list[_Record] = []

    def __enter__(self: _Journal) -> _Journal:
        """Read what is there. A last line that a kill has cut short is dropped.

        Raises JournalError if another process has the journal open, if it is no regular file, if a complete line was
        changed or does not hold what it should, or if the header is of another set-up. It is then left as it is.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_regular(self.path)
        try:
            self._lock()
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
        """Add a record; on return it is on disk. Raises OSError, with the file's name, if it cannot be."""
        self._write(_format(record))
        self.records.append(record)

    def others(self) -> list[Path]:
        """Journals of other set-ups in the same folder."""
        return sorted(p for p in self.path.parent.glob("journal-*.jsonl") if p != self.path)

    def remarks(self) -> Iterator[str]:
        """What became of the journal that was there before."""
        if self.set_aside:
            yield f"the earlier journal is kept as {self.set_aside}"
        if self.had_no_checksums:
            yield f"warning: {self.path} had no checksums: its lines were taken as they are, and have them now"

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"{self.path}: another sweep is writing to it") from error

    def _put_aside(self) -> None:
        content = self._content()
        if content:
            now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
            self.set_aside = self.path.with_name(f"{self.path.name}.{now}")
            write_new(self.set_aside, content)
            self._file.truncate(0)

    def _content(self) -> bytes:
        self._file.seek(0)
        content: bytes = self._file.read()
        return content

    def _load(self) -> None:
        """Nothing in the file is changed before all of it has been read and found right."""
        content = self._content()
        complete = content[: content.rfind(b"\n") + 1]
        header, *lines = complete.split(b"\n")[:-1] or [b""]
        if not complete:
            self._file.truncate(0)
            self._write(self._header())
            fsync_folder(self.path.parent)
            return
        self.had_no_checksums = header.startswith(b"{")
        if self._parse_header(header) != self.setup:
            raise JournalError(f"{self.path}:1: is of another set-up; expected {self.setup}; {START_ANEW}")
        self.records = [self._parse_record(line, i) for i, line in enumerate(lines, start=2)]
        if self.had_no_checksums:
            self._add_checksums()
        elif len(complete) < len(content):
            self._file.truncate(len(complete))

    def _header(self) -> bytes:
        content = msgspec.to_builtins(self.setup)
        return _format({**content, _REPLACES: self.replaces} if self.replaces else content)

    def _parse_header(self, line: bytes) -> _Header:
        content = self._parse(line, 1, dict[str, Any])
        try:
            self.replaces = msgspec.convert(content.pop(_REPLACES, ()), tuple[Recipe, ...])
            return msgspec.convert(content, type(self.setup))
        except msgspec.ValidationError as error:
            raise JournalError(f"{self.path}:1: {error}; {START_ANEW}") from error

    def _parse_record(self, line: bytes, number: int) -> _Record:
        record: _Record = self._parse(line, number, self.record_type)
        if problem := record.problem():
            raise JournalError(f"{self.path}:{number}: {problem}; {START_ANEW}")
        return record

    def _parse(self, line: bytes, number: int, kind: type[_Line]) -> _Line:
        try:
            return msgspec.json.decode(line if self.had_no_checksums else content_of(line), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise JournalError(f"{self.path}:{number}: {error}; {START_ANEW}") from error

    def _add_checksums(self) -> None:
        """Replace a journal without checksums by one with the same records, and go on with that one."""
        text = b"".join([self._header(), *map(_format, self.records)])
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            write_new(temporary, text)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(self.path.parent)
        old, self._file = self._file, _open_regular(self.path)
        self._lock()
        old.close()

    def _write(self, line: bytes) -> None:
        """All of the line or nothing: part of one would be taken for damage by the next record."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            with naming(self.path):
                _write_all(self._file, line)
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise


class SweepJournal(Journal[Setup, PointRecord]):
    """The points of a sweep."""

    record_type = PointRecord


def _format(line: msgspec.Struct | Any) -> bytes:
    content = msgspec.json.encode(line)
    return b'["' + _checksum(content) + b'", ' + content + b"]\n"


def content_of(line: bytes) -> bytes:
    """The content of a line whose checksum is right. Raises msgspec.DecodeError for another one."""
    checksum, content = line[2:10], line[13:-1]
    if (line[:2], line[10:13], line[-1:]) != (b'["', b'", ', b"]") or checksum != _checksum(content):
        raise msgspec.DecodeError("the line was changed after it was written: its checksum does not fit")
    return content


def _checksum(content: bytes) -> bytes:
    """CRC-32: it tells every change of a few bytes that lie together, which is what disks and editors do."""
    return b"%08x" % zlib.crc32(content)


def _open_regular(path: Path) -> Any:
    """Open a file to read and append. Raises JournalError for a link, a pipe or a device, which lead elsewhere."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise JournalError(f"{path}: expected a regular file, found a symbolic link") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise JournalError(f"{path}: expected a regular file, found something else")
    return os.fdopen(handle, "r+b", buffering=0)  # what could not be written must not come later


def _write_all(file: Any, content: bytes) -> None:
    """On return it is on disk."""
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())
