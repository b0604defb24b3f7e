"""Writes the symbol files of a made-up Xen: xen-syms, the stripped image, the embedded table."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

VIRT_START = 0xFFFF82D040000000
START = VIRT_START + 0x200000
BUILD_ID = bytes(range(0x10, 0x24))

LOCAL, GLOBAL, WEAK = 0, 1, 2
NOTYPE, OBJECT, FUNC, SECTION, FILE = 0, 1, 2, 3, 4
PROGBITS, SYMTAB, STRTAB, NOTE, NOBITS = 1, 2, 3, 7, 8
WRITE, ALLOC, EXEC = 1, 2, 4
ABS = 0xFFF1


class Section(NamedTuple):
    name: str
    address: int
    content: bytes = b""
    type: int = PROGBITS
    flags: int = ALLOC
    size: int | None = None  # of a NOBITS section


class Sym(NamedTuple):
    """A row of the symbol table; `section` is a section's name, an index, or None for undefined."""

    name: str
    value: int = 0
    size: int = 0
    binding: int = GLOBAL
    type: int = NOTYPE
    section: str | int | None = ".text"


def file(name: str) -> Sym:
    return Sym(name, binding=LOCAL, type=FILE, section=ABS)


def function(name: str, value: int, size: int = 0, binding: int = GLOBAL) -> Sym:
    return Sym(name, value, size, binding, FUNC, ".text")


def variable(name: str, value: int, size: int = 8, binding: int = GLOBAL, section: str = ".data") -> Sym:
    return Sym(name, value, size, binding, OBJECT, section)


def build_id_note(build_id: bytes = BUILD_ID) -> bytes:
    return struct.pack("<III4s", 4, len(build_id), 3, b"GNU\0") + build_id + bytes(-len(build_id) % 4)


def sections(text: bytes = bytes(0x1000), rodata: bytes = b"", note: bytes | None = None) -> list[Section]:
    """.text, .rodata, the build-id note, .data and .bss, each on a separate page from START on."""
    note = build_id_note() if note is None else note
    rodata = rodata or bytes(64)
    at_rodata = START + len(text) + -len(text) % 0x1000
    at_note = at_rodata + len(rodata) + -len(rodata) % 4
    at_data = at_note + len(note) + -(at_note + len(note)) % 0x1000
    return [
        Section(".text", START, text, flags=ALLOC | EXEC),
        Section(".rodata", at_rodata, rodata),
        Section(".note.gnu.build-id", at_note, note, NOTE),
        Section(".data", at_data, bytes(0x1000), flags=ALLOC | WRITE),
        Section(".bss", at_data + 0x1000, type=NOBITS, flags=ALLOC | WRITE, size=0x1000),
    ]


def image(parts: Sequence[Section]) -> bytes:
    """The memory content of the sections from START on."""
    content = b""
    for part in parts:
        if part.type != NOBITS:
            content += bytes(part.address - START - len(content)) + part.content
    return content


