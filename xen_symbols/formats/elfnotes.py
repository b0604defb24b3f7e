"""The one walk over ELF notes (gABI, chapter 5), with the 4-byte alignment that Xen, Linux, QEMU and ld use."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache

from xen_symbols.records import NamedTuple
from xen_symbols.text import escaped

_HEADER = struct.Struct("<3I")  # namesz, descsz, type


class Note(NamedTuple):
    """One note. `name` without its NUL."""

    name: str
    type: int
    desc: bytes


class BadNote(Exception):
    """A note that ends beyond the bytes: (position, size of its name, size of its content)."""


def walk(data: bytes) -> Iterator[tuple[int, Note]]:
    """(position, note) of all notes, in order. Zeros after the last (Linux pads to a page) end it. Raises BadNote."""
    position = 0
    while position + _HEADER.size <= len(data):
        name_size, desc_size, kind = _HEADER.unpack_from(data, position)
        if not name_size and not desc_size and not kind:
            return
        name_at = position + _HEADER.size
        desc_at = name_at + (name_size + 3 & ~3)
        if desc_at + desc_size > len(data):
            raise BadNote(position, name_size, desc_size)
        yield position, Note(_name(data[name_at : name_at + name_size]), kind, data[desc_at : desc_at + desc_size])
        position = desc_at + (desc_size + 3 & ~3)


@lru_cache  # thousands of CPUs have notes of the same few names
def _name(raw: bytes) -> str:
    return escaped(raw.split(b"\0", 1)[0].decode("ascii", "backslashreplace"))


def pack_size(name_size: int, desc_size: int) -> int:
    """The bytes of a note with a name and a content of these sizes."""
    return _HEADER.size + (name_size + 3 & ~3) + desc_size


def pack(name: bytes, kind: int, desc: bytes) -> bytes:
    """A note; `name` with its NUL."""
    return _HEADER.pack(len(name), len(desc), kind) + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)
