"""The vmcore that the crash kernel leaves on a disk: out of it, with its holes, and how large it must be."""

from __future__ import annotations

import os
import struct
from pathlib import Path


def copy_sparse(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes, leaving holes where the source has holes."""
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.truncate(size)
        position = 0
        while position < size:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left (lseek(2))
                break
            stop = min(os.lseek(reader.fileno(), position, os.SEEK_HOLE), size)
            os.lseek(reader.fileno(), position, os.SEEK_SET)
            os.lseek(writer.fileno(), position, os.SEEK_SET)
            while position < stop:
                moved = os.sendfile(writer.fileno(), reader.fileno(), None, min(stop - position, 1 << 24))
                if not moved:
                    raise OSError(5, "the disk ended early")
                position += moved


def elf_size(path: Path) -> int:
    """Where the last segment of an ELF64 core ends: the size of the whole file. 0 if it is no such file."""
    with path.open("rb") as stream:
        header = stream.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return 0
        (offset,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        ends = [0]
        for index in range(count):
            stream.seek(offset + index * size)
            segment = stream.read(56)
            if len(segment) == 56:
                start, _, _, length = struct.unpack_from("<QQQQ", segment, 8)
                ends.append(start + length)
    return max(ends)
