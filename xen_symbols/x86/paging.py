"""4-level paging (Intel SDM vol. 3, 4.5; AMD APM vol. 2, 5.3) and its walks by a machine's own tables."""

from __future__ import annotations

from collections.abc import Callable

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.records import NamedTuple

PAGE_SIZE = 4096
CR0_PG = 1 << 31

PRESENT = 1 << 0
PAGE_SIZE_BIT = 1 << 7  # PS: this entry maps a superpage
ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
_LEVELS = (("PML4E", 39), ("PDPTE", 30), ("PDE", 21), ("PTE", 12))

ReadPhysical = Callable[[int, int], bytes]


def is_canonical(address: int) -> bool:
    """Whether bits 63-47 of a 64-bit address are all equal (SDM vol. 1, 3.3.7.1)."""
    return address >> 47 in (0, 0x1FFFF)


class Untranslated(Unreadable):
    """A virtual address that has no translation, as all of [start, end) have none: an entry is not present, or
    (`unread`) a table could not be read."""

    def __init__(self, reason: str | Absent, start: int, end: int, *, unread: bool) -> None:
        super().__init__(reason)
        self.start, self.end, self.unread = start, end, unread


class Mapping(NamedTuple):
    """Where a virtual address lies: the physical address, and the size of the page that shares the entry."""

    physical: int
    size: int
    entries: tuple[tuple[str, int, int], ...]  # (level, physical address of the entry, its value), root first

    @property
    def remaining(self) -> int:
        """Bytes from here to the end of the page."""
        return self.size - self.physical % self.size


def walk(read_physical: ReadPhysical, cr3: int, address: int) -> Mapping:
    """Translate one address from the root in `cr3`. At most four entries are read, so looping tables cannot hang it.

    Raises Unreadable for a non-canonical address, and Untranslated for a non-present entry or a table that cannot be
    read.
    """
    if not is_canonical(address):
        raise Unreadable(f"{address:#x} is not a canonical address")
    table = cr3 & ADDRESS_MASK
    entries = []
    for level, shift in _LEVELS:
        where = table + 8 * (address >> shift & 0x1FF)
        try:
            entry = int.from_bytes(read_physical(where, 8), "little")
        except Unreadable as error:
            raise _untranslated(error.absent, address, shift, unread=True) from None
        entries.append((level, where, entry))
        if not entry & PRESENT:
            why = f"{address:#x} is not mapped (its {level} at physical {where:#x} is {entry:#x})"
            raise _untranslated(why, address, shift, unread=False)
        if level == "PTE" or (entry & PAGE_SIZE_BIT and level in ("PDPTE", "PDE")):
            size = 1 << shift
            base = entry & ADDRESS_MASK & -size
            return Mapping(base + address % size, size, tuple(entries))
        table = entry & ADDRESS_MASK
    raise AssertionError("the last level always returns")


def _untranslated(reason: str | Absent, address: int, shift: int, *, unread: bool) -> Untranslated:
    start = address >> shift << shift
    return Untranslated(reason, start, start + (1 << shift), unread=unread)
