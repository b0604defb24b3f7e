"""Xen in a raw image of memory, with no symbols: found by its own table and judged as with symbols, or one line."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.machines import elfwriter, syntheticxen
from tests.machines.syntheticxen import HEAP, PHYS_START, TRAMPOLINE, VIRT_START, SyntheticXen
from xen_symbols import evaluate, open_dump
from xen_symbols.absence import Absent, Undecidable
from xen_symbols.symbols import embedded
from xen_symbols.symbols.table import CARRIED
from xen_symbols.targets import PhysicalCpu, Target, dump
from xen_symbols.x86 import paging
from xen_symbols.xen import search
from xen_symbols.xen.images import carried_symbols
from xen_symbols.xen.locate import locate
from xencrash.cli import main

GB = 1 << 30
TABLE = 0x300000  # from XEN_VIRT_START
OTHER = 0x2F800000
OTHER_ID = bytes(range(1, 21))


def table(xen: SyntheticXen) -> bytes:
    rows = sorted((address - VIRT_START, kind + name) for name, (address, kind) in xen.symbols.items())
    return elfwriter.embedded_table(rows)


def made(monkeypatch: pytest.MonkeyPatch, start: int = PHYS_START, build_id: bytes | None = None) -> SyntheticXen:
    """A Xen with its table in its image, at `start`."""
    with monkeypatch.context() as patch:
        patch.setattr(syntheticxen, "PHYS_START", start)
        patch.setattr(syntheticxen, "HEAP", HEAP + (GB if start != PHYS_START else 0))
        patch.setattr(syntheticxen, "BUILD_ID", build_id or syntheticxen.BUILD_ID)
        xen = SyntheticXen(2)
    xen.content[start + TABLE] = table(xen)
    return xen


def image(path: Path, *xens: SyntheticXen, size: int = 4 * GB, base: int = 0) -> Path:
    """The memory of all from `base` on; a later one overwrites an earlier one."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
        for xen in xens:
            for address, data in xen.content.items():
                if address >= base:
                    file.seek(address - base)
                    file.write(data)
    return path


def poke(xen: SyntheticXen, name: str, data: bytes, start: int = PHYS_START) -> None:
    xen.content[xen.symbols[name][0] - VIRT_START + start] = data


@pytest.mark.parametrize("base", [0, 0x10000, 0x1001])
def test_xen_is_found_and_judged_as_with_symbols(base: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xen = made(monkeypatch)
    path = image(tmp_path / "ram", xen, base=base)
    (tmp_path / "map").write_text(xen.map_file())
    found, given = open_dump(path, base=base), open_dump(path, tmp_path / "map", base=base)
    assert (found.root, found.build_id) == (given.root, given.build_id) == (xen.root, syntheticxen.BUILD_ID)
    ours, theirs = evaluate(found).to_json(), evaluate(given).to_json()
    assert (ours["symbols"]["source"], ours["symbols"]["match"]) == (CARRIED, True)
    assert ours["verdict"] == theirs["verdict"] == "pass"
    assert ours["cpus"] == theirs["cpus"]
    assert [(f["check"], f["cpu"], f["verdict"]) for f in ours["findings"]] == [
        (f["check"], f["cpu"], f["verdict"]) for f in theirs["findings"]
    ]


def test_a_build_without_an_id_is_found_by_its_page_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xen = made(monkeypatch)
    poke(xen, "__note_gnu_build_id_start", bytes(16))
    found = open_dump(image(tmp_path / "ram", xen), base=0)
    assert (found.root, found.found_by) == (xen.root, "its page tables in physical memory")
    assert isinstance(found.build_id, Absent)


def test_without_a_xen_one_line_and_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(range(256)) * 4096)
    assert main(["check", "--base", "0", str(path)]) == 3
    assert capsys.readouterr().err == (
        f"xencrash: no symbol table of Xen's own was found in {path}: is it Xen, with physical 0x0 as its first byte "
        "(--base)? If so, give its xen-syms with --symbols\n"
    )


