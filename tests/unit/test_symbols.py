"""Symbol tables from ELF files and maps: names to addresses and back, and what is refused.

More than 400 lines: each promise is made for every kind of symbols.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines.elfwriter import (
    ABS,
    BUILD_ID,
    LOCAL,
    NOTYPE,
    START,
    VIRT_START,
    WEAK,
    Sym,
    file,
    function,
    sections,
    string_table,
    variable,
    xen_syms,
)
from xen_symbols.absence import Kind, Undecidable, Unreadable
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import Symbol, SymbolAmbiguous, SymbolNotFound, SymbolTable

TEXT, DATA, BSS = START, START + 0x2000, START + 0x3000
END = BSS + 0x1000
SYMBOLS = [
    file("common/kexec.c"),
    function("kexec_reboot", TEXT + 0x100, 0x20, LOCAL),
    variable("crashing_cpu.1", DATA + 0x10, 4, LOCAL),
    file("arch/x86/oprofile/nmi_int.c"),
    function("nmi_callback", TEXT + 0x140, 0x30, LOCAL),
    file("arch/x86/traps.c"),
    variable("nmi_callback", DATA + 0x20, 8, LOCAL),
    file("x86_64/entry.S"),
    Sym("restore_all_guest", TEXT + 0x200, binding=LOCAL),
    file(""),
    Sym("of_no_file", TEXT + 0x280, binding=LOCAL),
    function("set_nmi_callback", TEXT + 0x180, 0x13),
    function("do_nmi_crash", TEXT + 0x1A0, 0x51),
    Sym("_start", TEXT),
    Sym("start", TEXT),
    Sym("_stextentry", TEXT + 0x200),
    Sym("_etext", TEXT + 0xFF0),
    variable("cpu_online_map", BSS + 8, 32, section=".bss"),
    Sym("__note_gnu_build_id_start", START + 0x1040, section=".note.gnu.build-id"),
    Sym("_end", END, section=".bss"),
    Sym("start_pa", 0x200000, section=ABS),
    Sym("weak_hook", TEXT + 0x300, binding=WEAK),
    Sym("elsewhere", binding=WEAK, section=None),
    Sym("undefined", section=None),
]
MAP = f"""\
0x{VIRT_START:x} T __image_base__
0x{TEXT:x} T _start
0x{TEXT:x} T start
0x{TEXT + 0x140:x} t arch/x86/oprofile/nmi_int.c#nmi_callback
0x{TEXT + 0x1A0:x} T do_nmi_crash
0x{TEXT + 0x200:x} T _etext
0x{DATA + 0x20:x} d arch/x86/traps.c#nmi_callback
0x{END:x} B _end
"""
TEXT_MAP = "".join(line + "\n" for line in MAP.splitlines() if line[19] in "tT")


def loaded(directory: Path, data: bytes) -> SymbolTable:
    path = directory / "symbols"
    path.write_bytes(data)
    return load_symbols(str(path))


def refusal(directory: Path, data: bytes) -> str:
    with pytest.raises(Undecidable) as caught:
        loaded(directory, data)
    message = str(caught.value)
    assert message.startswith(f"{directory}/symbols: ")
    assert "\n" not in message
    return message.removeprefix(f"{directory}/symbols: ")


@pytest.fixture
def elf(tmp_path: Path) -> SymbolTable:
    return loaded(tmp_path, xen_syms(SYMBOLS))


# -- by name ----------------------------------------------------------------------------------


def test_an_elf_says_what_it_is(elf: SymbolTable) -> None:
    assert elf.source == "ELF symbol table"
    assert elf.build_id == BUILD_ID
    assert elf.note_address == START + 0x1040
    assert not elf.text_only


def test_a_local_symbol_has_its_file_and_a_global_one_has_none(elf: SymbolTable) -> None:
    assert elf.find("kexec_reboot") == Symbol(TEXT + 0x100, "kexec_reboot", "common/kexec.c", "t")
    assert elf.find("kexec_reboot").qualified == "common/kexec.c#kexec_reboot"
    assert elf.find("do_nmi_crash") == Symbol(TEXT + 0x1A0, "do_nmi_crash", None, "T")
    assert elf.find("do_nmi_crash").qualified == "do_nmi_crash"
    assert elf.find("of_no_file") == Symbol(TEXT + 0x280, "of_no_file", None, "t")


@pytest.mark.parametrize(
    "name, kind",
    [
        ("restore_all_guest", "t"), ("_etext", "T"), ("crashing_cpu.1", "d"), ("cpu_online_map", "B"),
        ("__note_gnu_build_id_start", "R"), ("start_pa", "A"), ("weak_hook", "W"),
    ],
)  # fmt: skip
def test_kinds_are_nms_letters(elf: SymbolTable, name: str, kind: str) -> None:
    assert elf.find(name).kind == kind


def test_an_ambiguous_name_lists_its_candidates(elf: SymbolTable) -> None:
    with pytest.raises(SymbolAmbiguous) as caught:
        elf.address("nmi_callback")
    assert caught.value.candidates == elf.candidates("nmi_callback")
    assert caught.value.absent.kind is Kind.NO_SYMBOL
    assert str(caught.value) == (
        "nmi_callback is ambiguous: "
        f"arch/x86/oprofile/nmi_int.c#nmi_callback (t) at {TEXT + 0x140:#x}, "
        f"arch/x86/traps.c#nmi_callback (d) at {DATA + 0x20:#x}"
    )
    with pytest.raises(SymbolAmbiguous):
        elf.get("nmi_callback")
    assert elf.has("nmi_callback")


def test_a_kind_or_a_file_says_which(elf: SymbolTable) -> None:
    assert elf.address("nmi_callback", "tT") == TEXT + 0x140
    assert elf.address("nmi_callback", "dDbB") == DATA + 0x20
    for name in ("traps.c#nmi_callback", "x86/traps.c#nmi_callback", "arch/x86/traps.c#nmi_callback"):
        assert elf.address(name) == DATA + 0x20
    for name in ("raps.c#nmi_callback", "common/traps.c#nmi_callback", "kexec.c#nmi_callback"):
        assert elf.get(name) is None


def test_a_path_longer_than_the_recorded_one_fits_too() -> None:
    rows = ListedRows([8, 16], "td", ["traps.c#nmi_callback", "nmi_int.c#nmi_callback"])
    table = SymbolTable("m", ".map", rows, [(0, 32)])
    assert table.address("arch/x86/traps.c#nmi_callback") == 8


def test_gccs_numbered_statics_are_found_by_file(elf: SymbolTable) -> None:
    assert elf.find("kexec.c#crashing_cpu") == Symbol(DATA + 0x10, "crashing_cpu.1", "common/kexec.c", "d")
    assert elf.find("crashing_cpu.1").address == DATA + 0x10
    assert elf.get("crashing_cpu") is None
    assert elf.get("crash.c#crashing_cpu") is None


def test_an_exact_name_goes_before_a_numbered_one() -> None:
    rows = ListedRows([8, 16, 24], "ddd", ["a.c#x.1", "a.c#x", "a.c#x.2"])
    assert SymbolTable("m", ".map", rows, ()).address("a.c#x") == 16
    rows = ListedRows([8, 24, 32, 40], "dddt", ["a.c#x.1", "a.c#x.2", "a.c#x.part.3", "a.c#x.cold"])
    assert [s.address for s in SymbolTable("m", ".map", rows, ()).candidates("a.c#x")] == [8, 24]


@pytest.mark.parametrize(
    ("names", "right"),
    [
        (["crashing_cpu.1"], [0]),  # gcc
        (["one_cpu_only.crashing_cpu"], [0]),  # clang
        (["one_cpu_only.crashing_cpu.2"], [0]),
        (["set_crashing_cpu.crashing_cpu"], [0]),
        (["one_cpu_only.crashing_cpu", "crashing_cpu.1", "kexec_crash.crashing_cpu"], [0, 1, 2]),
        (["one_cpu_only.crashing_cpu", "crashing_cpu"], [1]),
        (["__func__.crashing_cpu", "crashing_cpu.part.0", "crashing_cpu.cold", "one_cpu_only.crashing_cpu.cold"], []),
        (["one_cpu_only.crashing_cpus", "a.b.crashing_cpu", "4.crashing_cpu", ".crashing_cpu", "crashing_cpu."], []),
    ],
)
def test_a_static_of_a_function_by_either_compiler(names: list[str], right: list[int]) -> None:
    rows = ListedRows(range(0, 8 * len(names), 8), "d" * len(names), [f"common/kexec.c#{name}" for name in names])
    table = SymbolTable("m", ".map", rows, [(0, 64)])
    assert [symbol.address // 8 for symbol in table.candidates("kexec.c#crashing_cpu")] == right
    if len(right) > 1:
        with pytest.raises(SymbolAmbiguous, match="ambiguous"):
            table.address("kexec.c#crashing_cpu")
    else:
        assert table.get("kexec.c#crashing_cpu") == (right[0] * 8 if right else None)
    assert table.get("other.c#crashing_cpu") is None


@pytest.mark.parametrize(("count", "size"), [("symbols_num_syms", 0x70), ("symbols_num_addrs", 0x66)])
def test_the_size_of_a_caller_is_what_this_xen_prints(tmp_path: Path, count: str, size: int) -> None:
    """Since 4.21 Xen's own table has where a function ends; before, up to the next symbol."""
    rows = [
        function("kexec_crash", TEXT, 0x66), function("alias", TEXT, 0), function("next", TEXT + 0x70, 0),
        function("last", TEXT + 0x80, 0x20), variable(count, DATA, 4),
        Sym("_start", TEXT), Sym("_end", END, section=".bss"),
    ]  # fmt: skip
    table = loaded(tmp_path, xen_syms(rows))
    assert table.describe_caller(TEXT + 0x64) == f"kexec_crash+0x64/{size:#x}"
    assert table.describe_caller(TEXT + 0x68) == f"kexec_crash+0x68/{size:#x}"  # as Xen has it
    assert table.describe_caller(TEXT + 0x74) == "next+0x4/0x10"
    assert table.describe_caller(TEXT + 0x81) == ("last+0x1/0x20" if size == 0x66 else "last+0x1/0x1f80")