def string_table(names: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """(table, offset of each name); a name that is the tail of another lies inside it, as ld does."""
    table, offsets = b"\0", {"": 0}
    for name in sorted(set(names), key=len, reverse=True):
        found = table.find(name.encode() + b"\0") if name else 0
        if found < 0:
            found = len(table)
            table += name.encode() + b"\0"
        offsets[name] = found
    return table, offsets


def xen_syms(
    symbols: Sequence[Sym], parts: Sequence[Section] | None = None, *, machine: int = 62, kind: int = 2
) -> bytes:
    """An ELF64 file: one PT_LOAD of all parts, a PT_NOTE, and a symbol table if there are symbols."""
    parts = sections() if parts is None else parts
    content = image(parts)
    offset = 0x1000
    where = {part.name: (number, offset + part.address - START) for number, part in enumerate(parts, 1)}
    strings, at = string_table(symbol.name for symbol in symbols)
    table = bytes(24) if symbols else b""
    for s in symbols:
        number = 0 if s.section is None else s.section if isinstance(s.section, int) else where[s.section][0]
        table += struct.pack("<IBBHQQ", at[s.name], s.binding << 4 | s.type, 0, number, s.value, s.size)

    headers = [bytes(64)]
    for part in parts:
        size = len(part.content) if part.size is None else part.size
        place = where[part.name][1]
        headers.append(struct.pack("<IIQQQQIIQQ", 0, part.type, part.flags, part.address, place, size, 0, 0, 4, 0))
    at_table = offset + len(content) + -len(content) % 8
    if symbols:
        link = len(parts) + 2
        headers.append(struct.pack("<IIQQQQIIQQ", 0, SYMTAB, 0, 0, at_table, len(table), link, 0, 8, 24))
        headers.append(struct.pack("<IIQQQQIIQQ", 0, STRTAB, 0, 0, at_table + len(table), len(strings), 0, 0, 1, 0))
    tail = table + (strings if symbols else b"")
    at_headers = at_table + len(tail) + -len(tail) % 8

    memory = parts[-1].address + (parts[-1].size or len(parts[-1].content)) - START
    loads = struct.pack("<IIQQQQQQ", 1, 7, offset, START, START & 0x3FFFFFFF, len(content), memory, 0x1000)
    for part in parts:
        if part.type == NOTE:
            size = len(part.content)
            loads += struct.pack("<IIQQQQQQ", 4, 4, where[part.name][1], part.address, 0, size, size, 4)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, START, 64, at_headers, 0, 64, 56, len(loads) // 56, 64, len(headers), 0
    )
    body = (header + loads).ljust(offset, b"\0") + content
    return body.ljust(at_table, b"\0") + tail.ljust(at_headers - at_table, b"\0") + b"".join(headers)


def stripped_xen(content: bytes, note_at: int | None = None, machine: int = 3) -> bytes:
    """The ELF32 multiboot image that Xen's mkelf32 makes: one PT_LOAD at its physical address, and a PT_NOTE."""
    offset, physical, count = 0x80, START & 0x3FFFFFFF, 1 if note_at is None else 2
    loads = struct.pack("<8I", 1, offset, physical, physical, len(content), len(content) + 0x2000, 7, 0x40)
    if note_at is not None:  # its addresses lack the load address, as in releases up to 4.17
        size = 16 + len(BUILD_ID)
        loads += struct.pack("<8I", 4, offset + note_at, note_at, note_at, size, size, 4, 4)
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, physical, 52, 0, 0, 52, 32, count, 40, 0, 0)
    return (header + loads).ljust(offset, b"\0") + content


def embedded_table(entries: Sequence[tuple[int, str]], *, tokens: Sequence[str] = (), natural: bool = False) -> bytes:
    """Xen's table of (offset from XEN_VIRT_START, nm letter and name; "" for an end entry), offsets ascending.

    `tokens` are the longer strings that get a number; each character that occurs stands for itself, as do all
    digits. `natural` aligns each part to its type (4.22) instead of to 4 bytes. Belongs at a 4-aligned address.
    """
    used = {character for _, text in entries for character in text} | set("0123456789")
    free = iter([token for token in dict.fromkeys(tokens) if len(token) > 1])
    table = [chr(code) if chr(code) in used else next(free, "") for code in range(256)]
    numbers = {token: code for code, token in enumerate(table) if token}
    longest = max(map(len, numbers))

    names, markers = b"", []
    for number, (_, text) in enumerate(entries):
        if number % 256 == 0:
            markers.append(len(names))
        codes, position = [], 0
        while position < len(text):
            step = next(n for n in range(longest, 0, -1) if text[position : position + n] in numbers)
            codes.append(numbers[text[position : position + step]])
            position += step
        names += bytes([len(codes), *codes])

    def aligned(data: bytes, to: int) -> bytes:
        return data + bytes(-len(data) % (to if natural else 4))

    strings = b"".join(token.encode() + b"\0" for token in table)
    index = [0]
    for token in table[:-1]:
        index.append(index[-1] + len(token) + 1)
    whole = struct.pack(f"<{len(entries) + 1}I", *(offset for offset, _ in entries), len(entries)) + names
    whole = aligned(whole, 4) + struct.pack(f"<{len(markers)}I", *markers)
    whole = aligned(aligned(whole, 1) + strings, 2) + struct.pack("<256H", *index)
    return aligned(whole, 4) + struct.pack("<I", sum(bool(text) for _, text in entries))