def test_a_wrong_base_is_questioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xen = made(monkeypatch)
    path = image(tmp_path / "ram", xen)
    (tmp_path / "map").write_text(xen.map_file())
    for symbols in (None, tmp_path / "map"):
        with pytest.raises(Undecidable, match=r"is it Xen, with physical 0x100000 as its first byte \(--base\)"):
            open_dump(path, symbols, base=1 << 20)


class Live(Target):
    """A machine whose memory is a file's, and whose CPUs are these."""

    kind, format, location = "live", "test", "gdb:test"

    def __init__(self, path: Path, cpus: Sequence[PhysicalCpu]) -> None:
        self._dump = dump.open_dump(str(path), base=0)
        self.read_physical, self.physical_ranges = self._dump.read_physical, self._dump.physical_ranges
        self.notes = self._dump.notes
        self._cpus = cpus

    def cpus(self) -> Sequence[PhysicalCpu]:
        return self._cpus


def test_a_live_machine_shows_its_symbols_by_a_cpu_that_runs_xen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by one in a guest, or one without paging; and its memory is not searched."""
    xen = made(monkeypatch)
    path = image(tmp_path / "ram", xen)
    guest = PhysicalCpu(0, {"cr0": paging.CR0_PG, "cr3": xen.root, "rip": 0x1000}, guest_mode=True)
    linux = PhysicalCpu(1, {"cr0": paging.CR0_PG, "cr3": 0x5000, "rip": 0xFFFFFFFF81000000})
    idle = PhysicalCpu(2, {"cr0": paging.CR0_PG, "cr3": xen.root, "rip": VIRT_START + 0x200000})
    live = Live(path, [guest, linux, idle])
    found = locate(live, carried_symbols(live))
    assert (found.root, found.build_id) == (xen.root, syntheticxen.BUILD_ID)
    lost = linux._replace(registers=linux.registers | {"cr3": 1 << 40})
    with pytest.raises(Undecidable, match=r"^no symbol table of Xen's own was found in gdb:test: is it Xen\? If so"):
        carried_symbols(Live(path, [guest, linux, lost]))


def test_a_cpu_that_runs_xen_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other CPUs' page tables map only a part of the image, as a PV guest's do with XPTI."""
    xen = made(monkeypatch)
    others = []
    for number in range(64):
        root = 0x10000000 + 0x4000 * number
        for level, shift in enumerate((39, 30, 21)):
            entry = struct.pack("<Q", root + 0x1000 * (level + 1) | 1)
            xen.content[root + 0x1000 * level + 8 * (VIRT_START + 0x200000 >> shift & 511)] = entry
        xen.content[root + 0x3000] = struct.pack("<Q", PHYS_START + 0x200000 | 1)
        others.append(PhysicalCpu(number, {"cr0": paging.CR0_PG, "cr3": root, "rip": 0x401000}))
    idle = PhysicalCpu(64, {"cr0": paging.CR0_PG, "cr3": xen.root, "rip": VIRT_START + 0x200000})
    live = Live(image(tmp_path / "ram", xen), [*others, idle])
    assert locate(live, carried_symbols(live)).root == xen.root


def test_an_image_that_never_ran_is_not_a_xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table like Linux's, or a file's: no page tables map it."""
    xen = made(monkeypatch)
    xen.content = {PHYS_START + TABLE: xen.content[PHYS_START + TABLE]}
    with pytest.raises(Undecidable, match="no symbol table of Xen's own was found"):
        open_dump(image(tmp_path / "ram", xen), base=0)


def test_the_copy_that_xen_left_when_it_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = made(monkeypatch, OTHER)
    poke(left, "xen_phys_start", struct.pack("<Q", PHYS_START), OTHER)
    xen = made(monkeypatch)
    assert open_dump(image(tmp_path / "ram", left, xen), base=0).root == xen.root
    (tmp_path / "map").write_text(xen.map_file())
    assert open_dump(tmp_path / "ram", tmp_path / "map", base=0).root == xen.root


@pytest.mark.parametrize("build_id", [None, OTHER_ID])
@pytest.mark.parametrize("order", [1, -1])
def test_the_trampoline_shows_which_booted_last(
    order: int, build_id: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xens = [made(monkeypatch), made(monkeypatch, OTHER, build_id)][::order]
    found = open_dump(image(tmp_path / "ram", *xens), base=0)
    assert found.root == xens[-1].root
    assert found.build_id == (build_id if build_id and order == 1 else syntheticxen.BUILD_ID)


def _gone(xens: Sequence[SyntheticXen]) -> None:
    """The crash kernel's memory now."""
    for xen in xens:
        del xen.content[TRAMPOLINE + 4]