def test_aliases_are_not_ambiguous(tmp_path: Path) -> None:
    table = loaded(tmp_path, xen_syms([file("a.c"), function("f", TEXT, 8, LOCAL), function("f", TEXT, 8)]))
    assert len(table.candidates("f")) == 2
    assert table.address("f") == TEXT


def test_a_missing_name(elf: SymbolTable) -> None:
    with pytest.raises(SymbolNotFound) as caught:
        elf.find("idt_tables")
    assert caught.value.absent.kind is Kind.NO_SYMBOL
    assert str(caught.value) == f"idt_tables is not in the ELF symbol table ({elf.path})"
    with pytest.raises(SymbolNotFound, match=r"; it has do_nmi_crash \(T\)$"):
        elf.find("do_nmi_crash", "d")
    assert elf.get("idt_tables") is None
    assert not elf.has("idt_tables")
    assert not elf.has("do_nmi_crash", "dDbB")


@pytest.mark.parametrize("name", ["", "undefined", "elsewhere", "common/kexec.c", ".text", "#", "kexec.c#", "nmi"])
def test_what_is_not_a_symbol_of_xen_is_not_found(elf: SymbolTable, name: str) -> None:
    assert elf.candidates(name) == ()


def test_names_complete(elf: SymbolTable) -> None:
    assert elf.complete("_st") == ["_start", "_stextentry"]
    assert elf.complete("nmi") == ["nmi_callback"]
    assert elf.complete("common/") == []


