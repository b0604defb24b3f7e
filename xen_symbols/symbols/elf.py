"""Symbols of an ELF file: xen-syms, or the stripped image `xen`.

Symbol columns are sliced out of the table as they are asked for; no object is built per symbol.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import compress

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats import elf
from xen_symbols.formats.content import Content
from xen_symbols.formats.elf import ELF32, ELF64, PT_LOAD, PT_NOTE, SHT_NOTE, SHT_SYMTAB, Layout, Program, Section
from xen_symbols.formats.image import Image
from xen_symbols.records import NamedTuple
from xen_symbols.symbols import buildid
from xen_symbols.symbols.table import Symbol, SymbolTable

SOURCE = "ELF symbol table"
_TYPES = {
    elf.ET_REL: "an object file; give xen-syms, its .map, or Xen's image",
    elf.ET_CORE: "a core file, not symbols: give it as the target",
}
_SYMBOL_SIZE = ELF64.symbol.size
# Far above any image of Xen; they bound what a hostile file can cost.
_MOST_SEGMENTS, _MOST_SECTIONS, _LONGEST_NOTES = 64, 1024, 4096
# For bytes.translate(): 1 for each st_info of such a type.
_IS_FILE = bytes(info & 0xF == elf.STT_FILE for info in range(256))
_IS_FILE_OR_SECTION = bytes(info & 0xF in (elf.STT_SECTION, elf.STT_FILE) for info in range(256))


class _Headers(NamedTuple):
    layout: Layout
    sections: tuple[Section, ...]
    segments: tuple[Program, ...]


def _headers(content: Content) -> _Headers:
    layout = elf.layout_of(content)
    if layout is None:
        raise Undecidable("not a little-endian ELF file; Xen on x86 is one")
    header = layout.read_header(content)
    if header.machine != (elf.EM_X86_64 if layout is ELF64 else elf.EM_386):
        raise Undecidable(f"for ELF machine {header.machine}, not x86-64; give the symbols of an x86 Xen")
    if header.type in _TYPES:
        raise Undecidable(_TYPES[header.type])
    program_size, section_size = layout.program.size, layout.section.size
    if (header.phnum and header.phentsize != program_size) or (header.shnum and header.shentsize != section_size):
        raise Undecidable("corrupt: its ELF header gives impossible entry sizes")
    if header.phnum > _MOST_SEGMENTS or header.shnum > _MOST_SECTIONS:
        raise Undecidable(
            f"corrupt: {header.phnum} program and {header.shnum} section headers; an image of Xen has few"
        )
    programs = content.read(header.phoff, header.phnum * program_size) if header.phnum else b""
    sections = content.read(header.shoff, header.shnum * section_size) if header.shnum and header.shoff else b""
    return _Headers(layout, tuple(layout.sections(sections)), tuple(layout.programs(programs)))


def _image(content: Content, headers: _Headers) -> Image:
    """The file-backed part of the PT_LOAD segments, at the addresses that the file is linked at."""
    loads = (s for s in headers.segments if s.type == PT_LOAD and s.filesz)
    return Image(content, ((s.vaddr, s.vaddr + s.filesz, s.offset) for s in loads))


class ElfRows:
    """The rows of an SHT_SYMTAB section (Elf64_Sym) with its string table."""

    def __init__(self, symbols: bytes, strings: bytes, sections: Sequence[Section]) -> None:
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
        return list(self._rows_marked(_IS_FILE))

    @cached_property
    def _no_symbols(self) -> set[int]:
        """The rows that name no part of Xen: FILE, SECTION, undefined."""
        rows = set(self._rows_marked(_IS_FILE_OR_SECTION))
        rows.update(row for row, section in enumerate(self._section_numbers) if not section)
        return rows

    def _rows_marked(self, marks: bytes) -> Iterator[int]:
        infos = self._infos
        return compress(range(len(infos)), infos.translate(marks))

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
        return [row for row, n in enumerate(self._section_numbers) if n < elf.SHN_LORESERVE and row not in out]

    def symbol(self, row: int) -> Symbol:
        info = self._infos[row]
        file = None
        if info >> 4 == elf.STB_LOCAL and (before := bisect_left(self._files, row)):
            file = self._name(self._files[before - 1]) or None
        return Symbol(self._addresses[row], self._name(row), file, self._kind(info, self._section_numbers[row]))

    def size(self, row: int) -> int:
        return int.from_bytes(self._symbols[row * _SYMBOL_SIZE + 16 : (row + 1) * _SYMBOL_SIZE], "little")

    def _kind(self, info: int, number: int) -> str:
        """nm(1)'s letter, by binding and type, then by the section's flags."""
        binding, symbol_type = info >> 4, info & 0xF
        if binding == elf.STB_WEAK:
            letter = "v" if symbol_type == elf.STT_OBJECT else "w"
            return letter if number == elf.SHN_UNDEF else letter.upper()
        if number in (elf.SHN_UNDEF, elf.SHN_COMMON):
            return "U" if number == elf.SHN_UNDEF else "C"
        if symbol_type == elf.STT_GNU_IFUNC:
            return "i"
        if binding == elf.STB_GNU_UNIQUE:
            return "u"
        if number == elf.SHN_ABS:
            letter = "a"
        elif number < len(self._sections):
            letter = _section_letter(self._sections[number])
        else:
            letter = "?"
        return letter if binding == elf.STB_LOCAL else letter.upper()


def _section_letter(section: Section) -> str:
    if section.flags & elf.SHF_EXECINSTR:
        return "t"
    if section.type == elf.SHT_NOBITS:
        return "b"
    if section.flags & elf.SHF_ALLOC:
        return "d" if section.flags & elf.SHF_WRITE else "r"
    return "n"


def _note(content: Content, headers: _Headers) -> tuple[int, bytes] | None:
    """(file offset, id) of the build-id note."""
    ranges = [(s.offset, s.filesz) for s in headers.segments if s.type == PT_NOTE]
    ranges += [(s.offset, s.size) for s in headers.sections if s.type == SHT_NOTE]
    for offset, size in ranges:
        found = buildid.find_in_notes(content.read(offset, min(size, _LONGEST_NOTES)))
        if found is not None:
            return offset + found[0], found[1]
    return None


def _address_of(offset: int, headers: _Headers) -> int | None:
    """The virtual address of a file offset. The note headers' own addresses are wrong in `xen` up to 4.17."""
    for s in headers.segments:
        if s.type == PT_LOAD and s.offset <= offset < s.offset + s.filesz:
            return s.vaddr + offset - s.offset
    return None


