"""Symbols of an ELF file: xen-syms, or the stripped image `xen` (layouts: gABI chapters 4 and 5).

Symbol columns are sliced out of the table as they are asked for; no object is built per symbol.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from xen_symbols.absence import Kind, Undecidable, Unreadable
from xen_symbols.symbols import buildid
from xen_symbols.symbols.files import Bytes
from xen_symbols.symbols.table import Symbol, SymbolTable

SOURCE = "ELF symbol table"
EM_386, EM_X86_64 = 3, 62
_TYPES = {
    1: "an object file; give xen-syms, its .map, or Xen's image",
    4: "a core file, not symbols: name it as the target",
}
PT_LOAD, PT_NOTE = 1, 4
SHT_SYMTAB, SHT_NOTE, SHT_NOBITS = 2, 7, 8
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
SHN_UNDEF, SHN_LORESERVE, SHN_ABS, SHN_COMMON = 0, 0xFF00, 0xFFF1, 0xFFF2
STB_LOCAL, STB_WEAK, STB_GNU_UNIQUE = 0, 2, 10
STT_OBJECT, STT_SECTION, STT_FILE, STT_GNU_IFUNC = 1, 3, 4, 10


class _Class(NamedTuple):
    """Where ELFCLASS32 and ELFCLASS64 differ."""

    header: struct.Struct  # from e_type on
    program: struct.Struct
    program_fields: tuple[int, ...]  # positions of type, offset, vaddr, filesz
    section: struct.Struct


_CLASSES = {
    1: _Class(struct.Struct("<HHIIIIIHHHHHH"), struct.Struct("<8I"), (0, 1, 2, 4), struct.Struct("<10I")),
    2: _Class(
        struct.Struct("<HHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ"), (0, 2, 3, 5), struct.Struct("<IIQQQQIIQQ")
    ),
}
_SYMBOL_SIZE = 24
# Far above any image of Xen; they bound what a hostile file can cost.
_MOST_SEGMENTS, _MOST_SECTIONS, _LONGEST_NOTES = 64, 1024, 4096
_FILE_OR_SECTION = frozenset(binding << 4 | t for binding in range(16) for t in (STT_SECTION, STT_FILE))


class _Section(NamedTuple):
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    entry_size: int


class _Segment(NamedTuple):
    type: int
    offset: int
    address: int
    file_size: int


class _Headers(NamedTuple):
    elf_class: int
    sections: tuple[_Section, ...]
    segments: tuple[_Segment, ...]


def _headers(path: str, content: Bytes) -> _Headers:
    if content.size < 52:
        raise Undecidable(f"{path}: truncated: an ELF header is longer than its {content.size} bytes")
    ident = content.read(0, 16)
    form = _CLASSES.get(ident[4])
    if form is None or ident[5] != 1:
        raise Undecidable(f"{path}: not a little-endian ELF file; Xen on x86 is one")
    fields = form.header.unpack(content.read(16, form.header.size))
    kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = fields
    if machine != (EM_X86_64 if ident[4] == 2 else EM_386):
        raise Undecidable(f"{path}: for ELF machine {machine}, not x86-64; give the symbols of an x86 Xen")
    if kind in _TYPES:
        raise Undecidable(f"{path}: {_TYPES[kind]}")
    if (phnum and phentsize != form.program.size) or (shnum and shentsize != form.section.size):
        raise Undecidable(f"{path}: corrupt: its ELF header gives impossible entry sizes")
    if phnum > _MOST_SEGMENTS or shnum > _MOST_SECTIONS:
        raise Undecidable(f"{path}: corrupt: {phnum} program and {shnum} section headers; an image of Xen has few")
    programs = form.program.iter_unpack(content.read(phoff, phnum * form.program.size) if phnum else b"")
    sections = form.section.iter_unpack(content.read(shoff, shnum * form.section.size) if shnum and shoff else b"")
    return _Headers(
        ident[4],
        tuple(_Section(s[1], s[2], s[3], s[4], s[5], s[6], s[9]) for s in sections),
        tuple(_Segment(*(p[i] for i in form.program_fields)) for p in programs),
    )


class ElfImage:
    """The file-backed part of the PT_LOAD segments; `base` is added to their addresses."""

    def __init__(self, content: Bytes, segments: Sequence[_Segment], base: int = 0) -> None:
        loads = sorted((s.address + base, s.file_size, s.offset) for s in segments if s.type == PT_LOAD and s.file_size)
        self._content, self._loads = content, loads
        self.segments: Sequence[tuple[int, int]] = [(address, address + size) for address, size, _ in loads]

    def read(self, address: int, size: int) -> bytes:
        for start, length, offset in self._loads:
            if start <= address and address + size <= start + length:
                return self._content.read(offset + address - start, size)
        raise Unreadable(f"the symbol file has no content for {address:#x} to {address + size:#x}", Kind.NOT_HELD)


class ElfRows:
    """The rows of an SHT_SYMTAB section (Elf64_Sym) with its string table."""

    def __init__(self, symbols: bytes, strings: bytes, sections: Sequence[_Section]) -> None:
        self._sections = sections
        self._symbols = symbols
        self._strings = strings.decode("latin-1")
        self._name_offsets: list[int] = memoryview(symbols).cast("I")[0::6].tolist()

    def in_bounds(self) -> bool:
        """Whether every name begins and ends within the string table."""
        return max(self._name_offsets, default=0) < len(self._strings) and self._strings.endswith("\0")

    @cached_property
    def _infos(self) -> bytes:
        return self._symbols[4::_SYMBOL_SIZE]

    @cached_property
    def _section_numbers(self) -> list[int]:
        return memoryview(self._symbols).cast("H")[3::12].tolist()

    @cached_property
    def _addresses(self) -> list[int]:
        return memoryview(self._symbols).cast("Q")[1::3].tolist()

    @cached_property
    def _files(self) -> list[int]:
        """The rows of FILE symbols: each gives the file of the local symbols that follow it."""
        return [row for row, info in enumerate(self._infos) if info & 0xF == STT_FILE]

    @cached_property
    def _no_symbols(self) -> set[int]:
        """The rows that name no part of Xen: FILE, SECTION, undefined."""
        rows = {row for row, info in enumerate(self._infos) if info in _FILE_OR_SECTION}
        rows.update(row for row, section in enumerate(self._section_numbers) if not section)
        return rows

    def _name(self, row: int) -> str:
        start = self._name_offsets[row]
        return self._strings[start : self._strings.index("\0", start)]

    def names(self) -> list[str]:
        return self._names

    @cached_property
    def _names(self) -> list[str]:
        strings, end = self._strings, self._strings.index
        names = [strings[start : end("\0", start)] for start in self._name_offsets]
        for row in self._no_symbols:
            names[row] = ""
        return names

    def addresses(self) -> list[int]:
        return self._addresses

    def placed(self) -> list[int]:
        out = self._no_symbols
        return [row for row, n in enumerate(self._section_numbers) if n < SHN_LORESERVE and row not in out]

    def symbol(self, row: int) -> Symbol:
        info = self._infos[row]
        file = None
        if info >> 4 == STB_LOCAL and (before := bisect_left(self._files, row)):
            file = self._name(self._files[before - 1]) or None
        return Symbol(self._addresses[row], self._name(row), file, self._kind(info, self._section_numbers[row]))

    def size(self, row: int) -> int:
        return int.from_bytes(self._symbols[row * _SYMBOL_SIZE + 16 : (row + 1) * _SYMBOL_SIZE], "little")

    def _kind(self, info: int, number: int) -> str:
        """nm(1)'s letter, by binding and type, then by the section's flags."""
        binding, symbol_type = info >> 4, info & 0xF
        if binding == STB_WEAK:
            letter = "v" if symbol_type == STT_OBJECT else "w"
            return letter if number == SHN_UNDEF else letter.upper()
        if number in (SHN_UNDEF, SHN_COMMON):
            return "U" if number == SHN_UNDEF else "C"
        if symbol_type == STT_GNU_IFUNC:
            return "i"
        if binding == STB_GNU_UNIQUE:
            return "u"
        if number == SHN_ABS:
            letter = "a"
        elif number < len(self._sections):
            letter = _section_letter(self._sections[number])
        else:
            letter = "?"
        return letter if binding == STB_LOCAL else letter.upper()


def _section_letter(section: _Section) -> str:
    if section.flags & SHF_EXECINSTR:
        return "t"
    if section.type == SHT_NOBITS:
        return "b"
    if section.flags & SHF_ALLOC:
        return "d" if section.flags & SHF_WRITE else "r"
    return "n"


def _note(content: Bytes, headers: _Headers) -> tuple[int, bytes] | None:
    """(file offset, id) of the build-id note."""
    ranges = [(s.offset, s.file_size) for s in headers.segments if s.type == PT_NOTE]
    ranges += [(s.offset, s.size) for s in headers.sections if s.type == SHT_NOTE]
    for offset, size in ranges:
        found = buildid.find_in_notes(content.read(offset, min(size, _LONGEST_NOTES)))
        if found is not None:
            return offset + found[0], found[1]
    return None


def _address_of(offset: int, headers: _Headers) -> int | None:
    """The virtual address of a file offset. The note headers' own addresses are wrong in `xen` up to 4.17."""
    for s in headers.segments:
        if s.type == PT_LOAD and s.offset <= offset < s.offset + s.file_size:
            return s.address + offset - s.offset
    return None


