"""Build-ids: parsed from bytes, and found in a stretch of memory.

Xen carries one since 4.7, at SYMBOL, and each of its two links has a form of its own. That of `xen.gz` has an ELF note
(gABI, chapter 5): namesz, descsz, type, the name "GNU", then the id. That of `xen.efi` has a PE debug directory (PE
format, 6.1.1), whose first entry is followed by a CodeView record: "RSDS", the id's first 16 bytes, an age, and a file
name, which is empty (xen/common/version.c, xen_build_init).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice

from xen_symbols.formats import elfnotes

SYMBOL = "__note_gnu_build_id_start"
_NAME = b"GNU\0"
NT_GNU_BUILD_ID = 3
_HEADER = struct.Struct("<III")
_TYPE_AND_NAME = struct.pack("<I4s", NT_GNU_BUILD_ID, _NAME)
_NAME_END = _HEADER.size + 4
_LONGEST = 64  # ids are 8 to 20 bytes (ld --build-id); anything much longer is not one

_DIRECTORY = struct.Struct("<IIHHIIII")  # characteristics, time, version (2), type, size, RVA, file offset
_CODEVIEW_TYPE, _RSDS, _GUID = 2, b"RSDS", 16

CODEVIEW_SIZE = _DIRECTORY.size + len(_RSDS) + _GUID
NOTE_SIZE = _NAME_END + _LONGEST  # reading this much at the note's address always holds either form


def is_of_efi(note: bytes) -> bool:
    """Whether it begins with the form that xen.efi has."""
    if len(note) < CODEVIEW_SIZE or note[_DIRECTORY.size : CODEVIEW_SIZE - _GUID] != _RSDS:
        return False
    kind, size = _DIRECTORY.unpack_from(note)[4:6]
    return bool(kind == _CODEVIEW_TYPE and size >= CODEVIEW_SIZE - _DIRECTORY.size)


def parse_note(note: bytes) -> bytes | None:
    """The build-id of either form that starts at the first byte; None if there is none."""
    if is_of_efi(note):
        return note[CODEVIEW_SIZE - _GUID : CODEVIEW_SIZE]
    if len(note) < _NAME_END:
        return None
    name_size, size, _ = _HEADER.unpack_from(note)
    if name_size != 4 or note[8:_NAME_END] != _TYPE_AND_NAME or not 0 < size <= _LONGEST:
        return None
    build_id = note[_NAME_END : _NAME_END + size]
    return build_id if len(build_id) == size else None


def find_in_notes(notes: bytes) -> tuple[int, bytes] | None:
    """(position, id) of the build-id note among the ELF notes of a section or segment."""
    try:
        for position, _ in elfnotes.walk(notes):
            build_id = parse_note(notes[position : position + NOTE_SIZE])
            if build_id is not None:
                return position, build_id
    except elfnotes.BadNote:
        pass
    return None


def make_note(build_id: bytes) -> bytes:
    """The note of an id."""
    return elfnotes.pack(_NAME, NT_GNU_BUILD_ID, build_id)


def scan(memory: bytes) -> tuple[int, bytes] | None:
    """(position, id) of the first build-id of either form in `memory`; it is 4-aligned there."""
    found = [
        (position, build_id)
        for mark, offset in ((_TYPE_AND_NAME, 8), (_RSDS, _DIRECTORY.size))
        for position, build_id in islice(_marked(memory, mark, offset), 1)
    ]
    return min(found, default=None)


def _marked(memory: bytes, mark: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """(position, id) of each note that has `mark` at `offset`."""
    at = memory.find(mark)
    while at >= 0:
        start = at - offset
        if start >= 0 and start % 4 == 0:
            build_id = parse_note(memory[start : start + NOTE_SIZE])
            if build_id is not None:
                yield start, build_id
        at = memory.find(mark, at + 1)
