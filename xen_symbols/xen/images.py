"""Xen's images in a target: where its notes, its CPUs or its memory show one, and the symbols that one carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.symbols import embedded
from xen_symbols.symbols.functions import BUILT_WITHOUT
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.targets.notes import XEN_CRASH_INFO, parse_address, parse_crash_info, parse_vmcoreinfo
from xen_symbols.targets.raw import RawMemory
from xen_symbols.x86 import paging
from xen_symbols.xen.memory import (
    IMAGE_MAX,
    IMAGE_MIN_OFFSET,
    IMAGE_REGION,
    IMAGE_REGIONS,
    AddressSpace,
    XenMemory,
    image_region,
)
from xen_symbols.xen.search import Progress, booted_last, roots

# A bound on hostile page tables. The tables of a CPU that runs Xen map all of its image, and come first; those of a PV
# guest's CPU may map some (XPTI).
_MOST_IMAGES = 8
BY_INFO = "xen_phys_start in the crash info note"
BY_TABLES = "its page tables in physical memory"


class Unread:
    """The first place in a dump that should have shown Xen, and could not be read: where none is found, that is why.

    Of a live machine it says nothing: a CPU in a guest has page tables that lead nowhere.
    """

    def __init__(self, target: Target) -> None:
        self.why: str | None = None
        self._is_dump = target.kind == "dump"

    def note(self, named_by: str, error: Unreadable) -> None:
        """A page that is not mapped was read: its page tables were."""
        if self._is_dump and self.why is None and (not isinstance(error, paging.Untranslated) or error.unread):
            self.why = f"what {named_by} points to cannot be read ({error})"


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


def and_base(target: Target) -> str:
    if isinstance(target.memory, RawMemory) and target.memory.given:
        return ", and is what is where in the file as --map says"
    return "" if target.base is None else f", with physical {target.base:#x} as its first byte (--base)"


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


def xen_phys_start_of(note: Note) -> int | None:
    """Where the image begins in physical memory, if the note is Xen's crash info and says so."""
    if (note.name, note.type) != ("Xen", XEN_CRASH_INFO):
        return None
    info = parse_crash_info(note.desc)
    return None if isinstance(info, Absent) else info.xen_phys_start


def pgd_l4(target: Target) -> int | None:
    """The virtual address of ROOT by the note that Xen writes for makedumpfile."""
    for note in target.notes():
        if note.name == "VMCOREINFO_XEN":
            address = parse_address(parse_vmcoreinfo(note.desc).get("SYMBOL(pgd_l4)", ""))
            if address is not None and paging.is_canonical(address):
                return address
    return None


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


def by_cr3(cpu: PhysicalCpu) -> str:
    return f"CR3 of CPU {cpu.index} ({cpu.source})"


def _in_xen(cpu: PhysicalCpu) -> bool:
    return any(region <= cpu.registers.get("rip", 0) < region + IMAGE_REGION for region in IMAGE_REGIONS)
