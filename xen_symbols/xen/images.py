"""Xen's images in a target, looked for without Xen's symbols: where its notes, its CPUs or its memory show one, and the
symbols that one carries.

Imported where it is needed: not for a dump whose notes show where Xen is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.symbols import buildid, embedded
from xen_symbols.symbols.functions import BUILT_WITHOUT
from xen_symbols.symbols.links import Link, link_of
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.x86 import paging
from xen_symbols.xen import hole
from xen_symbols.xen.memory import (
    IMAGE_MAX,
    IMAGE_MIN_OFFSET,
    IMAGE_REGION,
    IMAGE_REGIONS,
    RELOCATION_LIMIT,
    RELOCATION_STEP,
    AddressSpace,
    XenMemory,
    image_region,
)
from xen_symbols.xen.search import Progress, booted_last, roots
from xen_symbols.xen.shown import (
    BY_INFO,
    Unread,
    and_base,
    by_cr3,
    note_offset,
    pgd_l4,
    xen_phys_start_of,
)

# A bound on hostile page tables. The tables of a CPU that runs Xen map all of its image, and come first; those of a PV
# guest's CPU may map some (XPTI).
_MOST_IMAGES = 8
BY_TABLES = "its page tables in physical memory"


def carried_symbols(target: Target, progress: Progress | None = None) -> SymbolTable:
    """The symbol table that Xen carries in its own image, found without any other symbols.

    A dump whose notes show no Xen is searched, up to 4 GiB of it: `progress` gets (bytes searched, bytes in all).
    Raises Undecidable when there is none, or several and nothing shows which of them ran last.
    """
    unread = Unread(target)
    for memory, region in images(target, target.cpus(), unread):
        table = carried(memory, region, unread)
        if table is not None:
            return table
    found: list[XenMemory] = []
    functions_only: list[int] = []
    for memory, region in images_in_memory(target, progress, functions_only):
        table = carried(memory, region, unread)
        if table is not None:
            found.append(XenMemory(target, table, memory.root, memory.found_by))
    ran = {memory.root: memory for memory in found if is_in_place(memory)}
    if len(ran) > 1:
        return booted_last(list(ran.values())).symbols
    for memory in ran.values():
        return memory.symbols
    if functions_only:
        raise Undecidable(
            f"the symbol table of a Xen at physical {functions_only[0]:#x} in {target.location} has functions and no "
            f"variables, by which its page tables cannot be found: {BUILT_WITHOUT}; give its xen-syms with --symbols"
        )
    nothing = f"no symbol table of Xen's own was found in {target.location}"
    if why := unread.why or target.truncated:
        raise Undecidable(f"{nothing}: {why}; give its xen-syms with --symbols, or take the dump again")
    raise Undecidable(f"{nothing}: is it Xen{and_base(target)}? If so, give its xen-syms with --symbols")


def is_in_place(memory: XenMemory) -> bool:
    """Whether Xen is where its `xen_phys_start` says.

    One that moved itself left behind a copy in which even the page tables are right, and this names the new place.
    """
    try:
        return memory.variable("xen_phys_start") == memory.xen_phys_start
    except Unreadable:
        return True


def carried(memory: AddressSpace, region: int, unread: Unread) -> SymbolTable | None:
    def read(address: int, size: int) -> bytes:
        try:
            return memory.read(address, size)
        except Unreadable as error:
            unread.note(memory.found_by, error)
            raise

    try:
        return embedded.load_memory(memory.target.location, read, region + IMAGE_MIN_OFFSET, region + IMAGE_MAX)
    except Undecidable:
        return None


def images_in_memory(
    target: Target, progress: Progress | None = None, functions_only: list[int] | None = None
) -> Iterator[tuple[AddressSpace, int]]:
    """The same wherever a dump's memory itself shows one, unless its notes say where: there, and nowhere else."""
    if target.kind == "dump" and all(xen_phys_start_of(note) is None for note in target.notes()):
        for root, region in roots(target, progress, functions_only):
            yield AddressSpace(target, root, BY_TABLES), region


def images(target: Target, cpus: Sequence[PhysicalCpu], unread: Unread) -> Iterator[tuple[AddressSpace, int]]:
    """(memory, XEN_VIRT_START) wherever the notes or a CPU's own page tables show something where Xen's image lies."""
    tried: set[tuple[int, int]] = set()
    shown = 0
    for root, regions, found_by, start in _named(target, cpus):
        memory = AddressSpace(target, root, found_by)
        if start is not None:
            memory.image = regions[0], regions[0] + IMAGE_MAX, start
        for region in regions:
            if (root, region) not in tried and _maps_some(memory, region, unread):
                yield memory, region
                shown += 1
                if shown == _MOST_IMAGES:
                    return
            tried.add((root, region))


