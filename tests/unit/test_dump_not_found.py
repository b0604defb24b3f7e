"""Dumps in which Xen is not found: one line says why not and what to do, and soon."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.machines import dumpwriter as writer
from tests.machines import elfwriter
from tests.machines.dumpwriter import PAGE
from tests.machines.syntheticxen import BUILD_ID, PHYS_START, RANGES, VIRT_START, CrashedXen
from xen_symbols import open_dump
from xen_symbols.absence import Undecidable
from xen_symbols.formats.content import File
from xen_symbols.symbols import embedded
from xencrash.cli import main

LZO = "compressed with lzo; pip install 'xencrash[dumps]' (lzallright)"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> CrashedXen:
    return CrashedXen(tmp_path_factory.mktemp("machine"))


def refusal(path: Path, *words: str | Path) -> str:
    """The message for the dump without symbols, or with those given."""
    with pytest.raises(Undecidable) as caught:
        open_dump(path, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_machine_is_found_without_damage(machine: CrashedXen) -> None:
    for symbols in (None, machine.symbols):
        assert open_dump(machine.elf(), symbols).root == machine.xen.root
        assert open_dump(machine.kdump(), symbols).root == machine.xen.root


def test_the_header_names_a_decompressor_that_is_missing(
    machine: CrashedXen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = machine.kdump(status=2, compression=2, compress=lambda page: b"anything")
    monkeypatch.setitem(sys.modules, "lzallright", None)
    for words in ([], ["--symbols", str(machine.symbols)]):
        assert main(["check", str(path), *words]) == 3
        assert capsys.readouterr().err == f"xencrash: {path}: {LZO}\n"


def test_a_page_names_a_decompressor_that_is_missing(machine: CrashedXen, monkeypatch: pytest.MonkeyPatch) -> None:
    path = machine.kdump(compression=2, compress=lambda page: b"anything")
    monkeypatch.setitem(sys.modules, "lzallright", None)
    page = machine.xen.root & -PAGE
    why = f"what xen_phys_start in the crash info note points to cannot be read (physical {page:#x}: {LZO})"
    assert refusal(path) == (
        f"no symbol table of Xen's own was found in {path}: {why}; "
        "give its xen-syms with --symbols, or take the dump again"
    )
    assert refusal(path, machine.symbols) == (
        f"no Xen of {machine.symbols} was found in {path}: {why}; take the dump again"
    )


def test_memory_that_the_notes_name_and_the_dump_lacks(machine: CrashedXen) -> None:
    path = machine.elf(RANGES[1:])
    page = f"{machine.xen.root >> 12:#x}"
    why = f"what xen_phys_start in the crash info note points to cannot be read (physical {page}"
    assert why in refusal(path)
    assert why in refusal(path, machine.symbols)


def test_the_page_of_the_symbols_alone_is_missing(machine: CrashedXen) -> None:
    path = machine.kdump(excluded=[(PHYS_START + 0x300000) // PAGE])
    left_out = f"(physical {PHYS_START + 0x300000:#x}: the page was left out when the dump was written)"
    assert f"{left_out}; give its xen-syms with --symbols" in refusal(path)
    assert open_dump(path, machine.symbols).root == machine.xen.root


def test_bitmaps_that_are_elsewhere(machine: CrashedXen) -> None:
    """One sub-header block too many: other pages are present, with other bytes."""
    path = machine.kdump()
    data = bytearray(path.read_bytes())
    (blocks,) = struct.unpack_from("<I", data, 0x1B0)
    struct.pack_into("<II", data, 0x1B0, blocks + 1, struct.unpack_from("<I", data, 0x1B4)[0] - 2)
    struct.pack_into("<I", data, 0x1A8, 8)  # or it is refused as truncated
    path.write_bytes(data)
    for symbols in ([], [machine.symbols]):
        said = refusal(path, *symbols)
        assert "is it Xen" not in said and f"{path}: " in said


def test_section_header_0_is_missing(machine: CrashedXen) -> None:
    path = machine.elf()
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 56, 0xFFFF)
    path.write_bytes(data)
    assert refusal(path) == (
        f"{path}: ELF header +0x28: section header 0 would count the program headers, and there is none; "
        "the file is damaged"
    )


@pytest.mark.parametrize("value", ["", "none", "-8", "1" * 40, "ffff", "800000000000"])
def test_an_invalid_address_in_vmcoreinfo(machine: CrashedXen, value: str) -> None:
    """The CPUs' own page tables show the same Xen."""
    notes = machine.xen.notes() + writer.note("VMCOREINFO_XEN", 0, f"SYMBOL(pgd_l4)={value}\n".encode())
    assert open_dump(machine.elf(notes=notes)).root == machine.xen.root


