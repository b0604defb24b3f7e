"""The symbol table that Xen carries in its own .rodata, found and decoded without any other help.

Written by Xen's tools/symbols.c, after Linux's kallsyms. In memory order: offsets from
XEN_VIRT_START (u32 each), their number (u32), names (a length byte, then that many token numbers),
markers (u32: where in names entries 0, 256, 512, … begin), 256 NUL-terminated tokens, and the
position of each token (u16). An expanded name begins with nm(1)'s letter.
What changed: local symbols are `file#name` since 4.7 (d37d63d4b5), variables are there only with
--all-symbols (CONFIG_LIVEPATCH, 4.7+), entries of length 0 end functions since 4.21 (d3b637fba3),
and the tables are padded to their natural alignment since 4.22 (9f4d363241), before to 4 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.image import Image
from xen_symbols.records import NamedTuple
from xen_symbols.symbols import buildid
from xen_symbols.symbols.listed import ListedRows, listed_table
from xen_symbols.symbols.table import CARRIED, SymbolTable
from xen_symbols.x86.paging import PAGE_SIZE, Untranslated

REGION = 1 << 30  # Xen's image has the 1 GiB from XEN_VIRT_START to itself, in every release
_GROUP = 256  # entries per marker
# A character that occurs in any symbol is its own token, and every Xen has all ten digits.
DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_LONGEST_NAME = 512
_TOKENS_MAX = (1 << 16) + 3 * _LONGEST_NAME  # bytes from the digits to the end of the tokens' positions, which are u16
# Bounds on hostile input; a real Xen has one such place.
_MOST_PLACES, _MOST_TOKEN_TABLES = 1024, 8
_CHUNK = 1 << 20
_ENOUGH_POINTERS = 256


class Embedded(NamedTuple):
    """A decoded table. `start` and `end` are where it lies in the memory searched."""

    start: int
    end: int
    offsets: tuple[int, ...]  # from XEN_VIRT_START, ascending
    texts: tuple[str, ...]  # nm letter and name; "" ends the function before it


def find(memory: bytes, start: int = 0) -> Embedded | None:
    """The table in a stretch of memory that begins at a 4-aligned address, its digits from `start` on; None if there is
    none."""
    place, token_tables = memory.find(DIGITS, start), 0
    for _ in range(_MOST_PLACES):
        if place < 0:
            break
        if looks_like(memory, place):
            found = find_around(memory, place)
            token_tables += 1
            if found is not None or token_tables == _MOST_TOKEN_TABLES:
                return found
        place = memory.find(DIGITS, place + 1)
    return None


def looks_like(memory: bytes, digits: int) -> bool:
    """Whether a table's tokens and their positions, Xen's or Linux's, are around DIGITS at `digits`."""
    return _tokens_around(memory, digits) is not None


def find_around(memory: bytes, digits: int) -> Embedded | None:
    """The table whose tokens are around DIGITS at `digits`."""
    tokens = _tokens_around(memory, digits)
    return None if tokens is None else _table_before(memory, *tokens)


def _tokens_around(memory: bytes, digits: int) -> tuple[int, int, list[str]] | None:
    """(start of the token table, end of the token index, tokens), if both are around `digits`."""
    start = digits
    for _ in range(ord("0") + 1):  # the NUL of each token before, and the byte before the first
        start = memory.rfind(b"\0", max(0, start - _LONGEST_NAME), start)
        if start < 0:
            return None
    start += 1
    tokens, positions, position = [], [], start
    for _ in range(256):
        end = memory.find(b"\0", position, position + _LONGEST_NAME)
        if end < 0:
            return None
        tokens.append(memory[position:end].decode("latin-1"))
        positions.append(position - start)
        position = end + 1
    if positions[-1] > 0xFFFF or not all(token.isascii() and token.isprintable() for token in tokens):
        return None
    index = struct.pack("<256H", *positions)
    found = memory.find(index, position, position + len(index) + 3)
    return None if found < 0 else (start, found + len(index), tokens)


def _table_before(memory: bytes, token_table: int, end: int, tokens: list[str]) -> Embedded | None:
    """The table whose tokens begin at `token_table`: markers, names, number and offsets go before."""
    markers: list[int] = []
    position = token_table & ~3
    while not markers or markers[-1]:
        position -= 4
        if position < 0:
            return None
        marker = _u32(memory, position)
        if markers and marker >= markers[-1]:
            return None
        markers.append(marker)
    markers.reverse()
    last = position - markers[-1]  # the names end within 3 bytes of `position`
    for names in range(last - 1 & ~3, max(4, last - _GROUP * 256 - 3) - 1, -4):
        count = _u32(memory, names - 4)
        offsets = names - 4 - 4 * count
        if (count + _GROUP - 1) // _GROUP == len(markers) and offsets >= 0:
            spans = _spans(memory, names, position, count, markers)
            values = struct.unpack_from(f"<{count}I", memory, offsets) if spans else ()
            if spans and values[-1] < REGION and all(map(int.__le__, values, values[1:])):
                texts = _expand(memory, spans, tokens)
                if texts is not None:
                    return Embedded(offsets, end, values, texts)
    return None