def _named(target: Target, cpus: Sequence[PhysicalCpu]) -> Iterator[tuple[int, Sequence[int], str, int | None]]:
    """(root of page tables, what XEN_VIRT_START may be there, who names it, where that is in physical memory)."""
    starts = [start for note in target.notes() if (start := xen_phys_start_of(note)) is not None]
    if starts and (root := pgd_l4(target)):
        start = starts[-1]
        yield start + root - image_region(root), [image_region(root)], BY_INFO, start
    for cpu in sorted(cpus, key=_in_xen, reverse=True):
        if cpu.guest_mode is not True and "cr3" in cpu.registers:
            regions = [image_region(cpu.registers["rip"])] if _in_xen(cpu) else IMAGE_REGIONS
            yield cpu.registers["cr3"] & ~0xFFF, regions, by_cr3(cpu), None


def _maps_some(memory: AddressSpace, region: int, unread: Unread) -> bool:
    """Whether any page is mapped where an image in this region lies."""
    address = region + IMAGE_MIN_OFFSET
    while address < region + IMAGE_MAX:
        try:
            memory.walk(address)
            return True
        except paging.Untranslated as error:
            unread.note(memory.found_by, error)
            if memory.image and error.unread:
                return True
            address = error.end
    return False


def _in_xen(cpu: PhysicalCpu) -> bool:
    return any(region <= cpu.registers.get("rip", 0) < region + IMAGE_REGION for region in IMAGE_REGIONS)


def roots_in_memory(target: Target, symbols: SymbolTable, table: int) -> Iterator[tuple[int, str]]:
    offset = table - image_region(table)

    def offset_of(name: str) -> int | None:
        address = None if symbols.text_only else symbols.get(name)
        return None if address is None else address - image_region(address)

    if symbols.build_id and note_offset(symbols) is not None:
        for base in _bases_by_build_id(target, symbols):
            hole.place(target, base, offset_of)
            yield base + offset, "the build-id in physical memory"
    elif target.kind == "dump":
        for base in _bases(target):
            hole.place(target, base, offset_of)
            yield base + offset, BY_TABLES


def _bases(target: Target) -> range:
    """Every value that xen_phys_start may have."""
    return range(
        0, min(RELOCATION_LIMIT, max((end for _, end in target.physical_ranges()), default=0)), RELOCATION_STEP
    )


def _bases_by_build_id(target: Target, symbols: SymbolTable) -> Iterator[int]:
    """Values of xen_phys_start at which physical memory holds the build-id of these symbols."""
    offset = note_offset(symbols)
    if offset is None or not symbols.build_id:
        return
    bases = _bases(target)
    notes = target.read_physical_many([(base + offset, buildid.NOTE_SIZE) for base in bases])
    for base, raw in zip(bases, notes, strict=True):
        if not isinstance(raw, Absent) and buildid.parse_note(raw) == symbols.build_id:
            yield base


def scan(memory: AddressSpace, region: int) -> tuple[bytes, Link] | None:
    """The build-id in an image, and the link that has it in this form."""
    step = 64 << 10
    behind, previous = 0, b""
    for chunk in range(region + IMAGE_MIN_OFFSET, region + IMAGE_MAX, step):
        # The page behind .rodata is not mapped: a chunk need not be readable as a whole.
        for address, data in embedded.readable(memory.read, chunk, step):
            whole = previous + data if address == behind else data
            found = buildid.scan(whole)
            if found:
                return found[1], Link.EFI if buildid.is_of_efi(whole[found[0] :][: buildid.NOTE_SIZE]) else Link.GZ
            behind, previous = address + len(data), data[-buildid.NOTE_SIZE :]
    return None


def other_xen(target: Target, cpus: Sequence[PhysicalCpu], unread: Unread) -> tuple[bytes | None, Link | None]:
    """(build-id, link) of whatever Xen is there, without any symbols."""
    for memory, region in chain(images(target, cpus, unread), images_in_memory(target)):
        found = scan(memory, region)
        if found:
            return found
        table = carried(memory, region, unread)
        if table is not None and (link := link_of(table)):
            return None, link
    return None, None


def require_link(target: Target, symbols: SymbolTable, booted: Link | None) -> None:
    """That the symbols are not of the build's other link than the one that the machine booted."""
    mine = link_of(symbols)
    if booted and mine is booted.other:
        raise Undecidable(
            f"{symbols.path} has the symbols of the other link, {mine.value}: the Xen in {target.location} was booted "
            f"from {booted.value}, whose variables have other addresses; give {booted.symbols} with --symbols"
        )
