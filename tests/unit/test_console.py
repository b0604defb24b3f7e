"""The console ring: its indices are free-running, and its text may wrap around the end of the buffer."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from tests.machines.syntheticxen import DIRECTMAP, HEAP, PHYS_START, VIRT_START, SyntheticXen
from xen_symbols import open_dump
from xen_symbols.absence import Unreadable
from xen_symbols.xen.console import read_console
from xencrash.cli import main

SIZE = 64
RING = bytes(range(0x30, 0x30 + SIZE))  # each position has a different character


def made(folder: Path, consumer: int, producer: int, size: int = SIZE) -> SyntheticXen:
    """A Xen whose ring holds RING, as `dump` and `map`."""
    xen = SyntheticXen(1)
    xen.content[xen.symbols["_conring"][0] - VIRT_START + PHYS_START] = RING
    for name, value in (("conringc", consumer), ("conringp", producer), ("conring_size", size)):
        xen.content[xen.symbols[name][0] - VIRT_START + PHYS_START] = struct.pack("<I", value)
    (folder / "map").write_text(xen.map_file())
    with (folder / "dump").open("wb") as file:
        writer.write_elf(file, [(PHYS_START, PHYS_START + (8 << 20))], xen.content, xen.notes())
    return xen


def console(folder: Path, consumer: int, producer: int, size: int = SIZE, last: int | None = None) -> str:
    made(folder, consumer, producer, size)
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
def test_text_starts_at_the_oldest_byte(
    consumer: int, producer: int, last: int | None, expected: bytes, tmp_path: Path
) -> None:
    assert console(tmp_path, consumer, producer, last=last) == expected.decode()


@pytest.mark.parametrize("size", [0, 48, 1 << 31])
def test_an_impossible_ring_size(size: int, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=f"^conring_size is {size}, not a size"):
        console(tmp_path, 0, 5, size=size)


# -- xencrash log -----------------------------------------------------------------------------


def log(folder: Path, *words: str) -> int:
    return main(["log", str(folder / "dump"), "--symbols", str(folder / "map"), *words])


def test_the_log_of_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, 60, 70)
    assert log(tmp_path) == 0
    assert capsys.readouterr() == ((RING[60:] + RING[:6]).decode() + "\n", "")
    assert log(tmp_path, "--output", str(tmp_path / "log")) == 0
    assert (tmp_path / "log").read_text() == (RING[60:] + RING[:6]).decode() + "\n"


def test_the_log_of_a_raw_image_of_a_xen_without_kexec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xen = made(tmp_path, 0, 5)
    kexec = [name for name in xen.symbols if re.search("kexec|crash", name)]
    assert kexec
    for name in kexec:
        del xen.symbols[name]
    (tmp_path / "map").write_text(xen.map_file())
    with (tmp_path / "dump").open("wb") as file:
        for address, data in xen.content.items():
            if PHYS_START <= address < PHYS_START + (8 << 20):
                file.seek(address - PHYS_START)
                file.write(data)
    assert log(tmp_path, "--base", hex(PHYS_START)) == 0
    assert capsys.readouterr().out == RING[:5].decode() + "\n"


def test_no_terminal_obeys_what_a_guest_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xen = SyntheticXen(1)
    ring = xen.symbols["_conring"][0] - VIRT_START + PHYS_START
    text = b"a\x1b[31m\r\n\tb\xff\n"
    xen.content[ring] = text.ljust(SIZE, b"\0")
    for name, value in (("conringc", 0), ("conringp", len(text)), ("conring_size", SIZE)):
        xen.content[xen.symbols[name][0] - VIRT_START + PHYS_START] = struct.pack("<I", value)
    (tmp_path / "map").write_text(xen.map_file())
    with (tmp_path / "dump").open("wb") as file:
        writer.write_elf(file, [(PHYS_START, PHYS_START + (8 << 20))], xen.content, xen.notes())
    assert log(tmp_path) == 0
    assert capsys.readouterr().out == "a\\x1b[31m\n\tb\N{REPLACEMENT CHARACTER}\n"


def test_what_is_held_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ring of three pages, of which the second is not in the dump."""
    xen = SyntheticXen(1)
    ring = HEAP + (1 << 20)
    for name, value in (("conringc", 0), ("conringp", 3 * 4096), ("conring_size", 4 * 4096)):
        xen.content[xen.symbols[name][0] - VIRT_START + PHYS_START] = struct.pack("<I", value)
    xen.content[xen.symbols["conring"][0] - VIRT_START + PHYS_START] = struct.pack("<Q", DIRECTMAP + ring)
    xen.content |= {ring: b"a" * 4096, ring + 2 * 4096: b"c" * 4096}
    held = [(PHYS_START, PHYS_START + (8 << 20)), (ring, ring + 4096), (ring + 2 * 4096, ring + 4 * 4096)]
    (tmp_path / "map").write_text(xen.map_file())
    with (tmp_path / "dump").open("wb") as file:
        writer.write_elf(file, held, xen.content, xen.notes())
    assert log(tmp_path) == 3
    out, err = capsys.readouterr()
    first, why, last = out.splitlines()
    assert (first, last) == ("a" * 4096, "c" * 4096)
    assert why.startswith("[4096 bytes could not be read: ") and f"{ring + 4096:#x}" in why
    assert err == f"xencrash: {tmp_path}/dump: the console ring: {why[1:-1]}\n"


def test_a_log_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, 0, 5, size=48)
    assert log(tmp_path) == 3
    why = "the console ring: conring_size is 48, not a size that Xen gives its ring"
    assert capsys.readouterr() == ("", f"xencrash: {tmp_path}/dump: {why}\n")
