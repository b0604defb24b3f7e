"""Kdump-compressed and flattened dumps as makedumpfile and QEMU write them."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from tests.machines.dumpwriter import PAGE
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import File
from xen_symbols.targets import flattened, kdump
from xen_symbols.targets.dump import Dump, open_dump

RANGES = [(0x0, 0xA000), (0x100000, 0x104000)]
CONTENT = {0x1234: b"hello", 0x102FF0: bytes(range(32)), 0x3000: bytes(range(256)) * 16}
NOTES = writer.xen_notes([{"rip": 0xFFFF82D040200000, "cr3": 0x1000}, {}])


def opened(path: Path, data: bytes) -> Dump:
    file = path / "dump"
    file.write_bytes(data)
    return open_dump(str(file))


def refusal(path: Path, data: bytes) -> str:
    with pytest.raises(Undecidable) as caught:
        opened(path, data)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}/dump: ")


def made(**options: object) -> bytes:
    return writer.made(writer.write_kdump, RANGES, CONTENT, NOTES, **options)


@pytest.mark.parametrize("compression", [0, 1])
@pytest.mark.parametrize("version", [4, 6])
def test_pages_and_notes(tmp_path: Path, compression: int, version: int) -> None:
    dump = opened(tmp_path, made(compression=compression, version=version))
    assert dump.format == "kdump"
    assert list(dump.physical_ranges()) == RANGES
    assert dump.read_physical(0x1234, 5) == b"hello"
    assert dump.read_physical(0x102FF0, 32) == bytes(range(32))
    assert dump.read_physical(0x2FFF, 0x1002) == b"\0" + bytes(range(256)) * 16 + b"\0"
    assert dump.read_physical(0x100000, 8) == bytes(8), "a page that was zero is zero"
    assert [cpu.registers for cpu in dump.cpus()] == [
        {"rip": 0xFFFF82D040200000, "cr3": 0x1000}
        | dict.fromkeys(("cr0", "cr2", "cr4"), 0)
        | {name: 0 for name in writer.PRSTATUS_ORDER.split() if name not in ("orig_rax", "rip", "fs_base", "gs_base")},
        {},
    ]


@pytest.mark.parametrize(
    "address, why",
    [
        (0xA000, "physical 0xa000: the dump has no memory there"),
        (0x9FFF, "physical 0xa000: the dump has no memory there"),
        (0x104000, "physical 0x104000: the dump has no memory there"),
        (1 << 60, "physical 0x1000000000000000: the dump has no memory there"),
        (0x4FFF, "physical 0x5000: the page was left out when the dump was written"),
    ],
)
def test_what_is_not_there_is_absent(tmp_path: Path, address: int, why: str) -> None:
    dump = opened(tmp_path, made(excluded=[5, 0x101]))
    with pytest.raises(Unreadable) as caught:
        dump.read_physical(address, 2)
    assert str(caught.value) == why
    assert list(dump.physical_ranges()) == [(0, 0x5000), (0x6000, 0xA000), (0x100000, 0x101000), (0x102000, 0x104000)]
    assert dump.read_physical(0x102FF0, 32) == bytes(range(32)), "pages behind the excluded ones keep their place"


@pytest.mark.parametrize(
    "ranges", [[(0, 8 * PAGE * 4096 * 2)], [(PAGE * n * 3, PAGE * (n * 3 + 2)) for n in range(300)]]
)
def test_runs_of_pages(ranges: list[tuple[int, int]]) -> None:
    """One bitmap chunk is 32768 pages; runs go across words and chunks."""
    frames = ranges[-1][1] // PAGE
    bits = bytearray(-(-frames // (8 * PAGE)) * PAGE)
    for start, end in ranges:
        for frame in range(start // PAGE, end // PAGE):
            bits[frame // 8] |= 1 << frame % 8
    data = bytearray(writer.made(writer.write_kdump, [(0, PAGE)], {}, b""))
    data[3 * PAGE :] = bytes(bits) * 2
    struct.pack_into("<II", data, 0x1B4, 2 * len(bits) // PAGE, frames)
    struct.pack_into("<Q", data, PAGE + 96, frames)
    struct.pack_into("<I", data, 0x1A8, 8)  # incomplete: there are no pages

    class Bytes:
        size = len(data)

        def read(self, offset: int, size: int) -> bytes:
            return bytes(data[offset : offset + size])

        scan = read

    assert list(kdump.KdumpMemory(Bytes()).ranges()) == ranges


def test_one_file_of_a_split_dump(tmp_path: Path) -> None:
    says = "one file of a split dump; put all of them together with makedumpfile --reassemble"
    assert refusal(tmp_path, made(split=True)) == says


def descriptors_at(data: bytes) -> int:
    return (1 + sum(struct.unpack_from("<II", data, 0x1B0))) * PAGE


def test_a_dump_that_ran_out_of_space(tmp_path: Path) -> None:
    """makedumpfile marks it, and the descriptors of pages not written are zero."""
    data = bytearray(made(status=8))
    last = descriptors_at(data) + 13 * 24
    data[last : last + 24] = bytes(24)
    dump = opened(tmp_path, bytes(data[:-10]))
    assert dump.format == "kdump, which its writer could not complete"
    assert dump.read_physical(0x1234, 5) == b"hello"
    with pytest.raises(Unreadable, match="physical 0x103000: its writer never wrote this page"):
        dump.read_physical(0x103000, 1)


def damaged_page(frame: int, **fields: int) -> bytes:
    """A page below 0xa000 with another descriptor (offset, size, compression) or other bytes (xor)."""
    data = bytearray(made())
    at = descriptors_at(data) + frame * 24
    offset, size, compression, _ = struct.unpack_from("<QIIQ", data, at)
    for byte in range(offset, offset + size):
        data[byte] ^= fields.get("xor", 0)
    values = (fields.get("offset", offset), fields.get("size", size), fields.get("compression", compression))
    struct.pack_into("<QII", data, at, *values)
    return bytes(data)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"xor": 0x55}, r"bad zlib data: "),
        ({"size": 5}, r"bad zlib data: \d+ bytes instead of 4096"),
        ({"size": 0}, r"bad page descriptor at offset 0x[0-9a-f]+: 0 bytes, compression 0x1"),
        ({"size": 0xFFFFFFFF}, r"bad page descriptor"),
        ({"size": 4095, "compression": 0}, r"bad page descriptor"),
        ({"offset": 1 << 63}, r"the file ends at 0x[0-9a-f]+, \d+ bytes are wanted at offset 0x8000000000000000"),
        ({"compression": 8}, r"unknown compression 0x8"),
    ],
)
def test_a_bad_page_is_absent_and_the_others_are_not(tmp_path: Path, fields: dict[str, int], why: str) -> None:
    dump = opened(tmp_path, damaged_page(1, **fields))
    with pytest.raises(Unreadable, match=f"^physical 0x1000: {why}"):
        dump.read_physical(0x1234, 5)
    assert dump.read_physical(0x3000, 2) == b"\0\1"


def test_a_page_that_unpacks_to_a_gigabyte_is_bounded(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(1 << 22), 9)
    data = made(compress=lambda page: bomb[:4095])
    with pytest.raises(Unreadable, match="bad zlib data: 4097 bytes instead of 4096"):
        opened(tmp_path, data).read_physical(0x1234, 5)


HEADER = {
    "block size": (0x1AC, "I", 8192, "kdump header +0x1ac: blocks of 8192 bytes"),
    "sub header": (0x1B0, "I", 0xFFFFFFFF, "kdump header +0x1b4: the bitmaps end at offset 0x10000"),
    "bitmaps": (0x1B4, "I", 0xFFFFFFFF, "kdump header +0x1b4: the bitmaps end at offset 0x10000"),
    "no bitmaps": (0x1B4, "I", 0, "kdump header +0x1b4: 0 blocks of bitmaps for 0x104 frames"),
    "frames": (PAGE + 96, "Q", 1 << 63, "kdump header: 0x8000000000000000 page frames"),
    "few bitmaps": (PAGE + 96, "Q", 1 << 20, "kdump header +0x1b4: 2 blocks of bitmaps for 0x100000 frames"),
    "notes size": (PAGE + 56, "Q", 1 << 32, "kdump sub header +0x38: 4294967296 bytes of notes"),
    "notes offset": (PAGE + 48, "Q", 1 << 63, "kdump sub header +0x30: the notes end at offset 0x8"),
}


@pytest.mark.parametrize("name", HEADER)
def test_a_damaged_header_is_named(tmp_path: Path, name: str) -> None:
    at, form, value, expected = HEADER[name]
    data = bytearray(made())
    struct.pack_into(f"<{form}", data, at, value)
    assert refusal(tmp_path, bytes(data)).startswith(expected)


def test_a_machine_that_qemu_does_not_name(tmp_path: Path) -> None:
    """QEMU 10.0 writes Unknown in both of its kdump formats."""
    assert opened(tmp_path, made().replace(b"x86_64\0", b"Unknown", 1)).read_physical(0x1234, 5) == b"hello"


def test_another_machine(tmp_path: Path) -> None:
    data = made().replace(b"x86_64", b"s390x\0", 1)
    assert refusal(tmp_path, data) == "a kdump of a machine of type 's390x'; x86_64 is needed"


def test_a_decompressor_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = opened(tmp_path, made(compression=2, compress=lambda page: b"anything"))
    monkeypatch.setitem(sys.modules, "lzallright", None)
    with pytest.raises(Unreadable, match=r"compressed with lzo; pip install 'xencrash\[dumps\]' \(lzallright\)"):
        dump.read_physical(0x1234, 5)


def test_other_compressions(tmp_path: Path) -> None:
    import cramjam
    import lzallright

    compressors = {
        2: lambda page: bytes(lzallright.LZOCompressor().compress(page)),
        4: lambda page: bytes(cramjam.snappy.compress_raw(page)),
        0x20: lambda page: bytes(cramjam.zstd.compress(page)),
    }
    for compression, compress in compressors.items():
        dump = opened(tmp_path, made(compression=compression, compress=compress))
        assert dump.read_physical(0x1234, 5) == b"hello"
        bad = opened(tmp_path, made(compression=compression, compress=lambda page: b"\x01\x02\x03 no such data"))
        with pytest.raises(Unreadable, match=r"physical 0x1000: bad (lzo|snappy|zstd) data: "):
            bad.read_physical(0x1234, 5)


# Flattened


@pytest.mark.parametrize("write", [writer.write_kdump, writer.write_elf])
def test_a_flattened_dump_is_read_in_place(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    dump = opened(tmp_path, writer.flattened(writer.made(write, RANGES, CONTENT, NOTES), piece=1000))
    assert dump.format == ("flattened kdump" if write is writer.write_kdump else "flattened ELF core")
    assert list(dump.physical_ranges()) == RANGES
    assert dump.read_physical(0x3000, 0x1000) == bytes(range(256)) * 16
    assert len(dump.cpus()) == 2


def pieces(*parts: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack(">qq", offset, len(data)) + data for offset, data in parts)
    return writer.flattened(b"")[:-16] + body + struct.pack(">qq", -1, -1)


def test_a_later_piece_overwrites_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "flat"
    file.write_bytes(pieces((4, b"efghij"), (0, b"abcd"), (2, b"CDEF"), (5, b"!"), (20, b"end")))
    flat = flattened.FlattenedFile(File(str(file)))
    assert flat.size == 23
    assert flat.read(0, 10) == b"abCDE!ghij"
    assert flat.read(20, 3) == b"end"
    for offset, size in ((9, 2), (12, 1), (22, 2)):
        with pytest.raises(Unreadable):
            flat.read(offset, size)


def test_makedumpfile_leaves_holes_between_the_headers(tmp_path: Path) -> None:
    """It seeks to each block, and the kdump header does not fill its own (464 bytes)."""
    whole = writer.made(writer.write_kdump, RANGES, CONTENT, NOTES)
    (tmp_path / "dump").write_bytes(pieces((0, whole[:464]), (4096, whole[4096:])))
    dump = open_dump(str(tmp_path / "dump"))
    assert (dump.format, list(dump.physical_ranges())) == ("flattened kdump", RANGES)


def test_a_damaged_flattened_file_is_named(tmp_path: Path) -> None:
    whole = writer.flattened(writer.made(writer.write_kdump, RANGES, CONTENT, NOTES))
    assert refusal(tmp_path, pieces((0, b""))).startswith("the flattened piece at 0x1000 claims 0 bytes for offset 0")
    assert refusal(tmp_path, pieces((-5, b"abc"))).startswith(
        "the flattened piece at 0x1000 claims 3 bytes for offset -5"
    )
    assert refusal(tmp_path, pieces((0, b"neither"))).startswith("a flattened file with neither")
    assert refusal(tmp_path, whole[:16] + bytes(16) + whole[32:]).startswith("a flattened dump of type 0 and version 0")
