"""Xen's image with code added that turns x2APIC on: another entry point, and one more segment at the end."""

from __future__ import annotations

import struct

import pytest

from tests.machines.elfwriter import stripped_xen
from xencrash.lab.errors import LabError
from xencrash.lab.firmware import with_x2apic_on


def entry(image: bytes) -> int:
    return int(struct.unpack_from("<I", image, 24)[0])


def segments(image: bytes) -> list[tuple[int, ...]]:
    """(type, offset, vaddr, paddr, filesz, memsz, flags, align) of each."""
    at, size, count = *struct.unpack_from("<I", image, 28), *struct.unpack_from("<HH", image, 42)
    return [struct.unpack_from("<8I", image, at + size * number) for number in range(count)]


def test_the_image_is_whole_and_the_code_comes_first() -> None:
    before = stripped_xen(bytes(range(256)) * 32)
    after = with_x2apic_on(before)
    assert after[52 : len(before)] == before[52:]
    assert segments(after)[:-1] == segments(before)
    kind, offset, vaddr, paddr, size, memory, flags, _ = segments(after)[-1]
    assert (kind, flags, vaddr, memory) == (1, 7, paddr, size)
    assert entry(after) == paddr and paddr % 4096 == 0
    assert all(paddr >= at + length for what, _, _, at, _, length, _, _ in segments(before) if what == 1)
    code = after[offset : offset + size]
    assert code[:-5].hex() == "89c6" "b91b000000" "0f32" "0d000c0000" "0f30" "89f0"
    assert code[-5] == 0xE9  # jmp: relative to what follows
    assert paddr + size + int.from_bytes(code[-4:], "little", signed=True) == entry(before)


@pytest.mark.parametrize("image", [b"", b"MZ" + bytes(64), b"\x7fELF\x02\x01" + bytes(64)])
def test_what_is_not_such_an_image_is_refused(image: bytes) -> None:
    with pytest.raises(LabError, match="not a 32-bit ELF file"):
        with_x2apic_on(image)
