"""Finding Xen in a target: where its page tables are, and whether the symbols are of this build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.symbols import buildid, embedded
from xen_symbols.symbols.links import Link, link_of
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.targets.notes import XEN_CRASH_INFO, parse_address, parse_crash_info, parse_vmcoreinfo
from xen_symbols.targets.raw import RawMemory
from xen_symbols.x86 import paging
from xen_symbols.xen import hole
from xen_symbols.xen.memory import (
    IMAGE_MAX,
    IMAGE_MIN_OFFSET,
    IMAGE_REGION,
    IMAGE_REGIONS,
    RELOCATION_LIMIT,
    RELOCATION_STEP,
    ROOT,
    AddressSpace,
    XenMemory,
    image_region,
)
from xen_symbols.xen.search import Progress, booted_last, roots

# A bound on hostile page tables. The tables of a CPU that runs Xen map all of its image, and come first; those of a PV
# guest's CPU may map some (XPTI).
_MOST_IMAGES = 8
_BY_INFO = "xen_phys_start in the crash info note"
_BY_TABLES = "its page tables in physical memory"


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


def locate(target: Target, symbols: SymbolTable, *, allow_mismatch: bool = False) -> XenMemory:
    """Xen in `target`, whose symbols are `symbols`.

    Raises Undecidable when there is no Xen, Xen has no paging yet, or it is another build (both build-ids are named).
    """
    cpus = target.cpus()
    unread = Unread(target)
    memory = _by_evidence(target, symbols, cpus, unread)
    theirs = _build_id_in(memory, symbols) if memory else None
    if memory is None or (symbols.build_id and theirs and theirs != symbols.build_id):
        other = theirs
        if memory is None:
            other, booted = _other_xen(target, cpus, unread)
            _require_link(target, symbols, booted)
        if other and symbols.build_id and other != symbols.build_id:
            if not allow_mismatch or memory is None:
                even = " (its page tables cannot be found with them, so a mismatch cannot be allowed)"
                raise Undecidable(
                    f"the symbols are of another build: {symbols.path} has build-id {symbols.build_id.hex()}, "
                    f"the Xen in {target.location} has {other.hex()}{even * allow_mismatch}; "
                    "give its own xen-syms with --symbols"
                )
        elif memory is None:
            raise Undecidable(_why_not(target, symbols, cpus, unread))
    if theirs:
        memory.build_id = theirs
    else:
        memory.build_id = Absent("the build-id note in memory could not be read")
        if symbols.build_id and not allow_mismatch:
            raise Undecidable(
                f"{target.location} shows no build-id where {symbols.path} says it lies: the symbols are of another "
                "build, or the note was left out of the dump; --allow-build-id-mismatch continues without it"
            )
    return memory


def still_there(memory: XenMemory) -> bool:
    """Whether this Xen is where it was found: its tables map themselves, and the build-id is the same.

    A machine that ran may have been reset since, and have booted another.
    """
    memory.forget()
    note = memory.symbols.note_address
    try:
        if memory.physical(memory.symbols.address(ROOT)) != memory.root:
            return False
        if note is None or isinstance(memory.build_id, Absent):
            return True
        return buildid.parse_note(memory.read(note, buildid.NOTE_SIZE)) == memory.build_id
    except Unreadable:
        return False


def _why_not(target: Target, symbols: SymbolTable, cpus: Sequence[PhysicalCpu], unread: Unread) -> str:
    control = [(cpu.registers["cr0"]) for cpu in cpus if "cr0" in cpu.registers]
    if control and not any(value & paging.CR0_PG for value in control):
        return f"no CPU of {target.location} has paging on: Xen is not running there yet; continue it and try again"
    if why := unread.why or target.truncated:
        return f"no Xen of {symbols.path} was found in {target.location}: {why}; take the dump again"
    return (
        f"no Xen of {symbols.path} was found in {target.location}: none of its page tables, nor its build-id; "
        f"is it Xen{_and_base(target)}, and are these its symbols?"
    )


def _by_evidence(target: Target, symbols: SymbolTable, cpus: Sequence[PhysicalCpu], unread: Unread) -> XenMemory | None:
    """By the first root that maps `idle_pg_table` to itself: of those that notes and CPUs name, else any in memory."""
    try:
        table = symbols.address(ROOT)
    except Unreadable as error:
        raise Undecidable(f"{symbols.path} does not name {ROOT}: {error.absent}; are these Xen's symbols?") from None
    tried: set[int] = set()
    for root, found_by in _roots(target, cpus, table):
        if root in tried:
            continue
        tried.add(root)
        memory = _rooted(target, symbols, root, found_by, unread)
        if memory is not None:
            return memory
    places = _roots_in_memory(target, symbols, table)
    guess = Unread(target)  # wherever it may lie: that memory is not there says nothing
    found = [_rooted(target, symbols, root, found_by, guess) for root, found_by in places]
    ran = [memory for memory in found if memory is not None and is_in_place(memory)]
    if len(ran) < 2:
        return ran[0] if ran else None
    return booted_last(ran)


def _rooted(target: Target, symbols: SymbolTable, root: int, found_by: str, unread: Unread) -> XenMemory | None:
    """Xen with its idle page tables, if `root` maps them."""
    table = symbols.address(ROOT)
    memory = XenMemory(target, symbols, root, found_by)
    try:
        own = memory.physical(table)
        if own != root:  # a CPU's own tables: Xen's idle tables are where they say
            memory = XenMemory(target, symbols, own, found_by)
            if memory.physical(table) != own:
                return None
    except Unreadable as error:
        lost = isinstance(error, paging.Untranslated) and error.unread
        if not lost or not _shows_itself(memory):
            unread.note(found_by, error)
            return None
    start = image_region(table)
    memory.image = start, start + IMAGE_MAX, memory.xen_phys_start
    return memory


def _shows_itself(memory: XenMemory) -> bool:
    """Whether the image is at this root although a dump has lost the tables that map it: it has the build-id of the
    symbols there, or says itself where it is."""
    base, symbols = memory.xen_phys_start, memory.symbols
    if memory.target.kind != "dump" or base <= 0:
        return False
    offset, variable = _note_offset(symbols), symbols.get("xen_phys_start")
    if symbols.build_id and offset is not None:
        (raw,) = memory.target.read_physical_many([(base + offset, buildid.NOTE_SIZE)])
        return not isinstance(raw, Absent) and buildid.parse_note(raw) == symbols.build_id
    if variable is None:
        return False
    (raw,) = memory.target.read_physical_many([(base + variable - image_region(variable), 8)])
    return not isinstance(raw, Absent) and int.from_bytes(raw, "little") == base


def is_in_place(memory: XenMemory) -> bool:
    """Whether Xen is where its `xen_phys_start` says.

    One that moved itself left behind a copy in which even the page tables are right, and this names the new place.
    """
    try:
        return memory.variable("xen_phys_start") == memory.xen_phys_start
    except Unreadable:
        return True


def _roots(target: Target, cpus: Sequence[PhysicalCpu], table: int) -> Iterator[tuple[int, str]]:
    offset = table - image_region(table)
    for note in target.notes():
        if (start := _xen_phys_start(note)) is not None:
            yield start + offset, _BY_INFO
    for cpu in cpus:
        if cpu.guest_mode is True or not cpu.registers.get("cr0", paging.CR0_PG) & paging.CR0_PG:
            continue
        if "cr3" in cpu.registers:
            yield cpu.registers["cr3"] & ~0xFFF, _by_cr3(cpu)


def _roots_in_memory(target: Target, symbols: SymbolTable, table: int) -> Iterator[tuple[int, str]]:
    offset = table - image_region(table)

    def offset_of(name: str) -> int | None:
        address = symbols.get(name)
        return None if address is None else address - image_region(address)

    if symbols.build_id and _note_offset(symbols) is not None:
        for base in _bases_by_build_id(target, symbols):
            hole.place(target, base, offset_of)
            yield base + offset, "the build-id in physical memory"
    elif target.kind == "dump":
        for base in _bases(target):
            hole.place(target, base, offset_of)
            yield base + offset, _BY_TABLES


def _bases(target: Target) -> range:
    """Every value that xen_phys_start may have."""
    return range(
        0, min(RELOCATION_LIMIT, max((end for _, end in target.physical_ranges()), default=0)), RELOCATION_STEP
    )


def _note_offset(symbols: SymbolTable) -> int | None:
    address = symbols.note_address
    return None if address is None else address - image_region(address)


def _bases_by_build_id(target: Target, symbols: SymbolTable) -> Iterator[int]:
    """Values of xen_phys_start at which physical memory holds the build-id of these symbols."""
    offset = _note_offset(symbols)
    if offset is None or not symbols.build_id:
        return
    bases = _bases(target)
    notes = target.read_physical_many([(base + offset, buildid.NOTE_SIZE) for base in bases])
    for base, raw in zip(bases, notes, strict=True):
        if not isinstance(raw, Absent) and buildid.parse_note(raw) == symbols.build_id:
            yield base


def _build_id_in(memory: XenMemory, symbols: SymbolTable) -> bytes | None:
    """The build-id of the Xen in memory: where the symbols say, else wherever it is in the image."""
    if symbols.note_address is not None:
        try:
            build_id = buildid.parse_note(memory.read(symbols.note_address, buildid.NOTE_SIZE))
        except Unreadable:
            build_id = None
        if build_id:
            return build_id
    found = _scan(memory, image_region(symbols.address(ROOT)))
    return found[0] if found else None


def _scan(memory: AddressSpace, region: int) -> tuple[bytes, Link] | None:
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


def _other_xen(target: Target, cpus: Sequence[PhysicalCpu], unread: Unread) -> tuple[bytes | None, Link | None]:
    """(build-id, link) of whatever Xen is there, without any symbols."""
    for memory, region in chain(_images(target, cpus, unread), _images_in_memory(target)):
        found = _scan(memory, region)
        if found:
            return found
        table = _carried(memory, region, unread)
        if table is not None and (link := link_of(table)):
            return None, link
    return None, None


def _require_link(target: Target, symbols: SymbolTable, booted: Link | None) -> None:
    """That the symbols are not of the build's other link than the one that the machine booted."""
    mine = link_of(symbols)
    if booted and mine is booted.other:
        raise Undecidable(
            f"{symbols.path} has the symbols of the other link, {mine.value}: the Xen in {target.location} was booted "
            f"from {booted.value}, whose variables have other addresses; give {booted.symbols} with --symbols"
        )


