"""One read asks for at most 64 MB, whatever the length: of each format, by Xen's page tables, and for gdb."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from tests.machines.syntheticxen import DIRECTMAP, HEAP, PHYS_START, SyntheticXen
from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.load import load_symbols
from xen_symbols.targets import READ_MAX
from xen_symbols.targets.dump import Dump, open_dump
from xen_symbols.xen.memory import XenMemory
from xencrash.serve import Conversation, served

GB = 1 << 30
HUGE = (READ_MAX + 1, GB, 64 * GB, 1 << 64)


def xen_in(folder: Path, name: str) -> tuple[Dump, XenMemory]:
    """A Xen in 4 GB of sparse memory; a kdump of it has only what is used."""
    xen = SyntheticXen(2)
    path = folder / name
    with path.open("wb") as file:
        if name == "raw":
            os.truncate(file.fileno(), 4 * GB)
            for address, data in xen.content.items():
                file.seek(address)
                file.write(data)
        elif name == "elf":
            writer.write_elf(file, [(0, 4 * GB)], xen.content, xen.notes())
        else:
            ranges = [(PHYS_START, PHYS_START + (8 << 20)), (HEAP, HEAP + (1 << 20))]
            writer.write_kdump(file, ranges, xen.content, xen.notes())
    (folder / "map").write_text(xen.map_file())
    dump = open_dump(str(path), base=0 if name == "raw" else None)
    return dump, XenMemory(dump, load_symbols(str(folder / "map")), xen.root, "the test")


@pytest.fixture
def allocated() -> Iterator[Callable[[], int]]:
    """The most that Python held at once since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["elf", "kdump", "raw"])
def test_a_huge_read_is_refused_in_words(name: str, tmp_path: Path, allocated: Callable[[], int]) -> None:
    dump, memory = xen_in(tmp_path, name)
    before = allocated()
    for size in HUGE:
        for read, address in ((dump.read_physical, 0), (memory.read, DIRECTMAP)):
            with pytest.raises(
                Unreadable,
                match=f"^{size} bytes at {address:#x} are too many for one read, which takes at most 67108864",
            ):
                read(address, size)
    good, bad = dump.read_physical_many([(HEAP, 8), (HEAP, GB)])
    assert (good, type(bad)) == (dump.read_physical(HEAP, 8), Absent)
    good, bad = memory.read_many([(DIRECTMAP + HEAP, 8), (DIRECTMAP, GB)])
    assert (good, type(bad)) == (dump.read_physical(HEAP, 8), Absent)
    assert allocated() - before < 1 << 20


def test_the_largest_read_is_still_answered(tmp_path: Path) -> None:
    dump, memory = xen_in(tmp_path, "elf")
    assert len(dump.read_physical(GB, READ_MAX)) == len(memory.read(DIRECTMAP + GB, READ_MAX)) == READ_MAX


def test_gdb_gets_a_packet_of_what_it_asks_for(tmp_path: Path, allocated: Callable[[], int]) -> None:
    _, memory = xen_in(tmp_path, "elf")
    conversation = Conversation(served(memory))
    before = allocated()
    for length in (b"40000000", b"ffffffffffffffff", b"f" * 200):
        assert conversation.answer(b"m%x,%s" % (DIRECTMAP, length)) == b"00" * 0x2000
    assert conversation.answer(b"Qqemu.PhyMemMode:1") == b"OK"
    assert conversation.answer(b"m0,40000000") == b"00" * 0x2000
    assert allocated() - before < 1 << 20