def read_symbols(path: str, content: Content) -> SymbolTable:
    """The symbol table of an ELF file, or the one embedded in its content. Raises Undecidable, and Unreadable where the
    file ends too early."""
    headers = _headers(content)
    note = _note(content, headers)
    symtab = next((s for s in headers.sections if s.type == SHT_SYMTAB and s.size), None)
    if symtab is None or headers.layout is ELF32:
        return _load_embedded(path, content, headers)
    if symtab.entry_size != _SYMBOL_SIZE or symtab.size % _SYMBOL_SIZE or symtab.link >= len(headers.sections):
        raise Undecidable("corrupt: its ELF symbol table has no valid layout")
    strtab = headers.sections[symtab.link]
    rows = ElfRows(content.read(symtab.offset, symtab.size), content.read(strtab.offset, strtab.size), headers.sections)
    if not rows.in_bounds():
        raise Undecidable("corrupt: its ELF symbol table refers to strings beyond the string table")
    allocated = sorted((s.address, s.address + s.size) for s in headers.sections if s.flags & elf.SHF_ALLOC and s.size)
    table = SymbolTable(
        path,
        SOURCE,
        rows,
        allocated,
        build_id=note[1] if note else None,
        note_address=_address_of(note[0], headers) if note else None,
        image=_image(content, headers),
    )
    if note is None:
        _note_of_efi(table)
    return table


def _note_of_efi(table: SymbolTable) -> None:
    """The build-id of xen.efi as an ELF file (Debian's xen-….efi.elf): it is not in an ELF note."""
    for symbol in table.candidates(buildid.SYMBOL):
        try:
            note = table.image.read(symbol.address, buildid.CODEVIEW_SIZE) if table.image else b""
        except Unreadable:
            continue
        if buildid.is_of_efi(note):
            table.build_id, table.note_address = buildid.parse_note(note), symbol.address


def _load_embedded(path: str, content: Content, headers: _Headers) -> SymbolTable:
    from xen_symbols.symbols import embedded  # xen-syms has its own table

    image = _image(content, headers)
    if sum(end - start for start, end in image.segments) > content.size:
        raise Undecidable("truncated or corrupt: its segments do not fit in the file")
    if headers.layout is ELF32:  # linked at physical addresses by Xen's mkelf32
        base = embedded.virtual_start(image.pieces())
        if base is None:
            raise Undecidable("does not say at which virtual address it runs; give xen-syms or its .map")
        image = image.moved(base)
    return embedded.load_image(path, image)
