"""The console ring: its indices run free, and its text may begin at the end of the buffer and go on at the start."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from tests.machines.syntheticxen import PHYS_START, VIRT_START, SyntheticXen
from xen_symbols import open_dump
from xen_symbols.absence import Unreadable
from xen_symbols.xen.console import read_console

SIZE = 64
RING = bytes(range(0x30, 0x30 + SIZE))  # each place has its own character


def console(folder: Path, consumer: int, producer: int, size: int = SIZE, last: int | None = None) -> str:
    xen = SyntheticXen(1)
    xen.content[xen.symbols["_conring"][0] - VIRT_START + PHYS_START] = RING
    for name, value in (("conringc", consumer), ("conringp", producer), ("conring_size", size)):
        xen.content[xen.symbols[name][0] - VIRT_START + PHYS_START] = struct.pack("<I", value)
    (folder / "map").write_text(xen.map_file())
    with (folder / "dump").open("wb") as file:
        writer.write_elf(file, [(PHYS_START, PHYS_START + (8 << 20))], xen.content, xen.notes())
    return read_console(open_dump(folder / "dump", folder / "map"), last)


@pytest.mark.parametrize(
    "consumer, producer, last, expected",
    [
        (0, 5, None, RING[:5]),
        (60, 70, None, RING[60:] + RING[:6]),  # across the end
        (64, 64, None, b""),
        (0, 64, None, RING),  # full
        (0, 100, None, RING[36:] + RING[:36]),  # the oldest were overwritten
        (2**32 - 4, 3, None, RING[60:] + RING[:3]),  # the indices wrapped
        (70, 70, 10, RING[60:] + RING[:6]),  # what was read since is still there
        (0, 5, 10, RING[:5]),
        (0, 1000, 8, RING[32:40]),
        (0, 1000, 1 << 20, RING[40:] + RING[:40]),
    ],
)
def test_text_from_the_oldest_byte(
    consumer: int, producer: int, last: int | None, expected: bytes, tmp_path: Path
) -> None:
    assert console(tmp_path, consumer, producer, last=last) == expected.decode()


@pytest.mark.parametrize("size", [0, 48, 1 << 31])
def test_a_size_that_no_ring_has(size: int, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=f"^conring_size is {size}, not a size"):
        console(tmp_path, 0, 5, size=size)
