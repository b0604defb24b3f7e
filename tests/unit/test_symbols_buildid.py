"""GNU build-id notes from bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines.elfwriter import build_id_note
from xen_symbols.symbols import buildid

# As `readelf -x .note.gnu.build-id` shows it for Debian's xen-syms 4.17.
NOTE = bytes.fromhex("04000000 14000000 03000000 474e5500 151b373fd64b321593bf987fd923cd10dabadac4")
ID = bytes.fromhex("151b373fd64b321593bf987fd923cd10dabadac4")
OTHER = bytes.fromhex("04000000 06000000 01000000 58656e00 010203040506 0000")  # "Xen", 6 bytes of desc, padded


def test_a_note_is_parsed() -> None:
    assert buildid.parse_note(NOTE) == ID
    assert buildid.parse_note(NOTE + b"rest") == ID
    assert len(NOTE) <= buildid.NOTE_SIZE


@pytest.mark.parametrize("cut", range(len(NOTE)))
def test_a_truncated_note_is_none(cut: int) -> None:
    assert buildid.parse_note(NOTE[:cut]) is None
    assert buildid.find_in_notes(NOTE[:cut]) is None
    assert buildid.scan(NOTE[:cut]) is None


@pytest.mark.parametrize("position, value", [(0, 3), (4, 0), (4, 65), (7, 0xFF), (8, 1), (12, ord("X")), (15, 1)])
def test_what_is_not_a_build_id_note(position: int, value: int) -> None:
    note = bytearray(NOTE)
    note[position] = value
    assert buildid.parse_note(bytes(note) + bytes(80)) is None


def test_the_note_among_others() -> None:
    assert buildid.find_in_notes(OTHER + OTHER + NOTE) == (48, ID)
    assert buildid.find_in_notes(OTHER) is None
    assert buildid.find_in_notes(b"\xff" * 64) is None
    assert buildid.find_in_notes(bytes(4096)) is None


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=64), st.integers(0, 40), st.binary(max_size=40))
def test_a_note_anywhere_in_memory(build_id: bytes, words: int, after: bytes) -> None:
    memory = bytes(4 * words) + build_id_note(build_id)
    assert buildid.scan(memory + after) == (4 * words, build_id)


def test_a_scan_passes_over_what_only_looks_like_a_note() -> None:
    assert buildid.scan(b"\0" + NOTE) is None  # not 4-aligned
    assert buildid.scan(NOTE[8:16] + bytes(4) + NOTE[4:16] + NOTE) == (24, ID)