def _apart(xens: Sequence[SyntheticXen]) -> None:
    """Each where it was not overwritten by the other's."""
    poke(xens[0], "trampoline_phys", struct.pack("<Q", 0x70000))
    xens[0].content[0x70004] = xens[0].content.pop(TRAMPOLINE + 4)


@pytest.mark.parametrize("obscure", [_gone, _apart])
def test_several_that_cannot_be_distinguished_are_listed(obscure, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    xens = [made(monkeypatch), made(monkeypatch, OTHER, OTHER_ID)]
    obscure(xens)
    path = image(tmp_path / "ram", *xens)
    with pytest.raises(Undecidable) as raised:
        open_dump(path, base=0)
    ours, theirs = syntheticxen.BUILD_ID.hex(), OTHER_ID.hex()
    listed = f"at physical 0x2f800000 (build-id {theirs}) and at physical 0x3f800000 (build-id {ours})"
    assert f"{path} holds 2 Xens, {listed}, as an earlier boot leaves them" in str(raised.value)


def test_two_of_one_build_are_listed_with_symbols_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xens = [made(monkeypatch), made(monkeypatch, OTHER)]
    _gone(xens)
    (tmp_path / "map").write_text(xens[0].map_file())
    for symbols in (None, tmp_path / "map"):
        with pytest.raises(Undecidable, match="holds 2 Xens, at physical 0x2f800000 .* and at physical 0x3f800000"):
            open_dump(image(tmp_path / "ram", *xens), symbols, base=0)


class Counting:
    """Memory that counts the bytes read."""

    def __init__(self, path: Path) -> None:
        self._dump = dump.open_dump(str(path), base=0)
        self.read_bytes = 0

    def read_physical(self, address: int, size: int) -> bytes:
        self.read_bytes += size
        return self._dump.read_physical(address, size)

    def __getattr__(self, name: str) -> object:
        return getattr(self._dump, name)


def test_holes_are_not_read_and_nothing_above_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "ram", made(monkeypatch), size=64 * GB)
    with path.open("r+b") as file:
        for gigabyte in range(5, 60):
            file.seek(gigabyte * GB)
            file.write(table(SyntheticXen(1)))
    memory = Counting(path)
    assert [place >> 20 for place, _ in search.tables(memory, 4 * GB)] == [(PHYS_START + TABLE) >> 20]  # type: ignore[arg-type]
    assert memory.read_bytes < 16 << 20


def test_memory_full_of_what_looks_like_tables_is_bounded(tmp_path: Path) -> None:
    tokens = b"".join(b"%d\0" % number for number in range(256))
    looks = bytes(8) + tokens + bytes(len(tokens) % 2)
    index, at = [], 0
    for number in range(256):
        index.append(at)
        at += len(b"%d\0" % number)
    looks += struct.pack("<256H", *index)
    path = tmp_path / "ram"
    path.write_bytes((looks * 2000 + embedded.DIGITS * 100_000)[: 4 << 20])
    memory = Counting(path)
    with pytest.raises(Undecidable, match=f"^too much in {path} looks like Xen's symbol table"):
        list(search.tables(memory, 4 * GB))  # type: ignore[arg-type]
    assert memory.read_bytes < 256 << 20


def test_the_search_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "ram", made(monkeypatch))
    with path.open("r+b") as file:
        file.write(bytes(range(256)) * 4096)
    reported: list[tuple[int, int]] = []
    open_dump(path, base=0, progress=lambda done, total: reported.append((done, total)))
    assert reported == sorted(reported)
    assert reported[0][0] == 0 and 1 << 20 < reported[-1][0] < reported[-1][1] < 64 << 20
    open_dump(path, base=0)  # and need not be asked
