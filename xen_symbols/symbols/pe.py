"""Symbols of a PE image: xen.efi, by its COFF symbol table, or where that was stripped by the table that Xen carries.

The layouts are of Microsoft's PE format (sections named below), in the form that GNU ld writes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from xen_symbols.absence import Undecidable
from xen_symbols.formats.content import Content
from xen_symbols.formats.image import Image
from xen_symbols.records import NamedTuple
from xen_symbols.symbols import buildid, embedded
from xen_symbols.symbols.listed import ListedRows, listed_table
from xen_symbols.symbols.table import SymbolTable

SOURCE = "COFF symbol table"
_AT_PE = 0x3C  # MS-DOS stub: where the PE signature is
_FILE = struct.Struct(
    "<4sHHIIIHH"
)  # signature, machine, sections, time, symbols at, their number, optional size, flags
_SECTION = struct.Struct("<8sIIIIIIHHI")  # name, virtual size, RVA, raw size, raw offset, …, flags
_SYMBOL = struct.Struct("<8sIhHBB")  # name, value, section (from 1), type, storage class, auxiliary records
_AMD64, _PE32_PLUS = 0x8664, 0x20B
_IMAGE_BASE, _DEBUG_DIRECTORY = 24, 160  # offsets in the optional header of PE32+
_CODE, _UNINITIALISED, _DISCARDABLE, _EXECUTE, _WRITE = 0x20, 0x80, 0x2000000, 0x20000000, 0x80000000
_EXTERNAL, _FILE_NAME = 2, 103  # storage classes
# Far above any image of Xen; they bound what a hostile file can cost.
_MOST_SECTIONS, _MOST_SYMBOLS = 256, 1 << 18


class _Section(NamedTuple):
    address: int
    size: int
    raw_offset: int
    raw_size: int
    flags: int

    @property
    def letter(self) -> str:
        """nm(1)'s."""
        if self.flags & (_CODE | _EXECUTE):
            return "t"
        if self.flags & _UNINITIALISED:
            return "b"
        return "d" if self.flags & _WRITE else "r"


def read_symbols(path: str, content: Content) -> SymbolTable:
    """Raises Undecidable, and Unreadable where the file ends too early."""
    start = int.from_bytes(content.read(_AT_PE, 4), "little")
    signature, machine, sections, _, table, count, optional, _ = _FILE.unpack(content.read(start, _FILE.size))
    if signature != b"PE\0\0":
        raise Undecidable("an MS-DOS program, not a PE image; give xen-syms, xen.efi, or the .map of either")
    if machine != _AMD64:
        raise Undecidable(f"for PE machine {machine:#x}, not x86-64; give the symbols of an x86 Xen")
    if sections > _MOST_SECTIONS or count > _MOST_SYMBOLS:
        raise Undecidable(f"corrupt: {sections} sections and {count} symbols; an image of Xen has fewer")
    header = content.read(start + _FILE.size, optional)
    if len(header) < _DEBUG_DIRECTORY + 8 or int.from_bytes(header[:2], "little") != _PE32_PLUS:
        raise Undecidable("corrupt: its optional header is not that of a 64-bit PE image")
    base = int.from_bytes(header[_IMAGE_BASE : _IMAGE_BASE + 8], "little")
    raw = content.read(start + _FILE.size + optional, sections * _SECTION.size)
    parts = [_Section(base + row[2], row[1], row[4], row[3], row[9]) for row in _SECTION.iter_unpack(raw)]
    image = Image(
        content, ((p.address, p.address + min(p.size, p.raw_size), p.raw_offset) for p in parts if _loaded(p))
    )
    symbols = list(_symbols(content, table, count, parts)) if table else []
    if not symbols:
        if sum(end - first for first, end in image.segments) > content.size:
            raise Undecidable("truncated or corrupt: its sections do not fit in the file")
        return embedded.load_image(path, image)
    found = listed_table(path, SOURCE, ListedRows(*zip(*symbols, strict=True)), image)
    if debug := int.from_bytes(header[_DEBUG_DIRECTORY : _DEBUG_DIRECTORY + 4], "little"):
        found.build_id = buildid.parse_note(image.read(base + debug, buildid.CODEVIEW_SIZE))
        found.note_address = base + debug if found.build_id else None
    return found


def _loaded(part: _Section) -> bool:
    return bool(part.raw_size and part.raw_offset) and not part.flags & _DISCARDABLE


def _symbols(content: Content, table: int, count: int, parts: list[_Section]) -> Iterator[tuple[int, str, str]]:
    """(address, nm letter, name or file#name) of each symbol in a section. An absolute one has only 32 bits of its
    value, and the section symbols say nothing."""
    records = content.read(table, count * _SYMBOL.size)
    at = table + len(records)
    strings = content.read(at, min(int.from_bytes(content.read(at, 4), "little"), content.size - at))
    file, position = "", 0
    while position < len(records):
        name, value, section, _, kind, extra = _SYMBOL.unpack_from(records, position)
        position += _SYMBOL.size
        if kind == _FILE_NAME:
            file = _text(records[position : position + extra * _SYMBOL.size], strings)
        elif 0 < section <= len(parts) and (kind == _EXTERNAL or not extra):
            part, text = parts[section - 1], _text(name, strings)
            if kind == _EXTERNAL:
                yield part.address + value, part.letter.upper(), text
            else:
                yield part.address + value, part.letter, f"{file}#{text}" if file else text
        position += extra * _SYMBOL.size


def _text(name: bytes, strings: bytes) -> str:
    """A name is at its place, or where four zeros begin it in the string table."""
    if name[:4] == bytes(4):
        at = int.from_bytes(name[4:8], "little")
        name = strings[at : strings.find(b"\0", at)]
    return name.partition(b"\0")[0].decode("latin-1")
