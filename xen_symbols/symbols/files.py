"""The bytes of a symbol file, read where they are asked for; gzip is undone in memory."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple, Protocol

from xen_symbols.absence import Undecidable

_LONGEST = 128 << 20  # decompressed; xen-syms with DWARF is 30 MB
ACCEPTED = "--symbols takes xen-syms, its .map, or Xen's image"
_GZIP = b"\x1f\x8b"


class Bytes(Protocol):
    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Raises Undecidable where the file ends before offset + size."""
        ...


class _File(NamedTuple):
    path: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        # Opened anew each time: few reads, no descriptor to own, and no SIGBUS as with a mapping.
        try:
            with open(self.path, "rb", buffering=0) as file:  # noqa: PTH123 (pathlib costs an import)
                data = os.pread(file.fileno(), size, offset) if offset + size <= self.size else b""
        except OSError as error:
            raise _unusable(self.path, error) from None
        return _whole(self.path, data, offset, size, self.size)


class _Memory(NamedTuple):
    path: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return _whole(self.path, self.data[offset : offset + size], offset, size, self.size)


def _whole(path: str, data: bytes, offset: int, size: int, total: int) -> bytes:
    if len(data) != size:
        raise Undecidable(f"{path}: truncated: bytes {offset:#x} to {offset + size:#x} are needed, it has {total:#x}")
    return data


def _unusable(path: str, error: OSError) -> Undecidable:
    return Undecidable(f"{path}: {error.strerror}; {ACCEPTED}")


def open_bytes(path: str) -> Bytes:
    """Raises Undecidable if `path` is not a readable, non-empty regular file."""
    try:
        status = os.stat(path)  # noqa: PTH116
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                magic = file.read(2)
        elif stat.S_ISDIR(status.st_mode):
            raise Undecidable(f"{path}: a directory; {ACCEPTED}")
        else:
            raise Undecidable(f"{path}: not a regular file; {ACCEPTED}")
    except OSError as error:
        raise _unusable(path, error) from None
    if status.st_size == 0:
        raise Undecidable(f"{path}: empty; {ACCEPTED}")
    file_bytes = _File(path, status.st_size)
    return _Memory(path, _gunzip(file_bytes)) if magic == _GZIP else file_bytes


def _gunzip(file: _File) -> bytes:
    import zlib

    inflate = zlib.decompressobj(wbits=31)
    try:
        data = inflate.decompress(file.read(0, file.size), _LONGEST)
    except zlib.error as error:
        raise Undecidable(f"{file.path}: bad gzip data ({error}); fetch the file again") from None
    if not inflate.eof:
        why = "more than 128 MB when decompressed" if len(data) == _LONGEST else "truncated gzip data"
        raise Undecidable(f"{file.path}: {why}; fetch the file again")
    if not data:
        raise Undecidable(f"{file.path}: empty when decompressed; fetch the file again")
    return data
