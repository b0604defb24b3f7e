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
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.compression import LZO, SNAPPY, ZLIB, ZSTD, decompress, missing
from xen_symbols.formats.content import FILE_END, Content, as_held, ends_early, require
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
_PART = 64  # bytes of a chunk for each entry of its own
_CACHED_PAGES = 512
_LAST_DESCRIPTORS = 1024
_MAX_SUB_BLOCKS = 2 + _MAX_NOTE_BYTES // PAGE_SIZE  # the notes, and a page each for itself and for VMCOREINFO


def _blocks(frames: int) -> int:
    """Of both bitmaps, as makedumpfile and QEMU write them."""
    return 2 * -(-frames // (8 * PAGE_SIZE))


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
            raise Undecidable(f"kdump header: {frames:#x} page frames; more than {_MAX_FRAMES:#x} are too many")
        bitmaps_at, bitmaps_size = (1 + sub_blocks) * PAGE_SIZE, bitmap_blocks * PAGE_SIZE
        believable = sub_blocks <= _MAX_SUB_BLOCKS and bitmap_blocks == _blocks(frames)
        if bitmaps_at + bitmaps_size > content.size and not believable:
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
        self._ranges: Ranges | None = None
        self._last_place, self._last_page = (0, 0, 0), b""
        self._last, self._last_chunk, self._last_rank = -1, b"", [0]
        self._rank, self._known = self._count()
        self.incomplete = bool(status & _INCOMPLETE)
        self.truncated = None if self.incomplete else self._truncated()

    def notes(self) -> list[Note]:
        """The ELF notes that the writer took over from its input."""
        offset, size = self._notes_at
        if size > _MAX_NOTE_BYTES:
            raise Undecidable(
                f"kdump sub header +0x38: {size} bytes of notes; {_MAX_NOTE_BYTES} is the most accepted"
            )
        if not size:
            return []
        if offset + size > max(self._content.size, self._memory_at):
            raise Undecidable(
                f"kdump sub header +0x30: the notes end at offset {offset + size:#x}, the file at "
                f"{self._content.size:#x}; the file is damaged"
            )
        return of_a_machine(parse_notes(as_held(self._content, offset, size), "kdump notes", size))

    def read(self, address: int, size: int) -> bytes:
        first, start = divmod(address, PAGE_SIZE)
        if 0 <= size <= PAGE_SIZE - start:
            return self._page(first)[start : start + size]
        bounded(address, size)
        last = (address + size - 1) // PAGE_SIZE
        return b"".join(self._page(frame) for frame in range(first, last + 1))[start : start + size]

    def ranges(self) -> Ranges:
        """The pages of the second bitmap, a range per run of them; without those that a truncated file has lost."""
        if self._ranges is None:
            starts, ends = array("Q"), array("Q")
            for start, end in self._held_runs() if self.truncated else self._runs():
                starts.append(start * PAGE_SIZE)
                ends.append(end * PAGE_SIZE)
            self._ranges = Ranges(starts, ends)
        return self._ranges

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
        if not 0 <= frame < self._frames:
            raise Unreadable("the dump has no memory there")
        if frame >= self._known:
            raise Unreadable(f"it is not known whether the dump has it: {self.truncated}")
        if not self._is_dumped(frame):
            if not self._content.read(self._memory_at + frame // 8, 1)[0] >> frame % 8 & 1:
                raise Unreadable("the dump has no memory there")
            raise Unreadable("the page was left out when the dump was written")
        at = self._descriptors_at + self._dumped_before(frame) * _DESCRIPTOR.size
        offset, size, compression, _ = _DESCRIPTOR.unpack(self._content.read(at, _DESCRIPTOR.size))
        if not offset and not size:
            raise Unreadable("its writer never wrote this page")
        if not 0 < size <= PAGE_SIZE or (not compression and size != PAGE_SIZE):
            raise Unreadable(f"bad page descriptor at offset {at:#x}: {size} bytes, compression {compression:#x}")
        if (offset, size, compression) != self._last_place:  # most pages of zeros have the same
            self._last_page, self._last_place = self._unpacked(offset, size, compression), (offset, size, compression)
        return self._last_page

    def _unpacked(self, offset: int, size: int, compression: int) -> bytes:
        data = self._content.read(offset, size)
        if not compression:
            return data
        if compression not in _COMPRESSIONS:
            raise Unreadable(f"unknown compression {compression:#x}")
        return decompress(_COMPRESSIONS[compression], data, PAGE_SIZE)

    def _is_dumped(self, frame: int) -> int:
        index, bit = divmod(frame, _CHUNK * 8)
        return self._chunk(index)[bit // 8] >> bit % 8 & 1

    def _count(self) -> tuple[array[int], int]:
        """Dumped pages before each chunk of the second bitmap and in all of it, and for how many frames it is there:
        behind a part that the file has lost no page can be found."""
        rank, total, known = array("Q", [0]), 0, 0
        self._known = self._frames
        try:
            for chunk in self._chunks():
                total += int.from_bytes(chunk, "little").bit_count()
                rank.append(total)
                known += len(chunk) * 8
        except Unreadable:
            return rank, known
        return rank, self._frames

    def _chunks(self) -> Iterator[bytes]:
        """Of the second bitmap, as far as it is known."""
        size = -(-self._known // 8)
        for at in range(0, size, _CHUNK):
            yield self._content.read(self._dumped_at + at, min(_CHUNK, size - at))

    def _chunk(self, index: int) -> bytes:
        """Of the second bitmap. The last is kept, with the dumped pages before each of its parts: a search through
        memory asks for one page after another."""
        if index != self._last:
            at = index * _CHUNK
            chunk = self._content.read(self._dumped_at + at, max(0, min(_CHUNK, -(-self._known // 8) - at)))
            self._last, self._last_chunk = index, chunk
            parts = (chunk[part : part + _PART] for part in range(0, len(chunk), _PART))
            counts = (int.from_bytes(part, "little").bit_count() for part in parts)
            self._last_rank = list(accumulate(counts, initial=self._rank[index]))
        return self._last_chunk

    def _dumped_before(self, frame: int) -> int:
        index, bits = divmod(frame, _CHUNK * 8)
        chunk = self._chunk(index)
        part, bits = divmod(bits, _PART * 8)
        word = int.from_bytes(chunk[part * _PART : (part + 1) * _PART], "little")
        return self._last_rank[part] + (word & (1 << bits) - 1).bit_count()

    def _truncated(self) -> str | None:
        """Whether the file lost its end, which is that of its last page, or its writer did not come to it."""
        content = self._content
        if content.truncated:
            return content.truncated
        if self._known < self._frames:
            return ends_early(content, self._descriptors_at, "bitmaps")
        count = self._dumped_before(self._frames)
        pages_at = self._descriptors_at + count * _DESCRIPTOR.size
        tail = min(count, _LAST_DESCRIPTORS)
        try:
            table = content.read(pages_at - tail * _DESCRIPTOR.size, tail * _DESCRIPTOR.size)
        except Unreadable:
            return ends_early(content, pages_at, "page descriptors")
        for offset, size, _, _ in reversed(list(_DESCRIPTOR.iter_unpack(table))):
            if not offset and not size:
                return f"the file is truncated at offset {content.size:#x}: its last pages were never written"
            if offset + size > FILE_END:
                raise Undecidable(f"kdump: the last page ends at offset {offset + size:#x}; the file is damaged")
            if offset != pages_at:  # where the writers put the page of zeros that all such pages share
                return ends_early(content, offset + size, "last page") if offset + size > content.size else None
        return None

    def _held_runs(self) -> Iterator[tuple[int, int]]:
        """The same as `_runs`, of those pages whose bytes are in the file."""
        held = list(self._content.held())
        starts = [start for start, _ in held]

        def is_held(offset: int, size: int) -> bool:
            index = bisect_right(starts, offset) - 1
            return index >= 0 and size > 0 and offset + size <= held[index][1]

        at = self._descriptors_at
        for first, end in self._runs():
            open_since = -1
            for frame in range(first, end):
                kept = False
                if is_held(at, _DESCRIPTOR.size):
                    offset, size, _, _ = _DESCRIPTOR.unpack(self._content.read(at, _DESCRIPTOR.size))
                    kept = is_held(offset, size)
                at += _DESCRIPTOR.size
                if kept and open_since < 0:
                    open_since = frame
                elif not kept and open_since >= 0:
                    yield open_since, frame
                    open_since = -1
            if open_since >= 0:
                yield open_since, end

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
    format = "kdump" + ", which its writer could not complete" * memory.incomplete
    return Opened(format, memory, memory.notes(), memory.truncated)
