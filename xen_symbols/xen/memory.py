"""Xen's virtual memory, by Xen's own page tables, whatever a CPU happens to run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import READ_MAX, Target, bounded
from xen_symbols.x86 import paging

# Page-table entries are read so many bytes at a time: a few neighbours are mostly wanted too. More of them would cost
# a live machine more than they save: gdb takes an answer byte by byte.
BLOCK = 256
# xen/include/asm-x86/config.h: the image lies in a region of 1 GiB that is aligned to its size, in every release.
IMAGE_REGION = 1 << 30
# The same of 4.2 to 4.22: every XEN_VIRT_START so far.
IMAGE_REGIONS = (0xFFFF82C480000000, 0xFFFF82C4C0000000, 0xFFFF82D080000000, 0xFFFF82D040000000)
# No release's image is larger.
IMAGE_MAX = 16 << 20
IMAGE_MIN_OFFSET = 1 << 20  # `_start`, the smaller of 1 and 2 MiB
# Xen is relocated to a multiple of this (xen/arch/x86/boot: L2_PAGETABLE_SHIFT), always below 4 GiB.
RELOCATION_STEP = 2 << 20
RELOCATION_LIMIT = 4 << 30
ROOT = "idle_pg_table"
HYPERVISOR_CS = 0xE008  # the same file, __HYPERVISOR_CS64
HYPERVISOR_DS = 0xE010  # __HYPERVISOR_DS32; in 64-bit mode a null selector does as well


def image_region(address: int) -> int:
    """XEN_VIRT_START: where the 1 GiB region of Xen's image around an address begins."""
    return address & -IMAGE_REGION


