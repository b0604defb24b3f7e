"""ELF cores as Linux, makedumpfile and QEMU write them, and what is refused."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.targets.dump import Dump, open_dump
from xencrash.gdbprogram import find_gdb

RANGES = [(0x0, 0xA000), (0x100000, 0x104000)]
CONTENT = {0x1234: b"hello", 0x102FF0: bytes(range(32))}
REGISTERS = [{"rip": 0xFFFF82D040200000 + cpu, "rsp": 0x1000 * cpu + 8, "cr3": 0x1000, "cs": 0xE008} for cpu in (0, 1)]
NOTES = writer.xen_notes(REGISTERS)


def opened(path: Path, data: bytes, **options: int) -> Dump:
    file = path / "dump"
    file.write_bytes(data)
    return open_dump(str(file), **options)


def refusal(path: Path, data: bytes, **options: int) -> str:
    with pytest.raises(Undecidable) as caught:
        opened(path, data, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}/dump: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}/dump: ")


def core(**options: object) -> bytes:
    return writer.made(writer.write_elf, RANGES, CONTENT, NOTES, **options)


def test_memory_is_read_where_the_headers_put_it(tmp_path: Path) -> None:
    dump = opened(tmp_path, core())
    assert (dump.kind, dump.format, dump.location) == ("dump", "ELF core", f"{tmp_path}/dump")
    assert list(dump.physical_ranges()) == RANGES
    assert dump.read_physical(0x1234, 5) == b"hello"
    assert dump.read_physical(0x102FF0, 32) == bytes(range(32))
    assert dump.read_physical(0x2000, 4) == bytes(4)
    assert dump.read_physical(0x2000, 0) == b""


@pytest.mark.parametrize(
    "address, size, missing",
    [(0xA000, 1, 0xA000), (0x9FFF, 2, 0xA000), (0xFFFFF, 1, 0xFFFFF), (0x103FFF, 2, 0x104000), (1 << 63, 8, 1 << 63)],
)
def test_a_hole_is_absent(tmp_path: Path, address: int, size: int, missing: int) -> None:
    dump = opened(tmp_path, core())
    with pytest.raises(Unreadable, match=f"^physical {missing:#x} is not in the dump$"):
        dump.read_physical(address, size)


def test_many_reads_keep_their_order(tmp_path: Path) -> None:
    first, hole, last = opened(tmp_path, core()).read_physical_many([(0x1234, 1), (0xB000, 1), (0x1235, 1)])
    assert (first, str(hole), last) == (b"h", "physical 0xb000 is not in the dump", b"e")


def test_neighbours_in_memory_that_lie_apart_in_the_file_read_as_one(tmp_path: Path) -> None:
    headers = [writer.program_header(1, 64 + 112 + 4, 0x1000, 4, 4), writer.program_header(1, 64 + 112, 0x1004, 4, 4)]
    dump = opened(tmp_path, writer.elf_header(2) + b"".join(headers) + b"WXYZabcd")
    assert dump.read_physical(0x1002, 4) == b"cdWX"
    assert list(dump.physical_ranges()) == [(0x1000, 0x1008)]


def test_the_part_of_a_segment_that_is_not_in_the_file_is_absent(tmp_path: Path) -> None:
    dump = opened(tmp_path, writer.elf_header(1) + writer.program_header(1, 64, 0x1000, 56, 0x1000))
    assert list(dump.physical_ranges()) == [(0x1000, 0x1038)]
    with pytest.raises(Unreadable, match="^physical 0x1038 was left out when the dump was written$"):
        dump.read_physical(0x1030, 16)


def test_memory_without_content_beyond_all_addresses_is_not_memory(tmp_path: Path) -> None:
    headers = [writer.program_header(1, 176, 0x1000, 8, 8), writer.program_header(1, 0, (1 << 64) - 4096, 0, 1 << 20)]
    dump = opened(tmp_path, writer.elf_header(2) + b"".join(headers) + bytes(8))
    assert list(dump.physical_ranges()) == [(0x1000, 0x1008)]
    with pytest.raises(Unreadable, match="^physical 0xfffffffffffff000 is not in the dump$"):
        dump.read_physical((1 << 64) - 4096, 8)


def test_what_qemu_writes_is_read(tmp_path: Path) -> None:
    notes = writer.qemu_notes([writer.qemu_cpu(each, (0x7000, 0xFFF), 0x8000) for each in REGISTERS], REGISTERS)
    data = writer.made(writer.write_elf, RANGES, CONTENT, notes, ehsize=8, left_out=[(0xFEE00000, 0xFEE01000)])
    dump = opened(tmp_path, data)
    assert list(dump.physical_ranges()) == RANGES
    assert [(cpu.index, cpu.xen_cpu, cpu.idtr, cpu.tr_base) for cpu in dump.cpus()] == [
        (0, None, (0x7000, 0xFFF), 0x8000),
        (1, None, (0x7000, 0xFFF), 0x8000),
    ]
    assert dump.cpus()[1].registers["rip"] == 0xFFFF82D040200001


def test_two_mappings_of_the_same_memory_agree(tmp_path: Path) -> None:
    """QEMU with paging describes each mapping; the same memory is at the same place in the file."""
    headers = [writer.program_header(1, 64, 0x1000, 96, 96, vaddr) for vaddr in (0x1000, 1 << 40)]
    headers.append(writer.program_header(1, 64 + 16, 0x1010, 152, 152))
    dump = opened(tmp_path, writer.elf_header(3) + b"".join(headers))
    assert list(dump.physical_ranges()) == [(0x1000, 0x1000 + 168)]
    assert dump.read_physical(0x1000, 168) == b"".join(headers)


def test_more_program_headers_than_16_bits_count(tmp_path: Path) -> None:
    assert opened(tmp_path, core(extended_count=True)).read_physical(0x1234, 5) == b"hello"


def test_sixty_thousand_program_headers(tmp_path: Path) -> None:
    """Every other page is a piece of memory; the count goes past 0xffff."""
    ranges = [(0x2000 * n, 0x2000 * n + 0x1000) for n in range(60_000)]
    with (tmp_path / "dump").open("wb") as file:
        writer.write_elf(file, ranges, {0x2000 * 59_999 + 8: b"there"}, NOTES)
    dump = open_dump(str(tmp_path / "dump"))
    assert list(dump.physical_ranges()) == ranges
    assert dump.read_physical(0x2000 * 59_999 + 8, 5) == b"there"


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(f"<{form}", changed, at, *values)
    return bytes(changed)


FIRST_LOAD = 64 + 56  # after the header and PT_NOTE's program header

DAMAGED = {
    "offset past 2^64": (
        FIRST_LOAD + 8,
        "Q",
        (1 << 64) - 0x1000,
        "program header 1: its memory ends at offset 0x10000000000009000; the file is damaged",
    ),
    "address past 2^64": (
        FIRST_LOAD + 24,
        "Q",
        (1 << 64) - 0x1000,
        "program header 1: 0xa000 bytes of file for 0xa000",
    ),
    "more file than memory": (FIRST_LOAD + 40, "Q", 0x1000, "program header 1: 0xa000 bytes of file for 0x1000 bytes"),
    "address past 2^52": (FIRST_LOAD + 24, "Q", 1 << 63, "program header 1: 0xa000 bytes of file for 0xa000 bytes at"),
    "one place for two addresses": (
        FIRST_LOAD + 56 + 8,
        "Q",
        64 + 3 * 56 + len(NOTES) + 0x9000,
        "program headers overlap: physical 0x9000 and 0x100000 are both at offset 0x9",
    ),
    "overlap": (FIRST_LOAD + 24, "Q", 0xFF000, "program headers overlap: physical 0x100000 is at offsets"),
    "notes of 4 GB": (64 + 32, "Q", 1 << 32, "program header 0 (notes): 4294967296 bytes of notes"),
    "notes past 2^63": (64 + 8, "Q", 1 << 63, "program header 0 (notes): they end at offset 0x80000000"),
    "a name of 4 GB": (
        64 + 168,
        "I",
        (1 << 32) - 1,
        "program header 0 (notes): the note at +0x0 claims 4294967295 bytes",
    ),
    "a content of 4 GB": (64 + 172, "I", (1 << 32) - 2, "program header 0 (notes): the note at +0x0 claims 5 bytes"),
    "many headers": (56, "H", 0xFFFE, "65534 program headers: the file ends at"),
    "header size": (54, "H", 32, "ELF header +0x36: program headers of 32 bytes"),
    "header table": (32, "Q", (1 << 64) - 8, "3 program headers: the file ends at"),
    "machine": (18, "H", 183, "an ELF core of machine type 183"),
    "i386": (18, "H", 3, "an ELF core of an i386 machine: QEMU writes one while the first CPU runs 32-bit code"),
    "big-endian": (5, "B", 2, "an ELF file that is not 64-bit little-endian"),
    "executable": (16, "H", 2, "an executable, not a dump; a file of Xen's symbols goes with --symbols"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_named(tmp_path: Path, name: str) -> None:
    at, form, value, expected = DAMAGED[name]
    assert refusal(tmp_path, patched(core(), at, form, value)).startswith(expected)


def test_an_impossible_count_in_section_header_0(tmp_path: Path) -> None:
    data = patched(core(extended_count=True), 64 + 56 * 3 + 44, "I", (1 << 32) - 1)
    assert refusal(tmp_path, data).startswith("4294967295 program headers; more than 262144")
    assert refusal(tmp_path, patched(data, 40, "Q", 1 << 62)).startswith("section header 0, which counts")


def test_a_core_of_a_process(tmp_path: Path) -> None:
    data = writer.made(writer.write_elf, RANGES, {}, writer.note("CORE", 3, bytes(136)))
    assert refusal(tmp_path, data) == "a core of a process, not of a machine"


def test_a_core_that_gdb_took_of_a_process(tmp_path: Path) -> None:
    """Its notes are read before its memory, which is all at physical address 0."""
    gdb = [find_gdb(), "-q", "-nx", "-batch", "-ex", "starti", "-ex", f"gcore {tmp_path}/dump", "sleep"]
    subprocess.run(gdb, capture_output=True, check=True)
    assert refusal(tmp_path, (tmp_path / "dump").read_bytes()) == "a core of a process, not of a machine"


def test_a_core_of_a_process_as_linux_lays_it_out(tmp_path: Path) -> None:
    notes = b"".join(writer.note("CORE", kind, bytes(336)) for kind in (1, 3, 6))
    headers = [writer.program_header(4, 64 + 3 * 56, 0, len(notes), 0)]
    places = ((64, 0x400000), (120, 0x7FFF0000))
    headers += [writer.program_header(1, offset, 0, 56, 0x1000, vaddr) for offset, vaddr in places]
    data = writer.elf_header(3) + b"".join(headers) + notes
    assert refusal(tmp_path, data) == "a core of a process, not of a machine"


def test_a_core_of_a_domain(tmp_path: Path) -> None:
    bare = writer.elf_header(0, phoff=0, shoff=64, shnum=7) + bytes(512)
    said = "an ELF core without program headers: a core of a Xen domain (xl dump-core) holds no Xen"
    assert refusal(tmp_path, bare) == said
    data = writer.made(writer.write_elf, RANGES, {}, writer.note("Xen", 0x2000001, bytes(32)))
    assert refusal(tmp_path, data) == "a core of a Xen domain (xl dump-core): it holds no Xen"


def test_a_dump_of_linux_without_xen(tmp_path: Path) -> None:
    notes = writer.note("CORE", 1, writer.prstatus({"rip": 1})) + writer.note("VMCOREINFO", 0, b"OSRELEASE=6.1.0\n")
    data = writer.made(writer.write_elf, RANGES, {}, notes)
    assert refusal(tmp_path, data).startswith("a dump of Linux without Xen")


def test_the_cpus_of_a_guest_that_qemu_dumped_may_be_xens(tmp_path: Path) -> None:
    """With the vmcoreinfo device QEMU adds the guest's own VMCOREINFO."""
    notes = writer.qemu_notes([writer.qemu_cpu({})], [{}]) + writer.note("VMCOREINFO", 0, b"OSRELEASE=6.1.0\n")
    assert len(opened(tmp_path, writer.made(writer.write_elf, RANGES, {}, notes)).cpus()) == 1