def carried_symbols(target: Target, progress: Progress | None = None) -> SymbolTable:
    """The symbol table that Xen carries in its own image, found without any other symbols.

    A dump whose notes show no Xen is searched, up to 4 GiB of it: `progress` gets (bytes searched, bytes in all).
    Raises Undecidable when there is none, or several and nothing shows which of them ran last.
    """
    unread = Unread(target)
    for memory, region in _images(target, target.cpus(), unread):
        table = _carried(memory, region, unread)
        if table is not None:
            return table
    found = []
    for memory, region in _images_in_memory(target, progress):
        table = _carried(memory, region, unread)
        if table is not None:
            found.append(XenMemory(target, table, memory.root, memory.found_by))
    ran = {memory.root: memory for memory in found if is_in_place(memory)}
    if len(ran) > 1:
        return booted_last(list(ran.values())).symbols
    for memory in ran.values():
        return memory.symbols
    nothing = f"no symbol table of Xen's own was found in {target.location}"
    if why := unread.why or target.truncated:
        raise Undecidable(f"{nothing}: {why}; give its xen-syms with --symbols, or take the dump again")
    raise Undecidable(f"{nothing}: is it Xen{_and_base(target)}? If so, give its xen-syms with --symbols")


def _and_base(target: Target) -> str:
    if isinstance(target.memory, RawMemory) and target.memory.given:
        return ", and is what is where in the file as --map says"
    return "" if target.base is None else f", with physical {target.base:#x} as its first byte (--base)"


