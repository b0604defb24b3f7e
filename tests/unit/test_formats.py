"""Files as such: their bytes, ELF's layouts, notes, magics."""

from __future__ import annotations

import re
import struct
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from tests.machines import dumpwriter
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats import elf, elfnotes
from xen_symbols.formats.compression import unpacked
from xen_symbols.formats.content import Content, File, Held, start_of
from xen_symbols.formats.image import Image
from xen_symbols.formats.magics import MAGICS, Magic, recognised
from xen_symbols.symbols.load import load_symbols
from xen_symbols.targets.dump import open_dump


def contents(folder: Path, data: bytes) -> tuple[Content, Content]:
    (folder / "file").write_bytes(data)
    return File(str(folder / "file")), Held(data)


def test_bytes_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    for content in contents(tmp_path, b"0123456789"):
        assert (content.size, content.read(2, 3), content.read(10, 0)) == (10, b"234", b"")
        assert (start_of(content, 4), start_of(content, 40)) == (b"0123", b"0123456789")
        with pytest.raises(Unreadable, match="^the file ends at 0xa, 3 bytes are wanted at offset 0x8$"):
            content.read(8, 3)


def test_a_program_header_of_32_bits_is_the_same_in_another_order() -> None:
    program = elf.Program(elf.PT_LOAD, 7, 0x80, 0x100000, 0x200000, 0x30, 0x40, 0x1000)
    raw = elf.ELF32.pack_program(program)
    assert struct.unpack("<8I", raw) == (1, 0x80, 0x100000, 0x200000, 0x30, 0x40, 7, 0x1000)  # p_flags is the seventh
    assert list(elf.ELF32.programs(raw)) == list(elf.ELF64.programs(elf.ELF64.pack_program(program))) == [program]


@pytest.mark.parametrize("layout", [elf.ELF32, elf.ELF64])
def test_an_elf_file_names_its_layout(layout: elf.Layout) -> None:
    data = layout.ident.ljust(16, b"\0") + bytes(layout.header.size - 16)
    assert elf.layout_of(Held(data)) is layout
    assert layout.read_header(Held(data)).ident == data[:16]
    for place, value in ((4, 3), (5, 2)):  # another class, another byte order
        assert elf.layout_of(Held(data[:place] + bytes([value]) + data[place + 1 :])) is None
    with pytest.raises(Undecidable, match="^ELF header: the file ends at "):
        layout.read_header(Held(data[:-1]))


def test_notes_are_walked_up_to_zeros_or_to_one_that_is_cut_off() -> None:
    first, second = dumpwriter.note("CORE", 1, b"abcde"), dumpwriter.note("Xen", 0x1000001, b"")
    expected = [(0, elfnotes.Note("CORE", 1, b"abcde")), (len(first), elfnotes.Note("Xen", 0x1000001, b""))]
    assert list(elfnotes.walk(first + second + bytes(100) + first)) == expected
    walk = elfnotes.walk(second + first[:-8])
    assert next(walk)[1].name == "Xen"
    with pytest.raises(elfnotes.BadNote) as caught:
        next(walk)
    assert caught.value.args == (len(second), 5, 5)
    assert elfnotes.pack(b"CORE\0", 1, b"abcde") == first


def test_an_image_is_read_by_its_addresses() -> None:
    image = Image(Held(b"0123456789"), [(0x2000, 0x2004, 6), (0x1000, 0x1003, 1)])
    assert image.segments == [(0x1000, 0x1003), (0x2000, 0x2004)]
    assert image.pieces() == [(0x1000, b"123"), (0x2000, b"6789")]
    assert image.moved(0x100).read(0x2102, 2) == b"89"
    for address, size in ((0xFFF, 2), (0x1002, 2), (0x3000, 1)):
        with pytest.raises(Unreadable):
            image.read(address, size)


def file_of(row: Magic) -> bytes:
    """A file of that kind, with zeros around its magic."""
    if row.offset < 0:
        return bytes(1024) + row.magic + bytes(-row.offset - len(row.magic))
    return bytes(row.offset) + row.magic + bytes(64)


@pytest.mark.parametrize("row", [row for row in MAGICS if row.advice], ids=lambda row: row.what)
def test_what_is_recognised_is_named_and_no_base_is_asked_for(row: Magic, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file_of(row))
    with pytest.raises(Undecidable) as error:
        open_dump(str(path))
    assert str(error.value) == f"{path}: {row.what}; {row.advice}" and "needs its first byte" not in str(error.value)
    if row.weak:  # a raw image of memory may begin so
        assert open_dump(str(path), base=0).read_physical(row.offset, len(row.magic)) == row.magic
    else:
        with pytest.raises(Undecidable, match="; "):
            open_dump(str(path), base=0)


@pytest.mark.parametrize(
    ("start", "what"),
    [(b"(XEN) Xen version 4.17\n" * 40, "a text file"), ("Xen läuft\n".encode(), "a text file"),
     (b"no line ends here", None), (b"(XEN)\n\0" * 200, None), (bytes(4096), None), (b"", None)],
)  # fmt: skip
def test_a_log_is_a_text(start: bytes, what: str | None) -> None:
    row = recognised(Held(start))
    assert (row and row.what) == what


@pytest.mark.parametrize("row", MAGICS, ids=lambda row: row.what)
def test_each_kind_of_file_is_read_or_has_an_advice(row: Magic) -> None:
    content = Held(file_of(row))
    assert recognised(content) is row  # no other row comes before it
    assert row.source
    assert bool(row.dump) is not bool(row.advice)
    readers = []
    if row.dump:
        readers.append(import_module(f"xen_symbols.targets.{row.dump}").read_dump)
    if row.symbols:
        readers.append(partial(import_module(f"xen_symbols.symbols.{row.symbols}").read_symbols, "file"))
    if row.packed:
        readers.append(partial(unpacked, packed=row.packed))
    for read in readers:
        with pytest.raises((Undecidable, Unreadable)):  # there is nothing after the magic
            read(Held(row.magic))


@pytest.mark.parametrize("row", [row for row in MAGICS if not row.symbols], ids=lambda row: row.what)
def test_what_holds_no_symbols_is_named(row: Magic, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file_of(row))
    if row.packed:
        said = f"((bad|truncated) {row.packed} data|empty when decompressed)"
    else:
        advice = f"{re.escape(row.advice)}; " if row.advice.startswith("unpack it first") else ""
        said = "" if row.weak else f"{re.escape(row.what)}; {advice}--symbols takes "
    with pytest.raises(Undecidable, match=f"^{path}: {said}"):
        load_symbols(str(path))