def test_a_name_inside_another_in_the_string_table() -> None:
    table, offsets = string_table(["set_nmi_callback", "nmi_callback"])
    assert offsets["nmi_callback"] == offsets["set_nmi_callback"] + 4
    assert table.count(b"nmi_callback") == 1


# -- by address -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, text",
    [
        (TEXT + 0x1A0, "do_nmi_crash"),
        (TEXT + 0x1F1, "do_nmi_crash+0x51"),  # where a call at its very end returns to
        (TEXT, "start"),  # and neither _start nor .text
        (TEXT + 0x201, "restore_all_guest+0x1"),  # not the linker script's _stextentry
        (TEXT + 0xFEF, "weak_hook+0xcef"),
        (TEXT + 0xFF0, "_etext"),
        (TEXT + 0xFF1, hex(TEXT + 0xFF1)),  # after the last instruction
        (TEXT + 0x1000, hex(TEXT + 0x1000)),  # .rodata before its first symbol
        (DATA + 1, hex(DATA + 1)),  # .data before its first symbol
        (DATA + 0x13, "crashing_cpu.1+0x3"),
        (BSS + 9, "cpu_online_map+0x1"),
        (END - 1, "cpu_online_map+0xff7"),
        (END, hex(END)),
        (START - 1, hex(START - 1)),
        (0x200000, "0x200000"),  # absolute symbols are not locations
        (0, "0x0"),
    ],
)
def test_addresses_are_described(elf: SymbolTable, address: int, text: str) -> None:
    assert elf.describe(address) == text


def test_the_extent_of_a_function(elf: SymbolTable) -> None:
    assert elf.extent("do_nmi_crash") == (TEXT + 0x1A0, TEXT + 0x1F1)  # st_size
    assert elf.extent("restore_all_guest") == (TEXT + 0x200, TEXT + 0x280)  # no size: to the next symbol
    assert elf.extent("nmi_callback") == (TEXT + 0x140, TEXT + 0x170)  # a function, not the variable
    assert elf.extent("_etext") == (TEXT + 0xFF0, TEXT + 0x1000)  # to the end of the section
    with pytest.raises(SymbolNotFound):
        elf.extent("cpu_online_map")