def _spans(memory: bytes, names: int, end: int, count: int, markers: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each entry's tokens; empty if the entries do not agree with every marker and the end."""
    spans, position = [], names
    for number in range(count):
        if position >= end or (number % _GROUP == 0 and position - names != markers[number // _GROUP]):
            return []
        start = position + 1
        position = start + memory[position]
        spans.append((start, position))
    return spans if 0 <= end - position <= 3 else []


def _expand(memory: bytes, spans: list[tuple[int, int]], tokens: list[str]) -> tuple[str, ...] | None:
    """The text of each entry; None where one is not a symbol."""
    token, texts = tokens.__getitem__, []
    for start, end in spans:
        text = "".join(map(token, memory[start:end]))
        if text and (len(text) < 2 or len(text) > _LONGEST_NAME or not text[0].isalpha()):
            return None
        texts.append(text)
    return tuple(texts)


def _u32(memory: bytes, position: int) -> int:
    return int.from_bytes(memory[position : position + 4], "little")


def virtual_start(pieces: Sequence[tuple[int, bytes]]) -> int | None:
    """XEN_VIRT_START of a stripped image whose (address, content) pieces are linked at physical addresses.

    The image is full of pointers into itself; nearly all of them name one 1 GiB region. In every
    release it is in PML4 slot 261 (0xffff82…, asm-x86/config.h). None if none stands out.
    """
    low = min((start for start, _ in pieces), default=0)
    high = max((start + len(data) for start, data in pieces), default=0)
    regions: dict[int, int] = {}
    for start, data in pieces:
        position = data.find(b"\x82\xff\xff")
        while position >= 0 and sum(regions.values()) < _ENOUGH_POINTERS:
            if (start + position) % 8 == 5:
                pointer = int.from_bytes(data[max(0, position - 5) : position + 3], "little")
                if low <= pointer % REGION < high:
                    regions[pointer // REGION] = regions.get(pointer // REGION, 0) + 1
            position = data.find(b"\x82\xff\xff", position + 1)
    best = max(regions, key=regions.__getitem__, default=None)
    if best is None or regions[best] * 10 < sum(regions.values()) * 9:
        return None
    return best * REGION


def load_image(path: str, image: Image) -> SymbolTable:
    """The table in an image whose addresses are virtual. Raises Undecidable."""
    pieces = image.pieces()
    for start, memory in pieces:
        found = find(memory)
        if found is not None:
            return _symbol_table(path, start // REGION * REGION, found, pieces, image)
    raise Undecidable("no ELF symbol table, and none embedded by Xen's build; give xen-syms or its .map")


def load_memory(path: str, read: Callable[[int, int], bytes], start: int, end: int) -> SymbolTable:
    """The table in Xen's image in a target's memory, somewhere in the virtual addresses [start, end).

    `read(address, size)` raises Unreadable for what is not there, such as the init sections that
    Xen gave back. Reading stops behind the table. Raises Undecidable if there is none.
    """
    end = min(end, (start // REGION + 1) * REGION)
    for run, memory, known in _runs(read, start, end):
        found = find(memory, max(0, known - _TOKENS_MAX))
        if found is not None:
            base = start // REGION * REGION
            # The note lies behind .rodata, which is far smaller than a chunk.
            behind = run + len(memory)
            rest = b"".join(data for _, data in readable(read, behind, min(_CHUNK, end - behind)))
            return _symbol_table(path, base, found, [(run, memory + rest)], None)
    raise Undecidable(f"{path}: Xen's embedded symbol table is not in its memory; give xen-syms with --symbols")


def _runs(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[tuple[int, bytes, int]]:
    """(address, content, bytes of it that were there the last time) of readable runs, each again whenever it has grown
    by a chunk."""
    run, memory, known = start, b"", 0
    for chunk in range(start, end, _CHUNK):
        for address, data in readable(read, chunk, min(_CHUNK, end - chunk)):
            if address != run + len(memory):
                yield run, memory, known
                run, memory, known = address, b"", 0
            memory += data
        if len(memory) > known:
            yield run, memory, known
            known = len(memory)


def readable(read: Callable[[int, int], bytes], address: int, size: int) -> Iterator[tuple[int, bytes]]:
    """What can be read of a range: without what is not mapped, which its page tables tell, else page by page."""
    end = address + size
    while address < end:
        try:
            yield address, read(address, end - address)
            return
        except Untranslated as hole:
            yield from readable(read, address, hole.start - address)
            address = max(address, hole.end)
        except Unreadable:
            if end - address > PAGE_SIZE:
                yield from _readable_pages(read, address, end)
            return


def _readable_pages(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[tuple[int, bytes]]:
    first, pages = start, list[bytes]()
    for address in range(start, end, PAGE_SIZE):
        try:
            pages.append(read(address, min(PAGE_SIZE, end - address)))
        except Unreadable:
            if pages:
                yield first, b"".join(pages)
            first, pages = address + PAGE_SIZE, []
    if pages:
        yield first, b"".join(pages)


def _symbol_table(
    path: str, base: int, found: Embedded, pieces: Sequence[tuple[int, bytes]], image: Image | None
) -> SymbolTable:
    rows = ListedRows([base + o for o in found.offsets], [t[:1] for t in found.texts], [t[1:] for t in found.texts])
    table = listed_table(path, CARRIED, rows, image)
    for start, memory in pieces:
        note = buildid.scan(memory)
        if note is not None:
            table.note_address, table.build_id = start + note[0], note[1]
            break
    return table
