"""The hole below 4 GiB in a raw image: a file of guest RAM (QEMU's, or VMware's .vmem) leaves it out, and memory from
4 GiB on lies lower in the file by its size.

How much of the file is low memory follows from Xen's memory map (`e820`): what that has above 4 GiB is the end of the
file. Xen's page tables are asked whether it is so: they map Xen's own root where it is, in the image and in the direct
map, and Xen allocates the tables that say it from the top of memory. Where the map does not say it, they alone may.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PHYSICAL_END, Map, Target
from xen_symbols.targets.raw import RawMemory
from xen_symbols.x86 import paging
from xen_symbols.xen.memory import IMAGE_REGIONS, ROOT

_FOUR_GIB = 4 << 30
_STEP = 1 << 20  # of where low memory may end
DIRECTMAP = 0xFFFF830000000000  # xen/include/asm-x86/config.h, DIRECTMAP_VIRT_START, in every release
_ENTRY = struct.Struct("<QQI")  # xen/include/asm-x86/e820.h, struct e820entry: address, size, type
_RAM = 1
_MOST_ENTRIES = 1024  # E820MAX

OffsetOf = Callable[[str], int | None]  # of a symbol from XEN_VIRT_START


class _MemoryMap(NamedTuple):
    low_end: int  # of what is contiguous with the last RAM below 4 GiB, reserved or not
    end: int  # of all RAM


def place(target: Target, start: int, offset_of: OffsetOf) -> None:
    """Arrange a raw image whose Xen, if there is one, has its XEN_VIRT_START at the physical address `start`."""
    image, root = target.memory, offset_of(ROOT)
    if not isinstance(image, RawMemory) or image.given or image.says or root is None:
        return
    if not _is_at(image, start, offset_of):
        return
    known = _memory_map(image, start, offset_of)
    if known is not None and known.end <= _FOUR_GIB:
        return
    (whole,) = image.maps
    as_it_is = _right(image, start, root)
    if as_it_is and (as_it_is.high or known is None or whole.end >= known.end):
        return
    for low, by in _candidates(whole, known):
        if not start + root < low < min(_FOUR_GIB, whole.end):
            continue
        maps = [whole._replace(size=low - whole.physical), Map(_FOUR_GIB, low - whole.physical, whole.end - low)]
        agreed = known is not None and low == known.low_end == whole.end - (known.end - _FOUR_GIB)
        found = _right(image.arranged(maps), start, root)
        if found and (found.high or agreed):
            image.arrange(maps, f", its hole {low:#x}-{_FOUR_GIB:#x} left out, by {by}")
            return
    if known is not None and whole.end > _FOUR_GIB:
        below = whole._replace(size=_FOUR_GIB - whole.physical)
        image.arrange([below], ", not read from 4 GiB on: where that is in the file could not be determined (--map)")


def _is_at(image: RawMemory, start: int, offset_of: OffsetOf) -> bool:
    """Whether Xen's own variable says that it is there."""
    return (at := offset_of("xen_phys_start")) is not None and _uint(image, start + at, 8) == start


def _memory_map(image: RawMemory, start: int, offset_of: OffsetOf) -> _MemoryMap | None:
    at = offset_of("e820")
    count = None if at is None else _uint(image, start + at, 4)
    if at is None or count is None or not 0 < count <= _MOST_ENTRIES:
        return None
    try:
        raw = image.read(start + at + 4, count * _ENTRY.size)
    except Unreadable:
        return None
    entries = sorted((address, address + size, kind) for address, size, kind in _ENTRY.iter_unpack(raw))
    ram = [(first, end) for first, end, kind in entries if kind == _RAM and end <= PHYSICAL_END]
    low = max((end for _, end in ram if end <= _FOUR_GIB), default=0)
    for first, end, _ in entries:
        if first == low and end <= _FOUR_GIB:
            low = end
    return _MemoryMap(low, max((end for _, end in ram), default=0))


def _candidates(whole: Map, known: _MemoryMap | None) -> Iterator[tuple[int, str]]:
    """(where low memory may end, by what), the likeliest first."""
    if known is not None:
        yield whole.end - (known.end - _FOUR_GIB), "Xen's memory map and page tables"
    yield from ((low, "Xen's page tables") for low in range(_FOUR_GIB - _STEP, 0, -_STEP))


class _Right(NamedTuple):
    """Page tables map what they should. `high`: some of them are above 4 GiB, where another place would show."""

    high: bool


def _right(memory: RawMemory, start: int, root: int) -> _Right | None:
    """Whether Xen's page tables, read so, map its root where it is: in the image, and in the direct map."""
    high = False

    def read(address: int, size: int) -> bytes:
        nonlocal high
        high = high or address >= _FOUR_GIB
        return memory.read(address, size)

    def maps(address: int, physical: int) -> bool:
        try:
            return paging.walk(read, start + root, address).physical == physical
        except Unreadable:
            return False

    image = any(maps(region + root, start + root) for region in IMAGE_REGIONS)
    direct = image and all(maps(DIRECTMAP + at, at) for at in (start + root, _FOUR_GIB))
    return _Right(high) if direct else None


def _uint(image: RawMemory, address: int, size: int) -> int | None:
    try:
        return int.from_bytes(image.read(address, size), "little")
    except Unreadable:
        return None