class AddressSpace:
    """The virtual addresses of one set of page tables, whose root is at `root` (a physical address), in a target.

    Translations are kept until `forget`; a live machine forgets them at each stop. `found_by`: what led to the root.
    `image`: (start, end, physical start) of Xen's image, which is one piece: a dump may have lost the tables that map
    it, and hold what they map.
    """

    image: tuple[int, int, int] | None = None

    def __init__(self, target: Target, root: int, found_by: str) -> None:
        self.target = target
        self.root = root
        self.found_by = found_by
        self._blocks: dict[int, bytes | Absent] = {}
        self._pages: dict[int, tuple[int, int]] = {}

    def forget(self) -> None:
        """Drop what was remembered of the page tables: the machine has run."""
        self._blocks.clear()
        self._pages.clear()

    def _known_entry(self, address: int, size: int) -> bytes:
        """Of a page-table entry's block that was read before. Raises _NotYetRead for another."""
        start = address & -BLOCK
        block = self._blocks.get(start)
        if block is None:
            raise _NotYetRead(start)
        if isinstance(block, Absent):  # a dump may end, or have a hole, just there
            return self.target.read_physical(address, size)
        return block[address - start : address - start + size]

    def _entry(self, address: int, size: int) -> bytes:
        if address & -BLOCK not in self._blocks:
            self._read_blocks([address & -BLOCK])
        return self._known_entry(address, size)

    def _read_blocks(self, starts: Sequence[int]) -> None:
        blocks = self.target.read_physical_many([(start, BLOCK) for start in starts])
        self._blocks |= zip(starts, blocks, strict=True)

    def _translate_all(self, pages: Iterable[int]) -> None:
        """Translate pages together: what is missing of the page tables is read a level at a time, for all of them."""
        waiting = [page for page in pages if page not in self._pages]
        while waiting:
            missing: dict[int, list[int]] = {}
            for page in waiting:
                try:
                    mapping = paging.walk(self._known_entry, self.root, page * paging.PAGE_SIZE)
                    self._pages[page] = mapping.physical, mapping.remaining
                except _NotYetRead as error:
                    missing.setdefault(error.block, []).append(page)
                except Unreadable:
                    pass  # for those who ask for it, one by one
            if missing:
                self._read_blocks(list(missing))
            waiting = [page for waiting_for in missing.values() for page in waiting_for]

    def walk(self, address: int) -> paging.Mapping:
        """The whole walk for one address. Raises Unreadable."""
        return paging.walk(self._entry, self.root, address)

    def physical(self, address: int) -> int:
        """The physical address of a virtual one. Raises Unreadable."""
        return self._translate(address)[0]

    def _translate(self, address: int) -> tuple[int, int]:
        """(physical address, bytes from there to the end of what is mapped with it)."""
        page = address // paging.PAGE_SIZE
        known = self._pages.get(page)
        if known is None:
            known = self._pages[page] = self._looked_up(page * paging.PAGE_SIZE)
        offset = address % paging.PAGE_SIZE
        return known[0] + offset, known[1] - offset

    def _looked_up(self, page: int) -> tuple[int, int]:
        try:
            mapping = self.walk(page)
        except paging.Untranslated as error:
            if self.image and error.unread and self.image[0] <= page < self.image[1]:
                return page - self.image[0] + self.image[2], paging.PAGE_SIZE
            raise
        return mapping.physical, mapping.remaining

    def _pieces(self, address: int, size: int) -> list[tuple[int, int]]:
        bounded(address, size)
        pieces: list[tuple[int, int]] = []
        while size > 0:
            physical, room = self._translate(address)
            take = min(size, room)
            pieces.append((physical, take))
            address, size = address + take, size - take
        return pieces

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a virtual address. Raises Unreadable."""
        return b"".join(self.target.read_physical(*piece) for piece in self._pieces(address, size))

    def read_many(self, requests: Iterable[tuple[int, int]]) -> list[bytes | Absent]:
        """Several (address, size) at once, in order; each is its bytes or why there are none."""
        requests = list(requests)
        self._translate_all({page for request in requests for page in _pages_of(*request)})
        plans: list[list[tuple[int, int]] | Absent] = []
        for address, size in requests:
            try:
                plans.append(self._pieces(address, size))
            except Unreadable as error:
                plans.append(error.absent)
        flat = [piece for plan in plans if not isinstance(plan, Absent) for piece in plan]
        answers = iter(self.target.read_physical_many(flat))
        return [plan if isinstance(plan, Absent) else _join([next(answers) for _ in plan]) for plan in plans]

    def read_uint(self, address: int, size: int = 8) -> int:
        """An unsigned little-endian number. Raises Unreadable."""
        return int.from_bytes(self.read(address, size), "little")


class XenMemory(AddressSpace):
    """One build of Xen in one target: its idle page tables, and its symbols."""

    def __init__(
        self, target: Target, symbols: SymbolTable, root: int, found_by: str, table: int | None = None
    ) -> None:
        """`table` is the virtual address of ROOT, where another than the symbols say it."""
        super().__init__(target, root, found_by)
        self.symbols = symbols
        self.table = symbols.address(ROOT) if table is None else table
        self.build_id: bytes | Absent = Absent("not looked for")
        self.given_generation: str | None = None  # of the crash path: not to be recognised

    @property
    def xen_phys_start(self) -> int:
        """The physical address of XEN_VIRT_START: the image is one piece."""
        return self.root - (self.table - image_region(self.table))

    def variable(self, name: str, size: int = 8, kinds: str | None = None) -> int:
        """An unsigned variable of Xen's, by its symbol. Raises Unreadable."""
        return self.read_uint(self.symbols.address(name, kinds), size)


class _NotYetRead(Exception):
    """A block of page-table entries that is not among those that were read."""

    def __init__(self, block: int) -> None:
        self.block = block


def _pages_of(address: int, size: int) -> range:
    """The numbers of the pages with a part of what a read asks for; none of one that asks for too much."""
    if not 0 < size <= READ_MAX or address < 0:
        return range(0)
    return range(address // paging.PAGE_SIZE, (address + size - 1) // paging.PAGE_SIZE + 1)


def _join(parts: Sequence[bytes | Absent]) -> bytes | Absent:
    for part in parts:
        if isinstance(part, Absent):
            return part
    return b"".join(part for part in parts if isinstance(part, bytes))
