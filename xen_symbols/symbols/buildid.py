"""GNU build-id notes (`.note.gnu.build-id`): parsed from bytes, and found in a stretch of memory.

The note is an ELF note (gABI, chapter 5): namesz, descsz, type, the name "GNU", then the id. Xen
carries one since 4.7, at `__note_gnu_build_id_start`.
"""

from __future__ import annotations

import struct

from xen_symbols.formats import elfnotes

_NAME = b"GNU\0"
NT_GNU_BUILD_ID = 3
_HEADER = struct.Struct("<III")
_TYPE_AND_NAME = struct.pack("<I4s", NT_GNU_BUILD_ID, _NAME)
_NAME_END = _HEADER.size + 4
_LONGEST = 64  # ids are 8 to 20 bytes (ld --build-id); anything much longer is not one

NOTE_SIZE = _NAME_END + _LONGEST  # reading this much at the note's address always holds the note


def parse_note(note: bytes) -> bytes | None:
    """The id in a build-id note that starts at the first byte; None if there is none."""
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
    """(position, id) of the first build-id note in `memory`; the note is 4-aligned there."""
    position = memory.find(_TYPE_AND_NAME)
    while position >= 0:
        start = position - 8
        if start >= 0 and start % 4 == 0:
            build_id = parse_note(memory[start : start + NOTE_SIZE])
            if build_id is not None:
                return start, build_id
        position = memory.find(_TYPE_AND_NAME, position + 1)
    return None
