"""The bytes of a file, read on demand."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Protocol

from xen_symbols.absence import Undecidable, Unreadable

FILE_END = 1 << 63  # no file is longer: off_t has 64 bits with a sign


class Content(Protocol):
    """Bytes by offset, whatever they are wrapped in."""

    size: int
    truncated: str | None = None  # what shows, in the bytes that hold it, that it lost its end

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises Unreadable where they are not all there."""
        ...

    def held(self) -> Sequence[tuple[int, int]]:
        """(start, end) of what there is below `size`, ascending; the rest was lost."""
        return [(0, self.size)]


class WrongFile(Undecidable):
    """Not a file of the kind that is asked for: one clause that says what it is. Who asked for it adds what to give."""


class File(Content):
    """A regular file, of which nothing is read but what is asked for.

    Not mapped: the kernel maps the neighbours of each page that is touched, 41 MB for a few words of each of 4096 CPUs,
    and a file that shrinks would end the process with SIGBUS.
    """

    _fd = -1

    def __init__(self, path: str) -> None:
        """Raises OSError, and WrongFile."""
        # O_NONBLOCK: a FIFO must be refused, not waited for.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise WrongFile("a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        self.size = status.st_size
        if not self.size:
            raise WrongFile("empty")

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise _beyond(self.size, offset, size)
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise Unreadable(f"{size} bytes at offset {offset:#x} of the file: {error.strerror}") from None
        if len(data) != size:
            raise Unreadable(f"the file shrank while it was read: {len(data)} of {size} bytes at offset {offset:#x}")
        return data

    def written(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what is not a hole of a sparse file: holes read as zeros, and need not be read for that."""
        end = 0
        try:
            while end < self.size:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
                yield start, min(end, self.size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a hole up to the end; else a file system without SEEK_DATA
                yield end, self.size


class Held(Content):
    """Content that is in memory: what a compressed file had."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise _beyond(self.size, offset, size)
        return self._data[offset : offset + size]


def _beyond(end: int, offset: int, size: int) -> Unreadable:
    return Unreadable(f"the file ends at {end:#x}, {size} bytes are wanted at offset {offset:#x}")


def start_of(content: Content, size: int) -> bytes:
    """The first bytes, at most `size`."""
    return content.read(0, min(size, content.size))


def as_held(content: Content, offset: int, size: int) -> bytes:
    """Of these bytes those from the first on that there are: fewer where the file lost its end."""
    for start, end in content.held():
        if start <= offset < end:
            return content.read(offset, min(size, end - offset))
    return b""


def ends_early(content: Content, wanted: int, what: str) -> str:
    """In words, that a file lost its end: `what` of it would end at offset `wanted`."""
    return content.truncated or f"the file is truncated: it ends at offset {content.size:#x}, its {what} at {wanted:#x}"


def require(content: Content, offset: int, size: int, what: str) -> bytes:
    """Bytes without which the file means nothing; raises Undecidable that names `what`."""
    try:
        return content.read(offset, size)
    except Unreadable as error:
        raise Undecidable(f"{what}: {error}; the file is truncated or damaged") from None
