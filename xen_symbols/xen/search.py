"""Finding Xen in physical memory alone, where neither notes nor registers say where it is.

Xen's own symbol table is looked for first: it lies in the image, which is one piece of memory at a multiple of 2 MiB
below 4 GiB. What is found is a Xen that ran if its `idle_pg_table` maps itself. That sorts out images that were only
loaded, or are the file of another program's, and Linux's tables, which look much the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.symbols import embedded
from xen_symbols.targets import Target
from xen_symbols.x86 import paging
from xen_symbols.xen import hole
from xen_symbols.xen.memory import (
    IMAGE_MAX,
    IMAGE_MIN_OFFSET,
    IMAGE_REGIONS,
    RELOCATION_LIMIT,
    RELOCATION_STEP,
    ROOT,
    XenMemory,
)

Progress = Callable[[int, int], None]

# The allocator reuses pieces of this size: reading one and seeing only zeros is several times faster than with 1 MiB.
_CHUNK = 64 << 10
_ZEROS = bytes(_CHUNK)
# What is before a token of a table: other tokens, all of the table (0.4 MiB is the largest so far); and what is behind.
_TOKENS, _BEFORE, _BEHIND = 32 << 10, 2 << 20, 64 << 10
# Bounds on hostile memory. Each running Linux in it has one such table, too.
_MOST_PLACES, _MOST_TABLES = 1024, 64


def roots(
    target: Target, progress: Progress | None = None, functions_only: list[int] | None = None
) -> Iterator[tuple[int, int]]:
    """(physical address of `idle_pg_table`, XEN_VIRT_START) of each Xen that lies below 4 GiB and carries a table.

    Where a table has no variables is added to `functions_only`.
    """
    for place, table in tables(target, RELOCATION_LIMIT, progress):
        offset_of = {text[1:]: offset for offset, text in zip(table.offsets, table.texts, strict=True)}.get
        offset = offset_of(ROOT)
        if offset is None:
            if functions_only is not None:
                functions_only.append(place)
            continue
        first = -(-max(0, place - IMAGE_MAX) // RELOCATION_STEP) * RELOCATION_STEP
        for base in range(first, place - IMAGE_MIN_OFFSET + 1, RELOCATION_STEP):
            hole.place(target, base, offset_of)
            yield from (
                (base + offset, region) for region in IMAGE_REGIONS if _maps_itself(target, base, offset, region)
            )


def _maps_itself(target: Target, base: int, offset: int, region: int) -> bool:
    try:
        return paging.walk(target.read_physical, base + offset, region + offset).physical == base + offset
    except Unreadable:
        return False


def booted_last(found: Sequence[XenMemory]) -> XenMemory:
    """Of several Xens in one memory, the one that booted last. Raises Undecidable when nothing shows it.

    Each boot writes a trampoline below 1 MiB, which keeps xen_phys_start for the CPUs that it starts. Where all have
    theirs at the same address, the one that it names is the last that wrote it.
    """
    named = [memory for memory in found if _trampoline_names(memory)]
    places = {_trampoline(memory) for memory in found}
    if len(named) == 1 and len(places) == 1:
        return named[0]
    listed = " and ".join(f"at physical {memory.xen_phys_start:#x} ({_build(memory)})" for memory in found)
    raise Undecidable(
        f"{found[0].target.location} holds {len(found)} Xens, {listed}, as an earlier boot leaves them, and nothing "
        "shows which of them ran last; give the symbols of the one that you mean with --symbols, if they differ"
    )


def _build(memory: XenMemory) -> str:
    build_id = memory.symbols.build_id
    return f"build-id {build_id.hex()}" if build_id else "no build-id"


def _trampoline(memory: XenMemory) -> int | None:
    try:
        return memory.variable("trampoline_phys")
    except Unreadable:
        return None


def _trampoline_names(memory: XenMemory) -> bool:
    """xen/arch/x86/boot/trampoline.S, trampoline_xen_phys_start: 4 bytes, from 4.2 on."""
    address, symbols = _trampoline(memory), memory.symbols
    if address is None:
        return False
    try:
        offset = symbols.address("trampoline_xen_phys_start") - symbols.address("trampoline_start")
        word = memory.target.read_physical(address + offset, 4)
    except Unreadable:
        return False
    return int.from_bytes(word, "little") == memory.xen_phys_start


def tables(target: Target, limit: int, progress: Progress | None = None) -> Iterator[tuple[int, embedded.Embedded]]:
    """(physical address of its tokens, table) of each symbol table of Xen's below `limit`.

    Each byte below `limit` is read once, and 2 MiB more for each place that looks like a table. Raises Undecidable
    when those are too many.
    """
    places = tried = 0
    for (start, end), chunk, data in _chunks(target, limit, progress):
        at = data.find(embedded.DIGITS)
        while at >= 0:
            place = chunk + at
            if embedded.looks_like(*_around(target, start, end, place, _TOKENS)):
                tried += 1
                found = embedded.find_around(*_around(target, start, end, place, _BEFORE))
                if found is not None:
                    yield place, found
            places += 1
            if places == _MOST_PLACES or tried == _MOST_TABLES:
                raise Undecidable(
                    f"too much in {target.location} looks like Xen's symbol table: Xen cannot be found; "
                    "give its own xen-syms with --symbols"
                )
            at = data.find(embedded.DIGITS, at + 1)


def _around(target: Target, start: int, end: int, place: int, before: int) -> tuple[bytes, int]:
    """(memory around a place in [start, end) from a 4-aligned address on, the place in it)."""
    low = max(start + 3 & ~3, place - before & ~3)
    return _read(target, low, min(end, place + _BEHIND)), place - low


def _chunks(target: Target, limit: int, progress: Progress | None) -> Iterator[tuple[tuple[int, int], int, bytes]]:
    """(range of memory, address in it, content) of what is not all zeros; a chunk overlaps the next one by a needle."""
    held = target.written_ranges()
    ranges = [(start, min(end, limit)) for start, end in takewhile(lambda held: held[0] < limit, held)]
    total, done = sum(end - start for start, end in ranges), 0
    for start, end in ranges:
        for chunk in range(start, end, _CHUNK):
            if progress is not None:
                progress(done + chunk - start, total)
            behind = min(chunk + _CHUNK, end)
            data = _read(target, chunk, behind)
            if data != _ZEROS:
                yield (start, end), chunk, data + _read(target, behind, min(behind + len(embedded.DIGITS) - 1, end))
        done += end - start


def _read(target: Target, start: int, end: int) -> bytes:
    """Zeros where it cannot be read: a table may lie before or after such a page, but not across it."""
    try:
        return target.read_physical(start, end - start)
    except Unreadable:
        pages = [(page, min(page + paging.PAGE_SIZE, end) - page) for page in range(start, end, paging.PAGE_SIZE)]
        answers = target.read_physical_many(pages)
        return b"".join(
            answer if isinstance(answer, bytes) else bytes(size)
            for answer, (_, size) in zip(answers, pages, strict=True)
        )
