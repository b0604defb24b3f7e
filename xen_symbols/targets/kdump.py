"""Kdump-compressed dumps, as makedumpfile and QEMU's dump-guest-memory write them.

makedumpfile's IMPLEMENTATION and diskdump_mod.h: block 0 a header, then the sub header, two
bitmaps by page frame (memory; memory that is in the dump), one descriptor per dumped page in
ascending order, and the pages. A page that its writer found to be zero is in the second bitmap
and shares one page of zeros, so zeros read from here were zeros in memory; a page that was
excluded is in the first bitmap only, and is absent.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.compression import LZO, SNAPPY, ZLIB, ZSTD, decompress, missing
from xen_symbols.formats.content import Content, require
from xen_symbols.formats.elfnotes import Note
from xen_symbols.formats.extents import Ranges
from xen_symbols.targets import Memory, Opened, bounded
from xen_symbols.targets.notes import of_a_machine, parse_notes
from xen_symbols.x86.paging import PAGE_SIZE

# signature, version, utsname (six of 65 bytes; machine is the fifth), timestamp, status, block size,
# blocks of sub header, blocks of bitmaps, frames
_HEADER = struct.Struct("<8sI260x65s65x6x16xIIIII")
# phys_base, dump level, split, start, end, (offset, size) of vmcoreinfo, notes, erase info, start, end, frames
_SUB_HEADER = struct.Struct("<QIIQQQQQQQQQQQ")
_DESCRIPTOR = struct.Struct("<QIIQ")  # offset, size, compression, page flags
# A page's, and the header's of all (diskdump_mod.h, DUMP_DH_COMPRESSED_*).
_COMPRESSIONS = {0x01: ZLIB, 0x02: LZO, 0x04: SNAPPY, 0x20: ZSTD}
_INCOMPLETE = 0x8  # in the header's status, beside the compressions: the writer ran out of space

_MAX_FRAMES = 1 << 34  # 64 TiB
_MAX_NOTE_BYTES = 16 << 20
_CHUNK = 4096  # bytes of bitmap for each entry of the rank table
_CACHED_PAGES = 512
_LAST_DESCRIPTORS = 1024


class KdumpMemory(Memory):
    """Physical memory by page frame; the pages decompressed last are kept."""

    def __init__(self, content: Content) -> None:
        signature = require(content, 0, _HEADER.size, "kdump header")
        _, version, machine, status, block_size, sub_blocks, bitmap_blocks, frames = _HEADER.unpack(signature)
        machine = machine.split(b"\0", 1)[0]
        if machine not in (b"", b"x86_64", b"Unknown"):  # the last is what QEMU 10.0 writes
            raise Undecidable(f"a kdump of a machine of type {machine.decode('latin-1')!r}; x86_64 is needed")
        if block_size != PAGE_SIZE:
            raise Undecidable(f"kdump header +0x1ac: blocks of {block_size} bytes; x86-64 has {PAGE_SIZE}")
        if lacking := missing(codec for flag, codec in _COMPRESSIONS.items() if status & flag):
            raise Undecidable(lacking)
        sub = _SUB_HEADER.unpack(require(content, PAGE_SIZE, _SUB_HEADER.size, "kdump sub header"))
        if sub[2]:
            raise Undecidable("one file of a split dump; put all of them together with makedumpfile --reassemble")
        if version >= 6:
            frames = sub[13]
        if frames > _MAX_FRAMES:
            raise Undecidable(f"kdump header: {frames:#x} page frames; more than {_MAX_FRAMES:#x} are not believable")
        bitmaps_at, bitmaps_size = (1 + sub_blocks) * PAGE_SIZE, bitmap_blocks * PAGE_SIZE
        if bitmaps_at + bitmaps_size > content.size:
            raise Undecidable(
                f"kdump header +0x1b4: the bitmaps end at offset {bitmaps_at + bitmaps_size:#x}, "
                f"the file at {content.size:#x}; the file is truncated or damaged"
            )
        if bitmaps_size * 8 < frames:
            raise Undecidable(
                f"kdump header +0x1b4: {bitmap_blocks} blocks of bitmaps for {frames:#x} frames; the file is damaged"
            )
        both = bitmaps_size // 2 * 8 >= frames
        self._content, self._frames = content, frames
        self._memory_at, self._dumped_at = bitmaps_at, bitmaps_at + (bitmaps_size // 2 if both else 0)
        self._descriptors_at = bitmaps_at + bitmaps_size
        self._notes_at = sub[7:9] if version >= 4 else (0, 0)
        self._pages: dict[int, bytes] = {}
        self._rank = self._count()
        self.incomplete = bool(status & _INCOMPLETE)
        if not self.incomplete:
            self._check_end()

    def notes(self) -> list[Note]:
        """The ELF notes that the writer took over from its input."""
        offset, size = self._notes_at
        if size > _MAX_NOTE_BYTES:
            raise Undecidable(
                f"kdump sub header +0x38: {size} bytes of notes; {_MAX_NOTE_BYTES} is the most believable"
            )
        if not size:
            return []
        return of_a_machine(parse_notes(require(self._content, offset, size, "kdump notes"), "kdump notes"))

    def read(self, address: int, size: int) -> bytes:
        first, start = divmod(address, PAGE_SIZE)
        if 0 <= size <= PAGE_SIZE - start:
            return self._page(first)[start : start + size]
        bounded(address, size)
        last = (address + size - 1) // PAGE_SIZE
        return b"".join(self._page(frame) for frame in range(first, last + 1))[start : start + size]

    def ranges(self) -> Ranges:
        """The pages of the second bitmap, a range per run of them."""
        starts, ends = array("Q"), array("Q")
        for start, end in self._runs():
            starts.append(start * PAGE_SIZE)
            ends.append(end * PAGE_SIZE)
        return Ranges(starts, ends)

    def _page(self, frame: int) -> bytes:
        page = self._pages.pop(frame, None)
        if page is None:
            try:
                page = self._load(frame)
            except Unreadable as error:
                raise Unreadable(f"physical {frame * PAGE_SIZE:#x}: {error}", error.absent.kind) from None
            if len(self._pages) >= _CACHED_PAGES:
                del self._pages[next(iter(self._pages))]
        self._pages[frame] = page  # the last used is the last in the dict
        return page

    def _load(self, frame: int) -> bytes:
        if not 0 <= frame < self._frames or not self._bit(self._memory_at, frame):
            raise Unreadable("the dump has no memory there")
        if not self._bit(self._dumped_at, frame):
            raise Unreadable("the page was left out when the dump was written")
        at = self._descriptors_at + self._dumped_before(frame) * _DESCRIPTOR.size
        offset, size, compression, _ = _DESCRIPTOR.unpack(self._content.read(at, _DESCRIPTOR.size))
        if not 0 < size <= PAGE_SIZE or (not compression and size != PAGE_SIZE):
            raise Unreadable(f"bad page descriptor at offset {at:#x}: {size} bytes, compression {compression:#x}")
        data = self._content.read(offset, size)
        if not compression:
            return data
        if compression not in _COMPRESSIONS:
            raise Unreadable(f"unknown compression {compression:#x}")
        return decompress(_COMPRESSIONS[compression], data, PAGE_SIZE)

    def _bit(self, bitmap: int, frame: int) -> int:
        return self._content.read(bitmap + frame // 8, 1)[0] >> frame % 8 & 1

    def _count(self) -> array[int]:
        """Dumped pages before each chunk of the second bitmap, and in all of it."""
        rank, total = array("Q", [0]), 0
        for chunk in self._chunks():
            total += int.from_bytes(chunk, "little").bit_count()
            rank.append(total)
        return rank

    def _chunks(self) -> Iterator[bytes]:
        size = -(-self._frames // 8)
        for at in range(0, size, _CHUNK):
            yield self._content.read(self._dumped_at + at, min(_CHUNK, size - at))

    def _dumped_before(self, frame: int) -> int:
        index, bits = divmod(frame, _CHUNK * 8)
        part = self._content.read(self._dumped_at + index * _CHUNK, -(-bits // 8))
        return self._rank[index] + (int.from_bytes(part, "little") & (1 << bits) - 1).bit_count()

    def _check_end(self) -> None:
        """Refuse a file that lost its end: the last page's bytes are the last ones in the file."""
        count = self._dumped_before(self._frames)
        tail = min(count, _LAST_DESCRIPTORS)
        pages_at = self._descriptors_at + count * _DESCRIPTOR.size
        what = f"the descriptors of {count} kdump pages"
        table = require(self._content, pages_at - tail * _DESCRIPTOR.size, tail * _DESCRIPTOR.size, what)
        for offset, size, _, _ in reversed(list(_DESCRIPTOR.iter_unpack(table))):
            if offset != pages_at:  # where the writers put the page of zeros that all such pages share
                if offset + size > self._content.size:
                    raise Undecidable(
                        f"kdump: the last page ends at offset {offset + size:#x}, the file at {self._content.size:#x}; "
                        "the file is truncated or damaged"
                    )
                return

    def _runs(self) -> Iterator[tuple[int, int]]:
        """(first, end) of each run of set bits in the second bitmap, in frames."""
        start = -1  # of the run that is open
        frame = 0
        for chunk in self._chunks():
            if chunk.count(0 if start < 0 else 0xFF) == len(chunk):  # nothing changes in it
                frame += len(chunk) * 8
                continue
            for byte in chunk:
                if byte != (0 if start < 0 else 0xFF):
                    for bit in range(8):
                        if bool(byte >> bit & 1) != (start >= 0):
                            if start >= 0:
                                yield start, frame + bit
                                start = -1
                            else:
                                start = frame + bit
                frame += 8
        if start >= 0:
            yield start, frame


def read_dump(content: Content) -> Opened:
    """Raises Undecidable."""
    memory = KdumpMemory(content)
    return Opened("kdump" + ", which its writer could not complete" * memory.incomplete, memory, memory.notes())