def _carried(memory: AddressSpace, region: int, unread: Unread) -> SymbolTable | None:
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


def _images_in_memory(target: Target, progress: Progress | None = None) -> Iterator[tuple[AddressSpace, int]]:
    """The same wherever a dump's memory itself shows one, unless its notes say where: there, and nowhere else."""
    if target.kind == "dump" and all(_xen_phys_start(note) is None for note in target.notes()):
        for root, region in roots(target, progress):
            yield AddressSpace(target, root, _BY_TABLES), region


def _images(target: Target, cpus: Sequence[PhysicalCpu], unread: Unread) -> Iterator[tuple[AddressSpace, int]]:
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
    start, root = None, None
    for note in target.notes():
        if (named := _xen_phys_start(note)) is not None:
            start = named
        elif note.name == "VMCOREINFO_XEN":
            root = parse_address(parse_vmcoreinfo(note.desc).get("SYMBOL(pgd_l4)", ""))
    if start is not None and root is not None and paging.is_canonical(root):
        yield start + root - image_region(root), [image_region(root)], _BY_INFO, start
    for cpu in sorted(cpus, key=_in_xen, reverse=True):
        if cpu.guest_mode is not True and "cr3" in cpu.registers:
            regions = [image_region(cpu.registers["rip"])] if _in_xen(cpu) else IMAGE_REGIONS
            yield cpu.registers["cr3"] & ~0xFFF, regions, _by_cr3(cpu), None


def _xen_phys_start(note: Note) -> int | None:
    """Where the image begins in physical memory, if the note is Xen's crash info and says so."""
    if (note.name, note.type) != ("Xen", XEN_CRASH_INFO):
        return None
    info = parse_crash_info(note.desc)
    return None if isinstance(info, Absent) else info.xen_phys_start


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


def _by_cr3(cpu: PhysicalCpu) -> str:
    return f"CR3 of CPU {cpu.index} ({cpu.source})"


def _in_xen(cpu: PhysicalCpu) -> bool:
    return any(region <= cpu.registers.get("rip", 0) < region + IMAGE_REGION for region in IMAGE_REGIONS)
