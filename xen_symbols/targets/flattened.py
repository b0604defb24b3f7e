"""makedumpfile's flattened format: a dump as a list of writes, for a pipe that cannot seek.

A header block of 4096 bytes, then pieces of {offset, size, bytes}, big-endian; an offset and
a size of -1 end it (makedumpfile's makedumpfile.h, struct makedumpfile_header and
makedumpfile_data_header). QEMU writes kdump this way unless asked for `kdump-raw-*`.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import Content, require
from xen_symbols.formats.extents import Conflict, Extents, Stretch
from xen_symbols.targets import Wrapped

_HEADER = struct.Struct(">16sqq")  # signature, type, version
_HEADER_SIZE = 4096
_PIECE = struct.Struct(">qq")  # offset, size

# The writers gather some 64 KiB to 4 MiB per piece; this many are 64 GB at the worst of them.
_MAX_PIECES = 1 << 21
_MAX_PIECE = 64 << 20  # bytes: no writer gathers more, so that one which claims more is damaged and not cut off


class FlattenedFile(Content):
    """The file that the pieces make up, read in place; a later piece overwrites an earlier one."""

    def __init__(self, content: Content) -> None:
        _, kind, version = _HEADER.unpack(require(content, 0, _HEADER.size, "flattened header"))
        if (kind, version) != (1, 1):
            raise Undecidable(f"a flattened dump of type {kind} and version {version}; type 1, version 1 is known")
        self._content = content
        pieces, self.truncated = _pieces(content)
        try:
            self._pieces = Extents(pieces)
        except Conflict:
            self._pieces = Extents(_layered(pieces))
        self.size = self._pieces.end()
        self._held = list(self._pieces.ranges())

    def read(self, offset: int, size: int) -> bytes:
        whole = self._pieces.position(offset, size)
        if whole is not None:
            return self._content.read(whole, size)
        parts = []
        for position, length in self._pieces.pieces(offset, size):
            if position is None:
                why = f"; {self.truncated}" if self.truncated else ""
                raise Unreadable(f"the flattened dump has nothing at offset {offset:#x} + {size:#x}{why}")
            parts.append(self._content.read(position, length))
        return b"".join(parts)

    def held(self) -> Sequence[tuple[int, int]]:
        return self._held


def read_dump(content: Content) -> Wrapped:
    """The file that the pieces make up. Raises Undecidable."""
    return Wrapped("flattened", FlattenedFile(content))


def _pieces(content: Content) -> tuple[list[Stretch], str | None]:
    """Every piece as (offset, end, position), in file order, and whether the file ends before its end mark."""
    pieces: list[Stretch] = []
    at = _HEADER_SIZE
    while True:
        try:
            offset, size = _PIECE.unpack(content.read(at, _PIECE.size))
        except Unreadable:
            if not pieces:
                why = f"a flattened dump that ends at offset {content.size:#x}, before its first record"
                raise Undecidable(why) from None
            return pieces, f"the file is truncated: it ends at offset {content.size:#x}, without its end mark"
        if offset == size == -1:
            return pieces, None
        at += _PIECE.size
        rest = content.size - at
        if offset < 0 or size <= 0 or (size > rest and size > _MAX_PIECE):
            raise Undecidable(
                f"the flattened piece at {at - _PIECE.size:#x} claims {size} bytes for offset {offset}, "
                f"the file ends at {content.size:#x}; the file is truncated or damaged"
            )
        if len(pieces) == _MAX_PIECES:
            raise Undecidable(f"more than {_MAX_PIECES} flattened pieces; rearrange it first with makedumpfile -R")
        if rest:
            pieces.append((offset, offset + min(size, rest), at))
        at += size


def _layered(stretches: Sequence[Stretch]) -> Iterator[Stretch]:
    """The same address space where a later stretch overwrites an earlier one, made disjoint."""
    order = sorted(range(len(stretches)), key=lambda index: stretches[index][0])
    points = sorted({point for start, end, _ in stretches for point in (start, end)})
    active: list[int] = []  # indices negated: the latest stretch comes first
    upcoming = 0
    for left, right in pairwise(points):
        while upcoming < len(order) and stretches[order[upcoming]][0] == left:
            heapq.heappush(active, -order[upcoming])
            upcoming += 1
        while active and stretches[-active[0]][1] <= left:
            heapq.heappop(active)
        if active:
            start, _, position = stretches[-active[0]]
            yield left, right, position + left - start