def load_elf(path: str, content: Bytes) -> SymbolTable:
    """The symbol table of an ELF file, or the one embedded in its content. Raises Undecidable."""
    headers = _headers(path, content)
    note = _note(content, headers)
    symtab = next((s for s in headers.sections if s.type == SHT_SYMTAB and s.size), None)
    if symtab is None or headers.elf_class == 1:
        return _load_embedded(path, content, headers)
    if symtab.entry_size != _SYMBOL_SIZE or symtab.size % _SYMBOL_SIZE or symtab.link >= len(headers.sections):
        raise Undecidable(f"{path}: corrupt: its ELF symbol table has no valid layout")
    strtab = headers.sections[symtab.link]
    rows = ElfRows(content.read(symtab.offset, symtab.size), content.read(strtab.offset, strtab.size), headers.sections)
    if not rows.in_bounds():
        raise Undecidable(f"{path}: corrupt: its ELF symbol table names strings beyond the string table")
    allocated = sorted((s.address, s.address + s.size) for s in headers.sections if s.flags & SHF_ALLOC and s.size)
    return SymbolTable(
        path,
        SOURCE,
        rows,
        allocated,
        build_id=note[1] if note else None,
        note_address=_address_of(note[0], headers) if note else None,
        image=ElfImage(content, headers.segments),
    )


def _load_embedded(path: str, content: Bytes, headers: _Headers) -> SymbolTable:
    from xen_symbols.symbols import embedded

    image = ElfImage(content, headers.segments)
    if sum(end - start for start, end in image.segments) > content.size:
        raise Undecidable(f"{path}: truncated or corrupt: its segments do not fit in the file")
    pieces = [(start, image.read(start, end - start)) for start, end in image.segments]
    base = 0
    if headers.elf_class == 1:  # linked at physical addresses by Xen's mkelf32
        found = embedded.virtual_start(pieces)
        if found is None:
            raise Undecidable(f"{path}: does not say at which virtual address it runs; give xen-syms or its .map")
        base = found
        image = ElfImage(content, headers.segments, base)
    return embedded.load_pieces(path, [(start + base, data) for start, data in pieces], image)
