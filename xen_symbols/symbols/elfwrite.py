"""A symbol table as an ELF file: what a debugger needs to name what Xen carries in its own image, or a `.map` lists."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby

from xen_symbols.formats import elf
from xen_symbols.formats.elf import ELF64, Header, Section
from xen_symbols.symbols import buildid
from xen_symbols.symbols.table import TEXT, Symbol, SymbolTable

_MOST_SECTIONS = 64  # of memory; Xen has four stretches of text or data


def symbol_file(table: SymbolTable) -> bytes:
    """An ELF64 executable with these symbols and build-id. Its sections are empty: memory is the machine's to show.

    Text and data are sections of their own, by which a debugger tells functions from variables.
    """
    placed = map(table.rows.symbol, table.rows.placed())
    symbols = sorted((symbol for symbol in placed if symbol.name), key=lambda s: (s.address, not _is_text(s)))
    stretches = [list(group) for _, group in groupby(symbols, _is_text)]
    if rest := list(chain.from_iterable(stretches[_MOST_SECTIONS:])):
        stretches[_MOST_SECTIONS:] = [rest]
    end = max((end for _, end in table.ranges), default=0)
    strings = _Strings()
    sections = [bytes(ELF64.section.size)]
    section_of: dict[Symbol, int] = {}
    for number, stretch in enumerate(stretches, 1):
        following = stretches[number][0].address if number < len(stretches) else max(end, stretch[-1].address + 1)
        text = _is_text(stretch[0])
        flags = elf.SHF_ALLOC | (elf.SHF_EXECINSTR if text else elf.SHF_WRITE)
        start = stretch[0].address
        name = strings.add(".text" if text else ".data")
        section = Section(name, elf.SHT_NOBITS, flags, start, 0, following - start, 0, 0, 1, 0)
        sections.append(ELF64.section.pack(*section))
        section_of |= dict.fromkeys(stretch, number)
    rows, locals_ = _rows(symbols, section_of, strings)
    content = b""

    def add(name: str, kind: int, data: bytes, link: int = 0, info: int = 0, entry: int = 0) -> None:
        nonlocal content
        at = ELF64.header.size + len(content)
        section = Section(strings.add(name), kind, 0, 0, at, len(data), link, info, 8, entry)
        sections.append(ELF64.section.pack(*section))
        content += data + bytes(-len(data) % 8)

    if table.build_id:
        add(".note.gnu.build-id", elf.SHT_NOTE, buildid.make_note(table.build_id))
    strings_number = len(sections) + 1
    add(".symtab", elf.SHT_SYMTAB, rows, strings_number, locals_, ELF64.symbol.size)
    strings.add(".strtab")
    add(".strtab", elf.SHT_STRTAB, bytes(strings.data))
    header = Header(
        ELF64.ident, elf.ET_EXEC, elf.EM_X86_64, 1, entry=0, phoff=0, shoff=ELF64.header.size + len(content), flags=0,
        ehsize=ELF64.header.size, phentsize=0, phnum=0, shentsize=ELF64.section.size, shnum=len(sections),
        shstrndx=strings_number,
    )  # fmt: skip
    return ELF64.header.pack(*header) + content + b"".join(sections)


class _Strings:
    """A string table; a name that is there is not added again."""

    def __init__(self) -> None:
        self._at = {"": 0}
        self.data = bytearray(1)

    def add(self, name: str) -> int:
        at = self._at.setdefault(name, len(self.data))
        if at == len(self.data):
            self.data += name.encode("latin-1", "replace") + b"\0"
        return at


def _rows(symbols: Sequence[Symbol], section_of: dict[Symbol, int], strings: _Strings) -> tuple[bytes, int]:
    """(the symbol table, how many of its rows are local): local ones behind the FILE that they are of."""
    rows = [bytes(ELF64.symbol.size)]
    for file, members in groupby(sorted(filter(_is_local, symbols), key=_file), _file):
        if file:
            rows.append(ELF64.symbol.pack(strings.add(file), elf.STB_LOCAL << 4 | elf.STT_FILE, 0, elf.SHN_ABS, 0, 0))
        rows += [_row(symbol, elf.STB_LOCAL, section_of[symbol], strings) for symbol in members]
    count = len(rows)
    for symbol in symbols:
        if not _is_local(symbol):
            binding = elf.STB_WEAK if symbol.kind in "WV" else elf.STB_GLOBAL
            rows.append(_row(symbol, binding, section_of[symbol], strings))
    return b"".join(rows), count


def _row(symbol: Symbol, binding: int, section: int, strings: _Strings) -> bytes:
    kind = elf.STT_FUNC if _is_text(symbol) else elf.STT_OBJECT
    return ELF64.symbol.pack(strings.add(symbol.name), binding << 4 | kind, 0, section, symbol.address, 0)


def _is_text(symbol: Symbol) -> bool:
    return symbol.kind in TEXT


def _is_local(symbol: Symbol) -> bool:
    return symbol.local


def _file(symbol: Symbol) -> str:
    return symbol.file or ""
