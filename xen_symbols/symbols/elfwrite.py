"""A symbol table as an ELF file: what a debugger needs to name what Xen carries in its own image, or a `.map` lists."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain, groupby

from xen_symbols.symbols.elf import (
    EM_X86_64,
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_WRITE,
    SHN_ABS,
    SHT_NOBITS,
    SHT_NOTE,
    SHT_SYMTAB,
    STB_LOCAL,
    STT_FILE,
    STT_OBJECT,
)
from xen_symbols.symbols.table import TEXT, Symbol, SymbolTable

_ET_EXEC, _SHT_STRTAB, _STB_GLOBAL, _STB_WEAK, _STT_FUNC, _NT_GNU_BUILD_ID = 2, 3, 1, 2, 2, 3
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
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
    sections = [bytes(_SECTION.size)]
    section_of: dict[Symbol, int] = {}
    for number, stretch in enumerate(stretches, 1):
        following = stretches[number][0].address if number < len(stretches) else max(end, stretch[-1].address + 1)
        text = _is_text(stretch[0])
        flags = SHF_ALLOC | (SHF_EXECINSTR if text else SHF_WRITE)
        start = stretch[0].address
        name = strings.add(".text" if text else ".data")
        sections.append(_SECTION.pack(name, SHT_NOBITS, flags, start, 0, following - start, 0, 0, 1, 0))
        section_of |= dict.fromkeys(stretch, number)
    rows, locals_ = _rows(symbols, section_of, strings)
    content = b""

    def add(name: str, kind: int, data: bytes, link: int = 0, info: int = 0, entry: int = 0) -> None:
        nonlocal content
        at = _HEADER.size + len(content)
        sections.append(_SECTION.pack(strings.add(name), kind, 0, 0, at, len(data), link, info, 8, entry))
        content += data + bytes(-len(data) % 8)

    if table.build_id:
        note = struct.pack("<III4s", 4, len(table.build_id), _NT_GNU_BUILD_ID, b"GNU") + table.build_id
        add(".note.gnu.build-id", SHT_NOTE, note + bytes(-len(note) % 4))
    strings_number = len(sections) + 1
    add(".symtab", SHT_SYMTAB, rows, strings_number, locals_, _SYMBOL.size)
    strings.add(".strtab")
    add(".strtab", _SHT_STRTAB, bytes(strings.data))
    header = _HEADER.pack(b"\x7fELF\x02\x01\x01", _ET_EXEC, EM_X86_64, 1, 0, 0, _HEADER.size + len(content), 0,
                          _HEADER.size, 0, 0, _SECTION.size, len(sections), strings_number)  # fmt: skip
    return header + content + b"".join(sections)


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
    rows = [bytes(_SYMBOL.size)]
    for file, members in groupby(sorted(filter(_is_local, symbols), key=_file), _file):
        if file:
            rows.append(_SYMBOL.pack(strings.add(file), STB_LOCAL << 4 | STT_FILE, 0, SHN_ABS, 0, 0))
        rows += [_row(symbol, STB_LOCAL, section_of[symbol], strings) for symbol in members]
    count = len(rows)
    for symbol in symbols:
        if not _is_local(symbol):
            binding = _STB_WEAK if symbol.kind in "WV" else _STB_GLOBAL
            rows.append(_row(symbol, binding, section_of[symbol], strings))
    return b"".join(rows), count


def _row(symbol: Symbol, binding: int, section: int, strings: _Strings) -> bytes:
    kind = _STT_FUNC if _is_text(symbol) else STT_OBJECT
    return _SYMBOL.pack(strings.add(symbol.name), binding << 4 | kind, 0, section, symbol.address, 0)


def _is_text(symbol: Symbol) -> bool:
    return symbol.kind in TEXT


def _is_local(symbol: Symbol) -> bool:
    return symbol.local


def _file(symbol: Symbol) -> str:
    return symbol.file or ""