@pytest.mark.parametrize(
    "start, expected",
    [
        (b"\x1f\x8b\x08", "compressed by gzip; unpack it first (gunzip)"),
        (b"PAGEDU64", "a Windows crash dump"),
        (b"QEVM\0\0\0\3", "a QEMU migration or savevm stream"),
        (b"something else", "not a dump of a known format"),
    ],
)
def test_other_files_are_named(tmp_path: Path, start: bytes, expected: str) -> None:
    assert refusal(tmp_path, start + bytes(64)).startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"") == "empty; give a dump file"
    with pytest.raises(Undecidable, match=r"No such file or directory$"):
        open_dump(str(tmp_path / "none"))
    with pytest.raises(Undecidable, match="a directory; give a dump file$"):
        open_dump(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/null", str(tmp_path / "fifo")):  # a FIFO without a writer: opening must not block
        with pytest.raises(Undecidable, match="not a regular file; give a dump file$"):
            open_dump(path)


def test_a_failing_disk_does_not_end_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    dump = opened(tmp_path, bytes(4096), base=0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(Unreadable, match="^16 bytes at offset 0x10 of the file: Input/output error$"):
        dump.read_physical(16, 16)


def test_a_raw_image_has_a_base(tmp_path: Path) -> None:
    dump = opened(tmp_path, b"\0" * 16 + b"memory", base=0x100000)
    assert list(dump.physical_ranges()) == [(0x100000, 0x100016)]
    assert dump.read_physical(0x100010, 6) == b"memory"
    assert (dump.format, list(dump.cpus()), list(dump.notes())) == ("raw image at 0x100000", [], [])
    for address, missing in ((0xFFFFF, 0xFFFFF), (0x100011, 0x100016)):
        with pytest.raises(Unreadable, match=f"physical {missing:#x} is not in the image"):
            dump.read_physical(address, 6)


@pytest.mark.parametrize("base", [-5, 1 << 52, 1 << 70])
def test_a_base_that_is_not_an_address(tmp_path: Path, base: int) -> None:
    said = refusal(tmp_path, bytes(16), base=base)
    assert said == f"its first byte cannot be at physical {base:#x}: give an address below 0x10000000000000"


@pytest.mark.parametrize("write", [writer.write_elf, writer.write_kdump, None])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("address, size", [(0, -1), (-1, 1), (-4096, 4096), (-1 << 64, 8)])
def test_a_read_of_a_negative_size(address: int, size: int, flat: bool, write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = bytes(8192) if write is None else writer.made(write, [(0, 0x3000)], {}, NOTES)
    options = {"base": 0} if write is None else {}
    dump = opened(tmp_path, writer.flattened(data) if flat and write else data, **options)
    with pytest.raises(Unreadable):
        dump.read_physical(address, size)


def test_a_base_for_a_file_with_its_own_addresses_is_refused(tmp_path: Path) -> None:
    said = "the file itself gives its addresses (ELF core); a base is for a raw image of memory"
    assert refusal(tmp_path, core(), base=0) == said


def test_a_file_that_shrinks_while_it_is_read_is_unreadable(tmp_path: Path) -> None:
    dump = opened(tmp_path, core())
    os.truncate(tmp_path / "dump", 0x800)
    with pytest.raises(Unreadable, match="the file shrank while it was read: 0 of 5 bytes at offset 0x"):
        dump.read_physical(0x1234, 5)
