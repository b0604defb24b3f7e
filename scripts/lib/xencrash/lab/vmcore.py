"""The vmcore that the crash kernel leaves on a disk: out of it, with its holes, and how large it must be."""

from __future__ import annotations

import os
from pathlib import Path

from xen_symbols.formats.elf import ELF64, Header


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
        start = stream.read(ELF64.header.size)
        if len(start) < ELF64.header.size or start[:6] != ELF64.ident[:6]:
            return 0
        header = Header(*ELF64.header.unpack(start))
        stream.seek(header.phoff)
        table = stream.read(header.phnum * ELF64.program.size)
    whole = len(table) - len(table) % ELF64.program.size
    return max((segment.offset + segment.filesz for segment in ELF64.programs(table[:whole])), default=0)
