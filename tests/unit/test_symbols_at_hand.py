"""The symbol files that people have: compressed, from another system, of either link; each with the right answer."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cramjam import zstd

from tests.machines import elfwriter, pewriter, syntheticxen
from tests.machines.elfwriter import ABS, LOCAL, START, VIRT_START, Sym, file, function, variable, xen_syms
from tests.machines.pewriter import GUID, xen_efi
from tests.machines.syntheticxen import CrashedXen
from xen_symbols import evaluate, open_dump
from xen_symbols.absence import Undecidable
from xen_symbols.formats import compression
from xen_symbols.report.model import Verdict
from xen_symbols.symbols.links import Link, link_of
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable

DATA = START + 0x600000
PARTS = [elfwriter.Section(".data", START, bytes(0x600000), flags=elfwriter.ALLOC | elfwriter.WRITE)]
SYMBOLS = [
    file("common/kexec.c"),  # 14 characters: nothing is cut
    function("one", START + 0x100, binding=LOCAL),
    variable("crashing_cpu.1", DATA + 0x10, 4, LOCAL),
    file("arch/x86/oprofile/nmi_int.c"),  # in the string table
    function("nmi_callback", START + 0x140, binding=LOCAL),
    file("arch/x86/traps.c"),  # cut
    variable("nmi_callback", DATA + 0x20, 8, LOCAL),
    variable("idle_pg_table", DATA + 0x800, 8),
    Sym("_start", START),
    function("do_nmi_crash", START + 0x1A0),
    Sym("__note_gnu_build_id_start", START + 0x200000, section=".buildid"),
    Sym("__base_relocs_start", DATA + 0x900, section=".data"),
    Sym("__base_relocs_end", DATA + 0xA00, section=".data"),
    variable("cpu_online_map", DATA + 0x1008, section=".bss"),
    Sym("_end", DATA + 0x2000, section=".bss"),
    Sym("VIRT_START", VIRT_START, section=ABS),
    Sym("undefined", section=None),
]
SYMS = xen_syms(SYMBOLS, pewriter.sections())
EFI = xen_efi(SYMBOLS)
MAP = f"{START:x} T _start\n{START + 0x1A0:x} T do_nmi_crash\n{DATA + 0x800:x} D idle_pg_table\n".encode()


def loaded(folder: Path, data: bytes) -> SymbolTable:
    path = folder / "symbols"
    path.write_bytes(data)
    return load_symbols(str(path))


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "as it is": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".bz2": bz2.compress,
    ".zst": lambda data: bytes(zstd.compress(data)),
}
FILES = {
    "xen-syms": (SYMS, "ELF symbol table", GUID),
    "xen.efi": (EFI, "COFF symbol table", GUID),
    "map": (MAP, ".map", None),
    "map with CRLF": (MAP.replace(b"\n", b"\r\n"), ".map", None),
    "map by an editor that marks UTF-8": (b"\xef\xbb\xbf" + MAP, ".map", None),
    "map with blanks": (MAP.replace(b"\n", b" \t\n\r\n"), ".map", None),
}


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("name", FILES)
def test_what_holds_symbols_is_read(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    data, source, build_id = FILES[name]
    table = loaded(tmp_path, pack(data))
    assert (table.source, table.build_id) == (source, build_id)
    assert table.address("do_nmi_crash") == START + 0x1A0
    assert table.address("idle_pg_table") == DATA + 0x800
    assert table.describe(START + 0x1A3) == "do_nmi_crash+0x3"
    assert not any(symbol.name.endswith(("\r", " ")) for symbol in table.candidates("do_nmi_crash"))


@pytest.mark.parametrize(
    ("packed", "name"),
    [(gzip.compress, "gzip"), (lzma.compress, "xz"), (bz2.compress, "bzip2"), (PACKED[".zst"], "zstd")],
)
def test_what_broke_off_or_is_too_long_is_said(
    tmp_path: Path, packed: Callable[[bytes], bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(SYMS)
    with pytest.raises(Undecidable, match=rf"symbols: (truncated|bad) {name} data.*; fetch the file again$"):
        loaded(tmp_path, whole[:-20])
    with pytest.raises(Undecidable, match=rf"symbols: bad {name} data \(.*\); fetch the file again$"):
        loaded(tmp_path, whole[:12] + bytes(64))
    with pytest.raises(Undecidable, match="symbols: empty when decompressed; fetch the file again$"):
        loaded(tmp_path, packed(b""))
    monkeypatch.setattr(compression, "FILE_MAX", len(SYMS) - 1)
    with pytest.raises(Undecidable, match="; fetch the file again$"):
        loaded(tmp_path, whole)


@pytest.mark.parametrize(
    ("pack", "module", "says"),
    [
        (PACKED[".zst"], "cramjam", "compressed with zstd; pip install 'xencrash[dumps]' (cramjam)"),
        (lzma.compress, "lzma", "compressed with xz; install the Python package lzma"),
        (bz2.compress, "bz2", "compressed with bzip2; install the Python package bz2"),
    ],
)
def test_the_package_that_is_lacking_is_named(
    tmp_path: Path, pack: Callable[[bytes], bytes], module: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pack(MAP)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Undecidable) as error:
        loaded(tmp_path, data)
    assert str(error.value) == f"{tmp_path}/symbols: {says}"


# -- xen.efi ----------------------------------------------------------------------------------


def test_a_pe_image_has_what_xen_syms_has(tmp_path: Path) -> None:
    def all_of(table: SymbolTable) -> set[tuple[int, str, str | None, str]]:
        symbols = map(table.rows.symbol, table.rows.placed())
        return {(s.address, s.name, s.file and pewriter.recorded_file(s.file), s.kind) for s in symbols}

    table = loaded(tmp_path, EFI)
    assert table.image is not None and table.image.read(START + 0x200000 + 28, 4) == b"RSDS"
    assert all_of(table) == all_of(loaded(tmp_path, SYMS))
    assert len(all_of(table)) == 12  # neither absolute nor undefined ones, nor the sections
    assert (table.build_id, table.note_address) == (GUID, START + 0x200000)


def test_a_path_that_the_link_cut_is_the_file(tmp_path: Path) -> None:
    table = loaded(tmp_path, EFI)
    for name in ("traps.c#nmi_callback", "x86/traps.c#nmi_callback", "arch/x86/traps.c#nmi_callback"):
        assert table.find(name).address == DATA + 0x20
        assert table.find(name).file == "arch/x86/traps"
    assert table.find("nmi_int.c#nmi_callback").address == START + 0x140
    assert table.find("kexec.c#crashing_cpu").address == DATA + 0x10
    for name in ("raps.c#nmi_callback", "trapsxxxx.c#nmi_callback", "kexec.c#nmi_callback", "xtraps.c#nmi_callback"):
        assert table.get(name) is None


def test_a_stripped_pe_image_has_the_table_that_xen_carries(tmp_path: Path) -> None:
    carried = elfwriter.embedded_table(
        [(0x200000, "T_start"), (0x2001A0, "Tdo_nmi_crash"), (0x800800, "Didle_pg_table")]
    )
    table = loaded(tmp_path, xen_efi([], pewriter.sections(carried)))
    assert (table.source, table.build_id, table.note_address) == ("table embedded in Xen", GUID, START + 0x200000)
    assert table.address("idle_pg_table") == DATA + 0x800


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"MZ" + bytes(400), "an MS-DOS program, not a PE image; give xen-syms, xen.efi, or the .map of either"),
        (xen_efi(SYMBOLS, machine=0xAA64), "for PE machine 0xaa64, not x86-64; give the symbols of an x86 Xen"),
        (xen_efi(SYMBOLS, magic=0x10B), "corrupt: its optional header is not that of a 64-bit PE image"),
        (xen_efi([]), "no ELF symbol table, and none embedded by Xen's build; give xen-syms or its .map"),
        (EFI[:0x86] + b"\xff\xff" + EFI[0x88:], "corrupt: 65535 sections and 30 symbols; an image of Xen has fewer"),
        (
            EFI[:0x1000],
            "the file ends at 0x1000, 540 bytes are wanted at offset 0x2480; the file is truncated or damaged",
        ),
        (b"MZ", "the file ends at 0x2, 4 bytes are wanted at offset 0x3c; the file is truncated or damaged"),
    ],
)
def test_what_is_no_xen_efi_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(Undecidable) as error:
        loaded(tmp_path, data)
    assert str(error.value) == f"{tmp_path}/symbols: {says}"


def test_a_damaged_pe_image_is_read_or_refused(tmp_path: Path) -> None:
    for position in [*range(0x80, 0x260, 3), *range(len(EFI) - 0x300, len(EFI), 5)]:
        for value in (0, 0xFF):
            damaged = bytearray(EFI)
            damaged[position] = value
            try:
                table = loaded(tmp_path, bytes(damaged))
                table.get("kexec.c#crashing_cpu")
                table.describe(START + 0x1A3)
            except Undecidable as error:
                assert "\n" not in str(error)


# -- the two links ----------------------------------------------------------------------------


def with_relocations(size: int) -> SymbolTable:
    ends = {"__base_relocs_start": 0, "__base_relocs_end": size}
    moved = [s._replace(value=DATA + 0x900 + ends[s.name]) if s.name in ends else s for s in SYMBOLS]
    return loaded_bytes(xen_syms(moved, pewriter.sections()))


def loaded_bytes(data: bytes) -> SymbolTable:
    from xen_symbols.formats.content import Held
    from xen_symbols.symbols import elf

    return elf.read_symbols("file", Held(data))


@pytest.mark.parametrize(("size", "link"), [(0, Link.GZ), (8, Link.GZ), (9, Link.EFI), (0x16F0, Link.EFI)])
def test_only_xen_efi_has_base_relocations(size: int, link: Link) -> None:
    assert link_of(with_relocations(size)) is link


def test_a_map_of_functions_shows_no_link(tmp_path: Path) -> None:
    assert link_of(loaded(tmp_path, MAP)) is None
    assert link_of(loaded(tmp_path, EFI)) is Link.EFI


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[Link, CrashedXen]:
    """One that booted each link."""
    return {link: CrashedXen(tmp_path_factory.mktemp("machine"), efi=link is Link.EFI) for link in Link}


@pytest.mark.parametrize("booted", Link, ids=lambda link: link.value)
def test_the_symbols_of_the_link_that_booted(machines: dict[Link, CrashedXen], booted: Link) -> None:
    machine = machines[booted]
    for symbols in (None, machine.symbols):
        memory = open_dump(machine.elf(), symbols)
        assert memory.root == machine.xen.root
        assert memory.build_id == (GUID if booted is Link.EFI else syntheticxen.BUILD_ID)
        assert evaluate(memory).verdict is Verdict.PASS


@pytest.mark.parametrize("how", ["map", "xen-syms", "xen.efi"])
@pytest.mark.parametrize("build_id", [True, False], ids=["build-id", "without"])
@pytest.mark.parametrize("booted", Link, ids=lambda link: link.value)
def test_the_symbols_of_the_other_link(
    machines: dict[Link, CrashedXen], tmp_path: Path, booted: Link, build_id: bool, how: str
) -> None:
    """Without a build-id it is shown by the table that Xen carries."""
    machine, other = machines[booted], machines[booted.other]
    symbols = other.symbols
    if how != "map":
        symbols = tmp_path / how
        rows = [Sym(name, address, section=".data") for name, (address, _) in other.xen.symbols.items()]
        symbols.write_bytes(xen_syms(rows, PARTS) if how == "xen-syms" else xen_efi(rows, PARTS))
    note = machine.xen.symbols["__note_gnu_build_id_start"][0] - syntheticxen.VIRT_START + syntheticxen.PHYS_START
    kept = machine.xen.content[note]
    if not build_id:
        machine.xen.content[note] = bytes(len(kept))
    try:
        path = machine.elf()
    finally:
        machine.xen.content[note] = kept
    with pytest.raises(Undecidable) as error:
        open_dump(path, symbols)
    give = {Link.GZ: "its xen-syms or xen-syms.map", Link.EFI: "its xen.efi, xen.efi.elf or xen.efi.map"}[booted]
    assert str(error.value) == (
        f"{symbols} has the symbols of the other link, {booted.other.value}: the Xen in {path} was booted from "
        f"{booted.value}, whose variables have other addresses; give {give} with --symbols"
    )
