"""Read a file that somebody named: a regular file of bounded size. Anything else is refused at once."""

from __future__ import annotations

import os
import stat

BLOCK_BYTES = 2**20


class UnreadableError(ValueError):
    """Why a file cannot be read. The message does not name the file."""


def read_utf8(path: str | os.PathLike[str], *, at_most: int) -> str:
    """A file's text, with line breaks as "\\n". Raises UnreadableError; at_most: bytes."""
    content = read_regular(path, at_most=at_most).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise UnreadableError(str(cause)) from cause


def read_regular(path: str | os.PathLike[str], *, at_most: int) -> bytes:
    """A regular file's content. Raises UnreadableError for a folder, a pipe, a device, and for more bytes than at_most.

    A pipe that takes the file's place after the check does not make the reader wait: the file is opened non-blocking.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableError("expected a regular file, not a folder, a pipe or a device")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            content = _read(descriptor, at_most + 1)
        finally:
            os.close(descriptor)
    except OSError as cause:
        raise UnreadableError(cause.strerror) from cause
    except ValueError as cause:  # a path with a null character, or with a character that no file name can have
        raise UnreadableError(str(cause)) from cause
    if len(content) > at_most:
        raise UnreadableError(f"expected at most {at_most:,} bytes")
    return content


def _read(descriptor: int, at_most: int) -> bytes:
    """Up to this many bytes. One call of `os.read` may give fewer."""
    blocks, missing = [], at_most
    while missing and (block := os.read(descriptor, min(missing, BLOCK_BYTES))):
        blocks.append(block)
        missing -= len(block)
    return b"".join(blocks)
