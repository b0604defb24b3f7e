"""A Linux image, unpacked: what a loader makes of it must be what it was."""

from __future__ import annotations

import gzip
import lzma
import struct
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xencrash.lab.errors import LabError
from xencrash.lab.vmlinux import movable, unpacked

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _PT_NOTE = 1, 4
_ALIGN = 0x1000


class Segment(NamedTuple):
    kind: int
    address: int
    data: bytes
    memory: int


def elf_of(segments: list[Segment]) -> bytes:
    body, headers = bytearray(), b""
    first = _EHDR.size + _PHDR.size * len(segments)
    for kind, address, data, memory in segments:
        body += bytes(-(first + len(body) - address) % _ALIGN)
        headers += _PHDR.pack(kind, 5, first + len(body), address, address, len(data), memory, _ALIGN)
        body += data
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    sections = b"sections"
    head = _EHDR.pack(ident, 2, 62, 1, 0x1000, _EHDR.size, first + len(body), 0, 64, 56, len(segments), 64, 1, 0)
    return head + headers + bytes(body) + sections


def bzimage(payload: bytes, sectors: int = 3) -> bytes:
    image = bytearray(512 * (sectors + 1))
    image[0x1F1], image[0x202:0x206] = sectors, b"HdrS"
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + b"\xcc" * 16 + payload + b"\xcc" * 16


def xz(elf: bytes) -> bytes:
    return lzma.compress(elf) + struct.pack("<I", len(elf))


def segments_of(elf: bytes) -> list[Segment]:
    """As whoever loads the file sees them, and as ELF demands that they lie: congruent to their addresses."""
    fields = _EHDR.unpack_from(elf)
    found = []
    for number in range(fields[10]):
        kind, _, offset, address, _, size, memory, align = _PHDR.unpack_from(elf, fields[5] + number * fields[9])
        assert offset % align == address % align and offset + size <= len(elf)
        found.append(Segment(kind, address, elf[offset : offset + size], memory))
    return found


_SEGMENTS = st.lists(
    st.builds(
        lambda kind, page, data, more: Segment(kind, 0x100000 + 0x800 * page, data, len(data) + more),
        st.sampled_from((_PT_LOAD, _PT_NOTE)), st.integers(0, 64), st.binary(max_size=300), st.integers(0, 50),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


def test_another_compression_is_undone_too() -> None:
    elf = elf_of([Segment(_PT_LOAD, 0x1000, b"code", 4)])
    assert unpacked(bzimage(gzip.compress(elf))) == unpacked(bzimage(xz(elf)))


@given(_SEGMENTS)
def test_memory_comes_out_as_it_was(segments: list[Segment]) -> None:
    made = unpacked(bzimage(xz(elf_of(segments))))
    for before, after in zip(segments, segments_of(made), strict=True):
        assert after._replace(data=b"") == before._replace(data=b"")
        if before.kind == _PT_LOAD:
            assert after.data.ljust(before.memory, b"\0") == before.data.ljust(before.memory, b"\0")
            assert not after.data.endswith(b"\0")
        else:
            assert after.data == before.data
    assert b"sections" not in made
    assert _EHDR.unpack_from(made)[6] == 0 and _EHDR.unpack_from(made)[12:] == (0, 0)


def test_one_that_may_be_moved_differs_in_its_type_only() -> None:
    made = unpacked(bzimage(xz(elf_of([Segment(_PT_LOAD, 0x1000, b"code", 4)]))))
    assert [at for at, (one, other) in enumerate(zip(made, movable(made), strict=True)) if one != other] == [16]
    assert _EHDR.unpack_from(movable(made))[1] == 3  # ET_DYN


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "the setup header of a bzImage: "),
        (b"\x7fELF" + bytes(1000), "not a bzImage"),
        (bzimage(b"\x1f\x8b\x08gzip"), "bad gzip data"),
        (bzimage(xz(b"\x7fELF" + bytes(100)))[:2100], "the payload of a bzImage: "),
        (bzimage(xz(elf_of([Segment(_PT_LOAD, 0x1000, b"code", 4)]))[:-40]), "xz data"),
        (bzimage(xz(b"\x7fELF")), "ELF header: "),
        (bzimage(xz(b"\x7fELF\1\1\1" + bytes(100))), "no 64-bit ELF file inside"),
        (bzimage(xz(elf_of([Segment(_PT_LOAD, 0x1000, b"code", 4)])[:100])), "program headers: "),
    ],
)
def test_another_file_is_said_to_be_one(image: bytes, says: str) -> None:
    with pytest.raises(LabError, match=says):
        unpacked(image)
