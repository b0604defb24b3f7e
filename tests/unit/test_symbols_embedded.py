"""The symbol table inside Xen's image: found in any stretch of memory, decoded, and refused if it is not one."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines.elfwriter import (
    BUILD_ID,
    START,
    VIRT_START,
    build_id_note,
    embedded_table,
    image,
    sections,
    stripped_xen,
    xen_syms,
)
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.symbols import embedded
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import Symbol, SymbolAmbiguous, SymbolNotFound

ENTRIES = [
    (0x200000, "T_start"),
    (0x200000, "Tstart"),
    (0x200100, "tarch/x86/oprofile/nmi_int.c#nmi_callback"),
    (0x200180, "tarch/x86/crash.c#do_nmi_crash"),
    (0x2001E0, ""),
    (0x200200, "Ttrap_nop"),
    (0x200210, "T_etext"),
    (0x203000, "Bcpu_online_map"),
    (0x203010, "dcommon/kexec.c#crashing_cpu.2"),
    (0x203020, "darch/x86/traps.c#nmi_callback"),
    (0x204000, "B_end"),
]
TEXT_ENTRIES = [(offset, text) for offset, text in ENTRIES if text[:1] in ("t", "T")]
TOKENS = ["nmi_", "callback", "arch/x86/", ".c#", "crash", "nmi_c"]
TEXTS = [text for _, text in ENTRIES]


def many(count: int) -> list[tuple[int, str]]:
    return [(0x200000 + 16 * n, "" if n % 7 == 3 else f"tfile{n % 50}.c#function_{n}") for n in range(count)]


# A table written out by hand: the two symbols "Ta" at 0x10 and "Tb" at 0x20, whose tokens are "T", "a", "b", the
# digits, and "Ta" as number 0; every other token is empty.
BY_HAND = (
    bytes.fromhex("10000000 20000000")  # offsets
    + bytes.fromhex("02000000")  # how many
    + bytes.fromhex("01 00  02 54 62  000000")  # "Ta" by token 0; "T", "b"; padding
    + bytes.fromhex("00000000")  # one marker
    + b"Ta\0" + bytes(47)
    + b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0" + bytes(0x54 - 0x3A)
    + b"T\0" + bytes(0x61 - 0x55) + b"a\0b\0" + bytes(0x100 - 0x63)
)  # fmt: skip
BY_HAND += bytes(-len(BY_HAND) % 4)
HAND_INDEX = [0, *range(3, 0x32), *range(0x32, 0x46, 2), *range(0x46, 0x60), 0x60]
HAND_INDEX += [*range(0x62, 0x6E), 0x6E, 0x70, *range(0x72, 0x72 + 0x100 - 0x63)]
BY_HAND += struct.pack("<256H", *HAND_INDEX)


def test_a_table_written_by_hand() -> None:
    found = embedded.find(BY_HAND)
    assert found is not None
    assert (found.offsets, found.texts) == ((0x10, 0x20), ("Ta", "Tb"))
    assert (found.start, found.end) == (0, len(BY_HAND))


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 700])
def test_a_table_is_found_wherever_it_lies(count: int, natural: bool) -> None:
    entries = many(count)
    before = b"\xcc" * 4096 + bytes(64)
    table = embedded_table(entries, tokens=["function_", "file", ".c#"], natural=natural)
    found = embedded.find(before + table + b"\xcc" * 100)
    assert found is not None
    assert found.offsets == tuple(offset for offset, _ in entries)
    assert found.texts == tuple(text for _, text in entries)
    assert found.start == len(before)


names = st.text("abcdefgxyz_019./#", min_size=1, max_size=30)
texts = st.one_of(st.just(""), st.builds(str.__add__, st.sampled_from("tTdDbBrRW"), names))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0x100000, 0x3FFFFFFF), texts), min_size=1, max_size=600),
    st.lists(st.text("abcxyz_019", min_size=2, max_size=5), max_size=150),
    st.booleans(),
    st.integers(0, 64),
)
def test_what_is_encoded_is_decoded(
    entries: list[tuple[int, str]], tokens: list[str], natural: bool, padding: int
) -> None:
    entries.sort(key=lambda entry: entry[0])
    before = bytes(4 * padding)
    found = embedded.find(before + embedded_table(entries, tokens=tokens, natural=natural))
    assert found is not None
    assert list(zip(found.offsets, found.texts, strict=True)) == entries
    assert found.start == len(before)


def test_a_table_with_a_part_missing_is_not_one() -> None:
    table = embedded_table(ENTRIES, tokens=TOKENS)
    needed = len(table) - 4  # the number of names behind the token index is not used
    assert embedded.find(table[:needed]) is not None
    for cut in range(needed):
        assert embedded.find(table[:cut]) is None
    for cut in range(4, len(table), 4):
        assert embedded.find(table[cut:]) is None


def test_every_marker_must_agree() -> None:
    table = bytearray(embedded_table(many(700), tokens=TOKENS))
    tokens = table.index(b"\0" * 20)  # the empty tokens of the control characters
    marker = tokens & ~3
    while table[marker : marker + 4] != bytes(4):
        marker -= 4
    second = int.from_bytes(table[marker + 4 : marker + 8], "little")
    assert second > 1000
    table[marker + 4 : marker + 8] = (second + 1).to_bytes(4, "little")
    assert embedded.find(bytes(table)) is None


def test_names_that_unpack_to_more_than_any_symbol_are_refused() -> None:
    assert embedded.find(embedded_table([(0x200000, "T" + "x" * 400)], tokens=["x" * 200])) is not None
    assert embedded.find(embedded_table([(0x200000, "T" + "x" * 600)], tokens=["x" * 200])) is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_table_is_none_or_well_formed(data: st.DataObject) -> None:
    table = bytearray(embedded_table(many(300), tokens=TOKENS))
    for _ in range(data.draw(st.integers(1, 6))):
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
    found = embedded.find(bytes(table))
    if found is not None:
        assert len(found.offsets) == len(found.texts)
        assert list(found.offsets) == sorted(found.offsets)
        assert all(text.isprintable() and len(text) <= 512 for text in found.texts)


@pytest.mark.parametrize(
    "memory",
    [
        b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0" * 100_000,  # digits everywhere
        (embedded_table([(0, "Ta")])[16:] + bytes(3)) * 200,  # token tables without names
        bytes(4 << 20),
    ],
)
def test_hostile_memory_is_bounded(memory: bytes) -> None:
    assert embedded.find(memory) is None


# -- in files -----------------------------------------------------------------------------------


def pointers(count: int, start: int = START) -> bytes:
    """Pointers into itself, of which a real image is full."""
    return struct.pack(f"<{count}Q", *(start + 8 * n for n in range(count)))


def xen_image(entries: list[tuple[int, str]] = ENTRIES, text: bytes = bytes(0x1000)) -> tuple[bytes, int]:
    """(content, position of the build-id note)"""
    parts = sections(text=text, rodata=pointers(300) + embedded_table(entries, tokens=TOKENS))
    return image(parts), parts[2].address - START


def stripped(entries: list[tuple[int, str]] = ENTRIES) -> bytes:
    content, note = xen_image(entries)
    return stripped_xen(content, note)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_stripped_image(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "xen"
    path.write_bytes(pack(stripped()))
    table = load_symbols(str(path))
    assert table.source == "table embedded in Xen"
    assert not table.text_only
    assert table.build_id == BUILD_ID
    assert table.note_address == START + xen_image()[1]
    assert table.find("do_nmi_crash") == Symbol(START + 0x180, "do_nmi_crash", "arch/x86/crash.c", "t")
    assert table.find("kexec.c#crashing_cpu") == Symbol(START + 0x3010, "crashing_cpu.2", "common/kexec.c", "d")
    with pytest.raises(SymbolAmbiguous):
        table.find("nmi_callback")
    assert table.address("traps.c#nmi_callback") == START + 0x3020
    assert table.complete("") == sorted(
        [
            "_start",
            "start",
            "nmi_callback",
            "do_nmi_crash",
            "trap_nop",
            "_etext",
            "cpu_online_map",
            "crashing_cpu.2",
            "_end",
        ]
    )
    assert table.image is not None
    assert table.image.read(START + 0x1000, 16) == pointers(2)


def test_an_end_entry_ends_a_function(tmp_path: Path) -> None:
    path = tmp_path / "xen"
    path.write_bytes(stripped())
    table = load_symbols(str(path))
    assert table.extent("do_nmi_crash") == (START + 0x180, START + 0x1E0)
    assert table.describe(START + 0x1DF) == "do_nmi_crash+0x5f"
    assert table.lookup(START + 0x1E0) is None
    assert table.describe(START + 0x200) == "trap_nop"
    assert table.describe(START) == "start"
    assert table.describe(START + 0x3FFF) == "nmi_callback+0xfdf"
    assert table.lookup(START + 0x4000) is None
    assert table.lookup(START - 1) is None


def test_an_end_entry_where_the_next_symbol_starts(tmp_path: Path) -> None:
    path = tmp_path / "xen"
    path.write_bytes(stripped([(0x200000, "Ta"), (0x200010, ""), (0x200010, "Tb"), (0x200020, "")]))
    table = load_symbols(str(path))
    assert [table.describe(START + n) for n in (0xF, 0x10, 0x1F)] == ["a+0xf", "b", "b+0xf"]
    assert table.extent("a") == (START, START + 0x10)
    assert table.extent("b") == (START + 0x10, START + 0x20)


def test_a_table_of_text_only(tmp_path: Path) -> None:
    path = tmp_path / "xen"
    path.write_bytes(stripped(TEXT_ENTRIES))
    table = load_symbols(str(path))
    assert table.text_only
    assert table.build_id == BUILD_ID  # by its note: no symbol says where that is
    assert table.address("trap_nop") == START + 0x200
    assert table.get("nmi_crash", "tT") is None
    reason = f"idt_tables is not in the table embedded in Xen ({path}), which holds text symbols only"
    with pytest.raises(SymbolNotFound) as caught:
        table.get("idt_tables", "dD")
    assert str(caught.value) == reason


def test_a_stripped_xen_syms(tmp_path: Path) -> None:
    path = tmp_path / "xen-syms"
    path.write_bytes(xen_syms([], sections(rodata=embedded_table(ENTRIES, tokens=TOKENS))))
    table = load_symbols(str(path))
    assert table.source == "table embedded in Xen"
    assert table.address("trap_nop") == START + 0x200
    assert table.build_id == BUILD_ID


def test_images_that_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "xen"
    content = image(sections())
    path.write_bytes(stripped_xen(content))
    with pytest.raises(Undecidable) as caught:
        load_symbols(str(path))
    assert str(caught.value) == f"{path}: does not say at which virtual address it runs; give xen-syms or its .map"
    path.write_bytes(stripped_xen(pointers(300) + content))
    with pytest.raises(Undecidable) as caught:
        load_symbols(str(path))
    assert str(caught.value) == (
        f"{path}: no ELF symbol table, and none embedded by Xen's build; give xen-syms or its .map"
    )


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "xen"
    whole = stripped()
    for cut in [*range(1, 0x100), *range(0x100, len(whole), 97)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(Undecidable) as caught:
            load_symbols(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("region", [0xFFFF82C480000000, 0xFFFF82C4C0000000, 0xFFFF82D080000000, 0xFFFF82D040000000])
def test_where_xen_runs_shows_in_its_pointers(region: int) -> None:
    own = region + 0x200000
    assert embedded.virtual_start([(0x200000, bytes(8) + pointers(200, own) + pointers(10, own + (1 << 30)))]) == region
    assert embedded.virtual_start([(0x200000, pointers(200, own) + pointers(200, own + (1 << 30)))]) is None
    assert embedded.virtual_start([(0x200000, b"\0" + pointers(200, own))]) is None  # not aligned: no pointers
    assert embedded.virtual_start([]) is None


# -- in memory ----------------------------------------------------------------------------------


class Memory:
    """Xen's image in a target's memory, with holes where Xen has given pages back."""

    def __init__(self, content: bytes, holes: tuple[tuple[int, int], ...] = ()) -> None:
        self.content, self.holes, self.farthest = content, holes, 0

    def read(self, address: int, size: int) -> bytes:
        start, end = address - START, address - START + size
        if start < 0 or end > len(self.content) or any(start < high and low < end for low, high in self.holes):
            raise Unreadable(f"{address:#x} is not mapped")
        self.farthest = max(self.farthest, end)
        return self.content[start:end]


def test_the_table_in_a_targets_memory() -> None:
    content, note = xen_image()
    memory = Memory(content + bytes(-len(content) % 4096))
    table = embedded.load_memory("live", memory.read, VIRT_START, VIRT_START + (4 << 20))
    assert (table.path, table.source) == ("live", "table embedded in Xen")
    assert table.address("traps.c#nmi_callback") == START + 0x3020
    assert (table.build_id, table.note_address) == (BUILD_ID, START + note)
    assert table.image is None


def test_holes_before_and_behind_the_table() -> None:
    content, note = xen_image(text=bytes(0x300000))
    size = len(content) + -len(content) % 4096
    memory = Memory(
        content.ljust(size + 0x5000, b"\0"), ((0x3000, 0x4000), (0x180000, 0x1C1000), (size, size + 0x3000))
    )
    table = embedded.load_memory("dump", memory.read, START, START + (64 << 20))
    assert table.address("trap_nop") == START + 0x200
    assert (table.build_id, table.note_address) == (BUILD_ID, START + note)


def test_reading_stops_behind_the_table() -> None:
    content, _ = xen_image()
    memory = Memory(content.ljust(16 << 20, b"\0"))
    embedded.load_memory("dump", memory.read, START, START + (16 << 20))
    assert memory.farthest == 2 << 20


def test_a_table_with_a_hole_in_it_is_none() -> None:
    content, _ = xen_image(many(2000))
    position = content.index(b"0\0001\0002\0")
    hole = position & ~0xFFF
    memory = Memory(content.ljust(8 << 20, b"\0"), ((hole, hole + 0x1000),))
    with pytest.raises(Undecidable) as caught:
        embedded.load_memory("dump", memory.read, START, START + (8 << 20))
    assert str(caught.value) == ("dump: Xen's embedded symbol table is not in its memory; give xen-syms with --symbols")


def test_a_table_across_two_reads() -> None:
    content, _ = xen_image(many(2000), text=bytes((1 << 20) - 0x7000))
    found = embedded.find(content)
    assert found is not None
    assert found.start < 1 << 20 < found.end
    memory = Memory(content.ljust(4 << 20, b"\0"))
    assert embedded.load_memory("dump", memory.read, START, START + (4 << 20)).address("function_1999") == (
        START + 16 * 1999
    )


def test_the_note_behind_the_last_read() -> None:
    table = embedded_table(many(2000))
    parts = sections(rodata=bytes((1 << 20) - 0x1000 - len(table) - 8) + table + bytes(0x3000))
    memory = Memory(image(parts).ljust(4 << 20, b"\0"))
    assert parts[2].address > START + (1 << 20)
    found = embedded.load_memory("dump", memory.read, START, START + (4 << 20))
    assert (found.build_id, found.note_address) == (BUILD_ID, parts[2].address)


def test_what_the_reader_says_is_not_swallowed() -> None:
    def read(address: int, size: int) -> bytes:
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        embedded.load_memory("live", read, START, START + 4096)


def test_the_note_need_not_be_there() -> None:
    parts = sections(rodata=embedded_table(TEXT_ENTRIES), note=build_id_note(b"")[:-20].ljust(16, b"\0"))
    memory = Memory(image(parts).ljust(1 << 20, b"\0"))
    table = embedded.load_memory("dump", memory.read, START, START + (1 << 20))
    assert (table.build_id, table.note_address) == (None, None)