class Counted:
    """What a dump's file is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = self.bytes = 0
        read = File.read

        def counting(file: File, offset: int, size: int) -> bytes:
            self.reads += 1
            self.bytes += size
            return read(file, offset, size)

        monkeypatch.setattr(File, "read", counting)


def of_qemu(path: Path, registers: list[dict[str, int]], content: writer.Content = MappingProxyType({})) -> Path:
    """A dump of 8 MiB with QEMU's notes of these CPUs."""
    with path.open("wb") as file:
        notes = writer.qemu_notes(map(writer.qemu_cpu, registers), registers)
        writer.write_elf(file, [(0, 8 << 20)], content, notes)
    return path


def linux(count: int) -> list[dict[str, int]]:
    """CPUs in Linux, each with its own page tables, which map nothing where Xen would be."""
    return [{"rip": 0xFFFFFFFF81000000, "cr0": 0x80050033, "cr3": 0x100000 + PAGE * cpu} for cpu in range(count)]


def test_a_linux_of_many_cpus_costs_a_few_reads_of_each(
    machine: CrashedXen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_qemu(tmp_path / "linux", linux(255))
    for symbols in ([], [machine.symbols]):
        counted = Counted(monkeypatch)
        assert "is it Xen" in refusal(path, *symbols)
        assert counted.reads < 10 * 255


def test_cpus_that_share_page_tables_cost_as_much_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of notes may belong to the same few CPUs."""
    costs = []
    for count in (1, 20_000):
        path = of_qemu(tmp_path / f"{count}", linux(1) * count)
        counted = Counted(monkeypatch)
        refusal(path)
        costs.append(counted.reads)
    assert costs[0] == costs[1]


@pytest.mark.parametrize("step", [1, 2])
def test_page_tables_that_map_everything_are_bounded(
    step: int, machine: CrashedXen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, and every other page, on 256 CPUs whose tables differ."""
    tables = [0x200000 + PAGE * level for level in range(3)]
    entries = [struct.pack("<512Q", *[entry | 1] * 512) for entry in tables]
    pages = struct.pack("<512Q", *(0x10000 + PAGE * (n % 64) | (n % step == 0) for n in range(512)))
    content = {0x100000 + PAGE * cpu: entries[0] for cpu in range(256)}
    content |= dict(zip(tables, [*entries[1:], pages], strict=True))
    path = of_qemu(tmp_path / "hostile", linux(256), content)
    for symbols in ([], [machine.symbols]):
        counted = Counted(monkeypatch)
        assert "is it Xen" in refusal(path, *symbols)
        assert counted.bytes < 300 << 20


def test_a_table_across_two_reads_is_found(machine: CrashedXen) -> None:
    """The image is read a MiB at a time; its table's digits may be in one, the rest in the next."""
    xen = machine.xen
    place = PHYS_START + 0x300000
    table = xen.content.pop(place)
    digits = table.index(embedded.DIGITS)
    try:
        for before in (digits + 4, digits + 100, len(table) - 4):
            at = PHYS_START + (3 << 20) - (before & ~3)
            xen.content[at] = table
            assert open_dump(machine.elf()).root == xen.root
            del xen.content[at]
    finally:
        xen.content[place] = table


def test_a_mismatch_that_cannot_be_allowed(machine: CrashedXen, capsys: pytest.CaptureFixture[str]) -> None:
    """Symbols of a build whose page tables are elsewhere: they find no Xen, allowed or not."""
    other = machine.folder / "other"
    at = VIRT_START + 0x700000
    syms = [elfwriter.variable("idle_pg_table", at)]
    other.write_bytes(elfwriter.xen_syms(syms))
    path = machine.elf()
    theirs, ours = elfwriter.BUILD_ID.hex(), BUILD_ID.hex()
    said = f"the symbols are of another build: {other} has build-id {theirs}, the Xen in {path} has {ours}"
    why = " (its page tables cannot be found with them, so a mismatch cannot be allowed)"
    for words, more in ([], ""), (["--allow-build-id-mismatch"], why):
        assert main(["check", str(path), "--symbols", str(other), *words]) == 3
        assert capsys.readouterr().err == f"xencrash: {said}{more}; give its own xen-syms with --symbols\n"


def test_a_crash_that_left_no_info_is_searched_for(machine: CrashedXen) -> None:
    """Neither the info nor any CPU's page tables show Xen; its memory does, with symbols and without."""
    nowhere = [{"rip": 0xFFFF82D040200000, "cr0": 0x80050033, "cr3": 0x123000}] * 2
    notes = writer.xen_notes(nowhere, bytes(80), machine.pgd)
    for symbols in ([], [machine.symbols]):
        assert open_dump(machine.elf(notes=notes), *symbols).root == machine.xen.root
