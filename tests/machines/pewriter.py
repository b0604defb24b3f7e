"""Writes xen.efi as GNU ld does: a PE image with its COFF symbol table, from what elfwriter takes for xen-syms."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.machines.elfwriter import ALLOC, EXEC, FILE, LOCAL, NOBITS, START, VIRT_START, WRITE, Section, Sym

GUID = bytes(range(0x40, 0x50))


def build_id_record(guid: bytes = GUID, rva: int = 0) -> bytes:
    """A debug directory with one entry, CodeView, and its record."""
    return struct.pack("<IIHHIIII", 0, 0, 0, 0, 2, 25, rva + 28, 0) + b"RSDS" + guid + struct.pack("<I", 1) + b"\0"


def sections(rodata: bytes = b"", guid: bytes | None = GUID) -> list[Section]:
    """Each 2 MiB from the one before, as in this link."""
    record = build_id_record(guid, 0x400000) if guid is not None else b""
    return [
        Section(".text", START, bytes(0x1000), flags=ALLOC | EXEC),
        Section(".buildid", START + 0x200000, record or bytes(64)),
        Section(".rodata", START + 0x200040, rodata or bytes(64)),
        Section(".data", START + 0x600000, bytes(0x1000), flags=ALLOC | WRITE),
        Section(".bss", START + 0x601000, type=NOBITS, flags=ALLOC | WRITE, size=0x1000),
    ]


def recorded_file(name: str) -> str:
    """ld cuts a path of 15 to 18 characters."""
    return name[:14] if len(name) <= 18 else name


def xen_efi(
    symbols: Sequence[Sym], parts: Sequence[Section] | None = None, *, machine: int = 0x8664, magic: int = 0x20B
) -> bytes:
    """Without a symbol table if there are no symbols."""
    parts = sections() if parts is None else parts
    strings, records, count = b"", b"", 0

    def named(text: str) -> bytes:
        nonlocal strings
        if len(text) <= 8:
            return text.encode().ljust(8, b"\0")
        strings += text.encode() + b"\0"
        return struct.pack("<II", 0, 4 + len(strings) - len(text) - 1)

    numbers = {part.name: number for number, part in enumerate(parts, 1)}
    for symbol in symbols:
        if symbol.type == FILE:
            path = recorded_file(symbol.name)
            text = path.encode() if len(path) <= 18 else named(path)
            records += struct.pack("<8sIhHBB", b".file", 0, -2, 0, 103, 1) + text.ljust(18, b"\0")
            count += 2
            continue
        number = numbers[symbol.section] if isinstance(symbol.section, str) else 0 if symbol.section is None else -1
        value = symbol.value - parts[number - 1].address if number > 0 else symbol.value & 0xFFFFFFFF
        kind = 3 if symbol.binding == LOCAL else 2
        records += struct.pack("<8sIhHBB", named(symbol.name), value, number, 0, kind, 0)
        count += 1
    for part in parts:  # ld's own, whose auxiliary record is the section's size
        records += struct.pack("<8sIhHBB", part.name.encode()[:8], 0, numbers[part.name], 0, 3, 1) + bytes(18)
        count += 2

    headers, content, offset = b"", b"", 0x400
    for part in parts:
        size = len(part.content) if part.size is None else part.size
        flags = 0x20 if part.flags & EXEC else 0x80 if part.type == NOBITS else 0x40
        flags |= 0x20000000 * bool(part.flags & EXEC) | 0x80000000 * bool(part.flags & WRITE)
        raw = bytes(part.content) + bytes(-len(part.content) % 16)
        place = offset + len(content) if raw else 0
        rva = part.address - VIRT_START
        headers += struct.pack("<8sIIIIIIHHI", part.name.encode(), size, rva, len(raw), place, 0, 0, 0, 0, flags)
        content += raw
    with_id = next((part for part in parts if part.name == ".buildid" and b"RSDS" in part.content), None)
    directories = [(0, 0)] * 6 + [(with_id.address - VIRT_START, 28) if with_id else (0, 0)] + [(0, 0)] * 9
    optional = struct.pack("<H", magic).ljust(24, b"\0") + struct.pack("<Q", VIRT_START)
    optional = (
        optional.ljust(108, b"\0") + struct.pack("<I", 16) + b"".join(struct.pack("<II", *d) for d in directories)
    )
    at_table = offset + len(content) if symbols else 0
    start = struct.pack(
        "<4sHHIIIHH", b"PE\0\0", machine, len(parts), 0, at_table, count if symbols else 0, len(optional), 0x226
    )
    stub = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    body = (stub.ljust(0x80, b"\0") + start + optional + headers).ljust(offset, b"\0") + content
    return body + records + struct.pack("<I", 4 + len(strings)) + strings if symbols else body