def test_sizes(elf: SymbolTable) -> None:
    assert elf.size("cpu_online_map") == 32
    assert elf.size("restore_all_guest") == 0


def test_the_images_content_is_read_by_address(tmp_path: Path) -> None:
    parts = sections(text=bytes(range(256)) * 16)
    table = loaded(tmp_path, xen_syms(SYMBOLS, parts))
    assert table.image is not None
    assert list(table.image.segments) == [(START, START + 0x3000)]
    assert table.image.read(TEXT + 0x1A0, 4) == bytes([0xA0, 0xA1, 0xA2, 0xA3])
    for address, size in ((BSS, 1), (START - 1, 2), (BSS - 1, 2)):
        with pytest.raises(Unreadable) as caught:
            table.image.read(address, size)
        assert caught.value.absent.kind is Kind.NOT_HELD


starts = st.lists(st.integers(0, 0xFFF), min_size=1, max_size=40, unique=True).map(sorted)


@settings(max_examples=60, deadline=None)
@given(starts, st.integers(0, 0xFFF))
def test_lookup_and_extent_agree(tmp_path_factory: pytest.TempPathFactory, places: list[int], probe: int) -> None:
    symbols = [Sym(f"f{place}", TEXT + place, type=NOTYPE) for place in places]
    table = loaded(tmp_path_factory.mktemp("elf"), xen_syms(symbols))
    below = [place for place in places if place <= probe]
    found = table.lookup(TEXT + probe)
    if not below:
        assert found is None
        return
    assert found is not None
    symbol, offset = found
    assert (symbol.name, offset) == (f"f{below[-1]}", probe - below[-1])
    start, end = table.extent(symbol.name)
    assert start + offset == TEXT + probe < end
    assert end == min([TEXT + p for p in places if p > probe], default=TEXT + 0x1000)


# -- maps -------------------------------------------------------------------------------------


def test_a_map(tmp_path: Path) -> None:
    table = loaded(tmp_path, MAP.encode())
    assert table.source == ".map"
    assert table.build_id is None
    assert table.image is None
    assert table.find("traps.c#nmi_callback") == Symbol(DATA + 0x20, "nmi_callback", "arch/x86/traps.c", "d")
    assert table.extent("do_nmi_crash") == (TEXT + 0x1A0, TEXT + 0x200)
    assert table.describe(TEXT + 0x1B0) == "do_nmi_crash+0x10"
    assert table.describe(TEXT + 0x201) == hex(TEXT + 0x201)  # between _etext and the next symbol: nothing
    assert table.describe(VIRT_START) == hex(VIRT_START)  # before _start
    assert table.describe(END - 1) == f"nmi_callback+{END - 1 - DATA - 0x20:#x}"
    assert table.describe(END) == hex(END)


def test_a_map_as_nm_writes_it(tmp_path: Path) -> None:
    text = f"{TEXT:016x} T _start\n{TEXT + 16:016x} t idle_loop\n{DATA:016x} D __note_gnu_build_id_start\n"
    table = loaded(tmp_path, text.encode())
    assert table.find("idle_loop") == Symbol(TEXT + 16, "idle_loop", None, "t")
    assert table.note_address == DATA


def test_a_map_of_text_only_leaves_a_variable_unknown(tmp_path: Path) -> None:
    table = loaded(tmp_path, TEXT_MAP.encode())
    assert table.text_only
    assert table.address("do_nmi_crash") == TEXT + 0x1A0
    assert table.get("nmi_crash", "tT") is None
    assert not table.has("nmi_crash", "tT")
    for ask in (table.get, table.has, table.address):
        with pytest.raises(SymbolNotFound, match=r"idt_tables is not in the \.map .* which holds text symbols only$"):
            ask("idt_tables", "dDbB")
        with pytest.raises(
            SymbolNotFound, match=r"text symbols only; it has arch/x86/oprofile/nmi_int\.c#nmi_callback"
        ):
            ask("traps.c#nmi_callback")


def test_gzip_is_undone(tmp_path: Path) -> None:
    assert loaded(tmp_path, gzip.compress(MAP.encode(), mtime=0)).address("do_nmi_crash") == TEXT + 0x1A0
    table = loaded(tmp_path, gzip.compress(xen_syms(SYMBOLS), mtime=0))
    assert table.build_id == BUILD_ID
    assert table.image is not None
    assert table.image.read(TEXT, 1) == b"\0"


