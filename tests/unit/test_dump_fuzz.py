"""Damaged at random, a dump ends in a value, an absence or a refusal: never in a traceback, a hang, or much memory.

Each case takes a realistic dump, changes its header, tables or notes, and then does what a check
does: open it, list CPUs, notes and memory, read some. A case depends on its number alone, so a failure
names the one to look at: `damaged(SHAPE, NUMBER)`.
"""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from tests.machines.damage import EDGES, bounded_memory
from xen_symbols.absence import Absent, Undecidable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.targets.dump import open_dump
from xen_symbols.targets.notes import XEN_CRASH_INFO, parse_crash_info, parse_vmcoreinfo

CASES = 3000  # per shape
RANGES = [(0x0, 0x3000), (0x10000, 0x14000)]
CONTENT = {0x100: bytes(range(256)), 0x12000: random.Random(0).randbytes(4096)}
REGISTERS = [{"rip": 0xFFFF82D040200000 + cpu, "rsp": 8 * cpu + 8, "cr3": 0x1000} for cpu in range(4)]
XEN = writer.xen_notes(REGISTERS, writer.crash_info(), "PAGESIZE=4096\nSYMBOL(pgd_l4)=ffff82d040400000\n")
QEMU = writer.qemu_notes([writer.qemu_cpu(each) for each in REGISTERS], REGISTERS)

SHAPES = {
    "vmcore": writer.made(writer.write_elf, RANGES, CONTENT, XEN),
    "qemu": writer.made(writer.write_elf, RANGES, CONTENT, QEMU, ehsize=8, left_out=[(0xFEE00000, 0xFEE01000)]),
    "many headers": writer.made(writer.write_elf, RANGES, CONTENT, XEN, extended_count=True),
    "kdump": writer.made(writer.write_kdump, RANGES, CONTENT, XEN, excluded=[1]),
    "kdump of qemu": writer.made(writer.write_kdump, RANGES, CONTENT, QEMU, compression=0),
    "flattened": writer.flattened(writer.made(writer.write_kdump, RANGES, CONTENT, XEN), piece=3000),
    "flattened elf": writer.flattened(writer.made(writer.write_elf, RANGES, CONTENT, XEN), piece=700),
}


def structure(data: bytes) -> list[int]:
    """Offsets, in steps of 4, of this shape's headers and tables; the rest is memory."""
    if data.startswith(b"makedumpfile"):
        headers, at = list(range(0, 32, 4)), 4096
        while True:
            offset, size = struct.unpack_from(">qq", data, at)
            headers += range(at, at + 16, 4)
            if offset < 0:
                return headers + list(range(4096, 8192, 4))
            at += 16 + size
    if data.startswith(b"KDUMP"):
        table = (1 + sum(struct.unpack_from("<II", data, 0x1B0))) * 4096
        return [
            *range(0, 0x1D0, 4),
            *range(4096, 4200, 4),
            *range(8192, 8192 + len(XEN), 4),
            *range(table, table + 200, 4),
        ]
    return list(range(0, len(data) - sum(end - start for start, end in RANGES), 4))


POINTS = {shape: structure(data) for shape, data in SHAPES.items()}


def damaged(shape: str, number: int) -> bytes:
    """Case `number` of a shape: some fields set to edge values, some bits flipped, or the end cut off."""
    chance = random.Random(f"{shape} {number}")
    data = bytearray(SHAPES[shape])
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.choice(POINTS[shape])
        kind = chance.randrange(8)
        if kind < 4:
            size = 8 if kind < 2 else 4
            value = chance.choice([*EDGES, len(data), len(data) - 1, chance.getrandbits(64)]) & (1 << 8 * size) - 1
            part = value.to_bytes(size, "big" if data.startswith(b"makedumpfile") else "little")
        elif kind < 6:
            part = bytes([data[at] ^ 1 << chance.randrange(8)])
        elif kind == 6:
            part = chance.randbytes(chance.randrange(1, 64))
        else:
            other = chance.choice(POINTS[shape])
            part = bytes(data[other : other + chance.choice((8, 24, 56))])
        data[at : at + len(part)] = part
    if not chance.randrange(10):
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def use(path: str) -> None:
    """Everything that a check reads of a dump."""
    dump = open_dump(path)
    ranges = dump.physical_ranges()
    requests = [(0x100, 256), (0x2FF0, 0x20), (0x12345, 5000), (1 << 51, 8), (0x10000, 0x4000)]
    requests += [(start, 16) for start, _ in ranges[:4]] + [(end - 16, 16) for _, end in ranges[-4:]]
    for (_, size), answer in zip(requests, dump.read_physical_many(requests), strict=True):
        assert isinstance(answer, Absent) or len(answer) == size
    for cpu in dump.cpus():
        assert isinstance(cpu, PhysicalCpu)
    for note in dump.notes():
        if note.name == "VMCOREINFO_XEN":
            parse_vmcoreinfo(note.desc)
        if note.type == XEN_CRASH_INFO:
            parse_crash_info(note.desc)


def is_refused(path: Path, shape: str, number: int) -> bool:
    path.write_bytes(damaged(shape, number))
    before = time.thread_time()
    try:
        use(str(path))
        return False
    except Undecidable as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 400
        return True
    except Exception as error:
        raise AssertionError(f"damaged({shape!r}, {number}) ends in {error!r}") from error
    finally:
        assert time.thread_time() - before < 2, f"damaged({shape!r}, {number}) takes too long"


@pytest.mark.parametrize("shape", SHAPES)
def test_damage_never_ends_in_anything_else(tmp_path: Path, shape: str) -> None:
    with bounded_memory():
        refused = sum(is_refused(tmp_path / "dump", shape, number) for number in range(CASES))
    # The damage has an effect, but does not always end at the header.
    assert CASES // 20 < refused < CASES * 19 // 20


def test_enough_cases() -> None:
    assert CASES * len(SHAPES) >= 20_000
