"""Copying a file with its holes: memory and disks of machines are mostly holes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)


def data_ranges(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each range of the first `size` bytes that is not a hole (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        if start >= size:
            return
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end


def blocks(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """(place, content) of each block of a file that is not all zeros, wherever the file system has made holes."""
    done = 0
    for start, end in data_ranges(descriptor, os.fstat(descriptor).st_size):
        for at in range(max(done, start - start % _BLOCK), end, _BLOCK):
            block = os.pread(descriptor, _BLOCK, at)
            if block != _ZEROS[: len(block)]:
                yield at, block
            done = at + _BLOCK


def copy_packed(source: Path, target: Path) -> None:
    """Copy a file, with holes wherever it has blocks of zeros."""
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.truncate(os.fstat(reader.fileno()).st_size)
        for at, block in blocks(reader.fileno()):
            os.pwrite(writer.fileno(), block, at)


def copy_sparse(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes, leaving holes where the source has holes."""
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.truncate(size)
        for start, end in data_ranges(reader.fileno(), size):
            copy_range(reader.fileno(), writer.fileno(), start, end)


def copy_range(reader: int, writer: int, start: int, end: int) -> None:
    """Copy the bytes from `start` to `end` to the same place."""
    os.lseek(reader, start, os.SEEK_SET)
    os.lseek(writer, start, os.SEEK_SET)
    while start < end:
        moved = os.sendfile(writer, reader, None, min(end - start, 1 << 24))
        if not moved:
            raise OSError(5, "the disk ended early")
        start += moved
