"""What one look at a machine reads: a look that grows fails here, where a clock would not show it.

Counted, not timed: a packet to QEMU's stub costs 0.05 ms, a byte of its answer 0.07 us (tests/benchmarks/live.py). If a
look becomes cheaper, lower the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.machines.recorded import Example, load
from xen_symbols.absence import Absent
from xen_symbols.targets.packets import PACKET, merged, pieces
from xen_symbols.xen.locate import locate, still_there
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import read_state


class Stub:
    """A recorded machine as QEMU's stub would serve it; `packets` are the reads sent to the stub."""

    def __init__(self, example: Example) -> None:
        self._example = example
        self.packets: list[tuple[int, int]] = []
        self.looks_at_cpus = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._example, name)

    def read_physical(self, address: int, size: int) -> bytes:
        self.packets += pieces(address, size)
        return self._example.read_physical(address, size)

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        for start, end, _ in merged(sorted(set(requests))):
            self.packets += pieces(start, end - start)
        return self._example.read_physical_many(requests)

    def cpus(self) -> object:
        self.looks_at_cpus += 1
        return self._example.cpus()


def look(name: str) -> tuple[Stub, XenMemory]:
    """A machine in which Xen has been found, and which has stopped again since."""
    example, symbols = load(name)
    stub = Stub(example)
    memory = locate(stub, symbols)  # type: ignore[arg-type]
    memory.forget()
    stub.packets.clear()
    stub.looks_at_cpus = 0
    return stub, memory


# (packets, bytes) of a look with crash notes, as at a stage, and without, as by xen crash status; 4 CPUs. The
# recordings of 4.17 lack most of the page tables.
LOOKS = {
    "4.14-shootdown": ((37, 7806), (31, 4454)),
    "4.20-shootdown": ((34, 8606), (29, 6526)),
    "4.20-handover": ((34, 8606), (29, 6526)),
}


@pytest.mark.parametrize("name", LOOKS)
def test_one_look(name: str) -> None:
    found = []
    for notes in (True, False):
        stub, memory = look(name)
        read_state(memory, notes=notes)
        found.append((len(stub.packets), sum(size for _, size in stub.packets)))
        assert stub.looks_at_cpus == 1
        assert len(set(stub.packets)) == len(stub.packets)  # nothing is read twice
    assert tuple(found) == LOOKS[name]


@pytest.mark.parametrize("name", LOOKS)
def test_whether_xen_is_still_there(name: str) -> None:
    """One walk of its page tables and its build-id; nothing read for that is read again."""
    stub, memory = look(name)
    assert still_there(memory)
    before = list(stub.packets)
    read_state(memory)
    assert len(before) == 6
    assert len(set(stub.packets)) == len(stub.packets)


def test_neighbours_go_out_together_up_to_a_packet() -> None:
    def of(*requests: tuple[int, int]) -> list[tuple[int, int, int]]:
        return [(start, end, len(members)) for start, end, members in merged(requests)]

    assert of() == []
    assert of((0x1000, 8), (0x1008, 8)) == [(0x1000, 0x1010, 2)]
    assert of((0x1000, 0x100), (0x1010, 8), (0x1200, 8)) == [(0x1000, 0x1208, 3)]
    assert of((0x1000, 8), (0x1408, 8)) == [(0x1000, 0x1410, 2)]
    assert of((0x1000, 8), (0x1409, 8)) == [(0x1000, 0x1008, 1), (0x1409, 0x1411, 1)]
    assert of((0x1000, 8), (0x1400, 0x400)) == [(0x1000, 0x1000 + PACKET, 2)]
    assert of((0x1000, 8), (0x1400, 0x401)) == [(0x1000, 0x1008, 1), (0x1400, 0x1801, 1)]
    assert of((0x1000, 3 * PACKET)) == [(0x1000, 0x1000 + 3 * PACKET, 1)]


def test_a_long_read_is_as_many_packets() -> None:
    assert list(pieces(0x1000, 0)) == []
    assert list(pieces(0x1000, PACKET)) == [(0x1000, PACKET)]
    assert list(pieces(0x1000, 2 * PACKET + 1)) == [(0x1000, PACKET), (0x1800, PACKET), (0x2000, 1)]
