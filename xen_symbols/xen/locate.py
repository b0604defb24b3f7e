"""Finding Xen in a target: where its page tables are, and whether the symbols are of this build.

What looks for it where nothing shows it, `images` and `search`, is imported when it is needed: importing is most of
what judging a dump costs (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.symbols import buildid
from xen_symbols.symbols.functions import names_no_variables
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.x86 import paging
from xen_symbols.xen.given import NOTHING_GIVEN, Given
from xen_symbols.xen.memory import IMAGE_MAX, ROOT, XenMemory, image_region
from xen_symbols.xen.shown import BY_INFO, Unread, and_base, by_cr3, note_offset, pgd_l4, xen_phys_start_of


def locate(target: Target, symbols: SymbolTable, given: Given = NOTHING_GIVEN) -> XenMemory:
    """Xen in `target`, whose symbols are `symbols`.

    Raises Undecidable when there is no Xen, Xen has no paging yet, it is another build (both build-ids are named), or
    an alias is given that the symbols do not have.
    """
    symbols = symbols.with_aliases(given.aliases)
    cpus = target.cpus()
    unread = Unread(target)
    memory = _by_evidence(target, symbols, cpus, unread)
    theirs = _build_id_in(memory, symbols) if memory else None
    if memory is None or (symbols.build_id and theirs and theirs != symbols.build_id):
        other = theirs
        if memory is None:
            from xen_symbols.xen import images

            other, booted = images.other_xen(target, cpus, unread)
            images.require_link(target, symbols, booted)
        if other and symbols.build_id and other != symbols.build_id:
            if not given.allow_mismatch or memory is None:
                even = " (its page tables cannot be found with them, so a mismatch cannot be allowed)"
                raise Undecidable(
                    f"the symbols are of another build: {symbols.path} has build-id {symbols.build_id.hex()}, "
                    f"the Xen in {target.location} has {other.hex()}{even * given.allow_mismatch}; "
                    "give its own xen-syms with --symbols"
                )
        elif memory is None:
            raise Undecidable(_why_not(target, symbols, cpus, unread))
    memory.given_generation = given.generation
    if theirs:
        memory.build_id = theirs
    else:
        memory.build_id = Absent("the build-id note in memory could not be read")
        if symbols.build_id and not given.allow_mismatch:
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
        if memory.physical(memory.table) != memory.root:
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
        f"is it Xen{and_base(target)}, and are these its symbols?"
    )


def _by_evidence(target: Target, symbols: SymbolTable, cpus: Sequence[PhysicalCpu], unread: Unread) -> XenMemory | None:
    """By the first root that maps `idle_pg_table` to itself: of those that notes and CPUs name, else any in memory."""
    table = _table_address(target, symbols)
    tried: set[int] = set()
    for root, found_by in _roots(target, cpus, table):
        if root in tried:
            continue
        tried.add(root)
        memory = _rooted(target, symbols, table, root, found_by, unread)
        if memory is not None:
            return memory
    from xen_symbols.xen import images, search

    places = images.roots_in_memory(target, symbols, table)
    guess = Unread(target)  # wherever it may lie: that memory is not there says nothing
    found = [_rooted(target, symbols, table, root, found_by, guess) for root, found_by in places]
    ran = [memory for memory in found if memory is not None and images.is_in_place(memory)]
    if len(ran) < 2:
        return ran[0] if ran else None
    return search.booted_last(ran)


def _table_address(target: Target, symbols: SymbolTable) -> int:
    """Where ROOT is mapped: the symbols say it, or of functions alone the dump's VMCOREINFO. Raises Undecidable."""
    try:
        return symbols.address(ROOT)
    except Unreadable as error:
        why = f"{symbols.path} does not name {ROOT}: {error.absent}; are these Xen's symbols?"
    if symbols.text_only:
        if table := pgd_l4(target):
            return table
        why = names_no_variables(symbols)
    raise Undecidable(why)


def _rooted(
    target: Target, symbols: SymbolTable, table: int, root: int, found_by: str, unread: Unread
) -> XenMemory | None:
    """Xen with its idle page tables, which are at `table`, if `root` maps them."""
    memory = XenMemory(target, symbols, root, found_by, table)
    try:
        own = memory.physical(table)
        if own != root:  # a CPU's own tables: Xen's idle tables are where they say
            memory = XenMemory(target, symbols, own, found_by, table)
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
    offset = note_offset(symbols)
    variable = None if symbols.text_only else symbols.get("xen_phys_start")
    if symbols.build_id and offset is not None:
        (raw,) = memory.target.read_physical_many([(base + offset, buildid.NOTE_SIZE)])
        return not isinstance(raw, Absent) and buildid.parse_note(raw) == symbols.build_id
    if variable is None:
        return False
    (raw,) = memory.target.read_physical_many([(base + variable - image_region(variable), 8)])
    return not isinstance(raw, Absent) and int.from_bytes(raw, "little") == base


def _roots(target: Target, cpus: Sequence[PhysicalCpu], table: int) -> Iterator[tuple[int, str]]:
    offset = table - image_region(table)
    for note in target.notes():
        if (start := xen_phys_start_of(note)) is not None:
            yield start + offset, BY_INFO
    for cpu in cpus:
        if cpu.guest_mode is True or not cpu.registers.get("cr0", paging.CR0_PG) & paging.CR0_PG:
            continue
        if "cr3" in cpu.registers:
            yield cpu.registers["cr3"] & ~0xFFF, by_cr3(cpu)


def _build_id_in(memory: XenMemory, symbols: SymbolTable) -> bytes | None:
    """The build-id of the Xen in memory: where the symbols say, else wherever it is in the image."""
    if symbols.note_address is not None:
        try:
            build_id = buildid.parse_note(memory.read(symbols.note_address, buildid.NOTE_SIZE))
        except Unreadable:
            build_id = None
        if build_id:
            return build_id
    from xen_symbols.xen import images

    found = images.scan(memory, image_region(memory.table))
    return found[0] if found else None
