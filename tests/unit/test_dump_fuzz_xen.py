"""A Xen whose memory is damaged at random, in a whole dump: a verdict, or a refusal in one line; never a traceback.

Page tables that loop, tables and notes elsewhere, counts that no Xen has. Cases follow from their number alone.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import dumpwriter as writer
from tests.damage import EDGES, bounded_memory
from tests.syntheticxen import DIRECTMAP, HEAP, PHYS_START, VIRT_START, SyntheticXen
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.model import Verdict
from xen_symbols.symbols.table import SymbolTable, load_symbols
from xen_symbols.target.dump import open_dump
from xen_symbols.xen.locate import locate

CASES = 4000
RANGES = [(PHYS_START, PHYS_START + (8 << 20)), (HEAP, HEAP + (1 << 20))]


class Machine:
    """The dump of a Xen with four CPUs on disk, and where in the file its structures are."""

    def __init__(self, folder: Path) -> None:
        xen = SyntheticXen(4)
        (folder / "map").write_text(xen.map_file())
        self.symbols = load_symbols(str(folder / "map"))
        self.file = folder / "dump"
        with self.file.open("wb") as file:
            writer.write_elf(file, RANGES, xen.content, xen.notes())
        self.original = self.file.read_bytes()
        loads = [struct.unpack_from("<QQQQ", self.original, 64 + 56 * index + 8) for index in (1, 2)]
        offsets = {address: offset for offset, _, address, _ in loads}
        self.places = [
            (offsets[start] + address - start, len(data))
            for address, data in xen.content.items()
            for start, end in RANGES
            if start <= address < end
        ]
        tables = [xen.root + 4096 * table | flags for table in range(4) for flags in (0, 1, 0x81, 0x67)]
        starts = [base + 8 * step for base in (VIRT_START, DIRECTMAP, HEAP, PHYS_START) for step in (0, 1, 1 << 18)]
        self.values = [*EDGES, *tables, *starts, DIRECTMAP + HEAP, 0xFFFF800000000000, 0x7FFFFFFFFFFF]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("xen"))


def damage(machine: Machine, number: int) -> Iterator[tuple[int, bytes]]:
    """(file offset, bytes) of case `number`."""
    chance = random.Random(number)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if chance.randrange(8):
            offset, size = chance.choice(machine.places)
            at = offset + chance.randrange(max(size, 8)) // 4 * 4
        else:
            at = chance.randrange(64, 64 + 3 * 56 + 2000) // 4 * 4  # program headers and notes
        value = chance.choice(machine.values) if chance.randrange(4) else chance.getrandbits(64)
        yield at, value.to_bytes(8, "little")[: chance.choice((1, 4, 8, 8, 8))]


def judged(machine: Machine, number: int) -> str:
    """The verdict of case `number`, or "refused"."""
    patches = list(damage(machine, number))
    with machine.file.open("r+b") as file:
        for at, data in patches:
            file.seek(at)
            file.write(data)
    before = time.thread_time()
    try:
        report = evaluate(locate(open_dump(str(machine.file)), machine.symbols)).to_json()
        assert report["verdict"] in {str(verdict) for verdict in Verdict}
        return str(report["verdict"])
    except (Undecidable, Unreadable) as error:
        assert "\n" not in str(error)
        return "refused"
    except Exception as error:
        raise AssertionError(f"damage(machine, {number}) ends in {error!r}") from error
    finally:
        assert time.thread_time() - before < 5, f"damage(machine, {number}) takes too long"
        with machine.file.open("r+b") as file:
            for at, data in patches:
                file.seek(at)
                file.write(machine.original[at : at + len(data)])


def test_undamaged_it_passes(machine: Machine) -> None:
    symbols: SymbolTable = machine.symbols
    assert str(evaluate(locate(open_dump(str(machine.file)), symbols)).to_json()["verdict"]) == "pass"


def test_damage_never_ends_in_anything_else(machine: Machine) -> None:
    with bounded_memory():
        outcomes = [judged(machine, number) for number in range(CASES)]
    assert {"pass", "fail", "refused"} <= set(outcomes)