# -- refusals ---------------------------------------------------------------------------------

WANTED = "--symbols takes xen-syms, xen.efi, the .map of either, or Xen's image"
NO_MAP = f"is not `address kind name`, so this is neither an ELF file nor a .map; {WANTED}"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", f"empty; {WANTED}"),
        (b"#!/bin/sh\n", f"line 1 {NO_MAP}"),
        (b"ffff T a\nfff1 T\n", f"line 2 {NO_MAP}"),
        (b"ffff T a\x1b[2J\n", f"line 1 {NO_MAP}"),
        (b"1" + b"0" * 16 + b" T a\n", f"line 1 {NO_MAP}"),
        (bytes(100), f"neither an ELF file nor a .map; {WANTED}"),
        (b"KDUMP   " + bytes(100), f"a kdump; {WANTED}"),
        (b"\x04\x22\x4d\x18", f"compressed by LZ4; unpack it first (unlz4); {WANTED}"),
        (gzip.compress(b"\xfd7zXZ\0", mtime=0), f"compressed by xz; unpack it first (unxz); {WANTED}"),
        (b"\x7fELF", "ELF header: the file ends at 0x4, 16 bytes are wanted at offset 0x0; "
                    "the file is truncated or damaged"),
        (b"\x7fELF\x02\x02" + bytes(80), "not a little-endian ELF file; Xen on x86 is one"),
        (b"\x1f\x8b" + bytes(20), "bad gzip data (Error -3 while decompressing data: unknown compression method); "
                                 "fetch the file again"),
        (gzip.compress(MAP.encode(), mtime=0)[:-9], "truncated gzip data; fetch the file again"),
        (gzip.compress(b"", mtime=0), "empty when decompressed; fetch the file again"),
        (xen_syms(SYMBOLS, machine=183), "for ELF machine 183, not x86-64; give the symbols of an x86 Xen"),
        (xen_syms(SYMBOLS, kind=4), "a core file, not symbols: give it as the target"),
        (xen_syms(SYMBOLS, kind=1), "an object file; give xen-syms, its .map, or Xen's image"),
        (xen_syms([]), "no ELF symbol table, and none embedded by Xen's build; give xen-syms or its .map"),
    ],
)  # fmt: skip
def test_what_is_not_a_symbol_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    assert refusal(tmp_path, data) == message


def test_a_file_that_is_missing_unreadable_or_not_a_file(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "a directory")):
        with pytest.raises(Undecidable) as caught:
            load_symbols(str(path))
        assert str(caught.value) == f"{path}: {why}; {WANTED}"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(Undecidable, match=f"^{fifo}: not a regular file; "):
        load_symbols(str(fifo))


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, gzip.compress(bytes(129 << 20), 1, mtime=0)) == (
        "more than 128 MB when decompressed; fetch the file again"
    )


def questions(table: SymbolTable) -> None:
    """Ask everything; only a typed absence may result."""
    for ask in (table.address, table.extent, table.get, table.has, table.candidates, table.size):
        for name in ("do_nmi_crash", "traps.c#nmi_callback", "kexec.c#crashing_cpu", "no"):
            try:
                ask(name)
            except Unreadable as error:
                assert error.absent.kind is Kind.NO_SYMBOL
    for address in (0, TEXT, TEXT + 0x1A3, DATA + 0x21, (1 << 64) - 1):
        assert table.describe(address)
    table.complete("n")


def test_truncated_at_any_byte(tmp_path: Path) -> None:
    whole = xen_syms(SYMBOLS)
    # All of the headers and tables; the middle of the image in steps.
    cuts = [*range(1, 0x200), *range(0x200, 0x4000, 0x155), *range(0x4000, len(whole))]
    refused = 0
    for cut in cuts:
        try:
            questions(loaded(tmp_path, whole[:cut]))
        except Undecidable as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused == len(cuts)


ELF = xen_syms(SYMBOLS)
INTERESTING = [*range(0x10, 0x40), *range(0x40, 0x40 + 2 * 56), *range(0x4000, len(ELF))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(INTERESTING), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_elf_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(ELF)
    for position, value in changes:
        data[position] = value
    try:
        questions(loaded(tmp_path_factory.getbasetemp(), bytes(data)))
    except Undecidable as error:
        assert "\n" not in str(error)


def test_impossible_counts(tmp_path: Path) -> None:
    data = bytearray(ELF)
    data[56:58] = (60000).to_bytes(2, "little")
    assert refusal(tmp_path, bytes(data)) == ("corrupt: 60000 program and 8 section headers; an image of Xen has few")
