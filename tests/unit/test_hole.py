"""A file of guest RAM whose hole below 4 GiB is squeezed out: found by what Xen's memory shows, or given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.machines import elfwriter, syntheticxen
from tests.machines.syntheticxen import PHYS_START, VIRT_START, SyntheticXen
from xen_symbols import evaluate, open_dump
from xen_symbols.absence import Undecidable
from xen_symbols.report.model import Verdict
from xen_symbols.targets import Map, dump
from xencrash.cli import main

GB = 1 << 30
RAM, RESERVED = 1, 2
HIGH = 0x1_4000_0000  # 5 GiB
TABLES = 0x1_5000_0000
Entries = Sequence[tuple[int, int, int]]


def memory_map(low: int, top: int, reserved: int = 0x23000) -> Entries:
    """As SeaBIOS has it: the end of low memory is its own."""
    return [
        (0, 0x9FC00, RAM), (0xF0000, 0x10000, RESERVED), (0x100000, low - reserved - 0x100000, RAM),
        (low - reserved, reserved, RESERVED), (0xFFFC0000, 0x40000, RESERVED), (4 * GB, top - 4 * GB, RAM),
        (0xFD_0000_0000, 0x3_0000_0000, RESERVED),
    ]  # fmt: skip


def machine(monkeypatch: pytest.MonkeyPatch, tables: int | None, entries: Entries, heap: int = HIGH) -> SyntheticXen:
    with monkeypatch.context() as patch:
        patch.setattr(syntheticxen, "HEAP", heap)
        xen = SyntheticXen(2, tables=tables, memory_map=entries)
    rows = sorted((address - VIRT_START, kind + name) for name, (address, kind) in xen.symbols.items())
    xen.content[PHYS_START + 0x300000] = elfwriter.embedded_table(rows)
    return xen


def written(path: Path, xen: SyntheticXen, low: int, top: int) -> Path:
    """A sparse file of memory up to `top`, of which [low, 4 GiB) is left out; all is there if `low` is 4 GiB."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), low + top - 4 * GB)
        for address, data in xen.content.items():
            file.seek(address if address < 4 * GB else low + address - 4 * GB)
            file.write(data)
    return path


class Row(NamedTuple):
    kind: str
    low: int  # where low memory ends in the file
    top: int
    tables: int | None
    entries: Entries
    answer: str  # what the format says; "" for as it is
    verdict: Verdict = Verdict.PASS


Q35, PC = 0x8000_0000, 0xC000_0000
SIX, FIVE, LESS = 8 * GB, 6 * GB, 5 * GB + GB // 2  # where memory ends


def left_out(low: int, by: str) -> str:
    return f", its hole {low:#x}-0x100000000 left out, by {by}"


BOTH, ALONE = "Xen's memory map and page tables", "Xen's page tables"
CUT = ", not read from 4 GiB on: where that is in the file could not be determined (--map)"
ROWS = [
    Row("QEMU's q35 with 6 GiB", Q35, SIX, TABLES, memory_map(Q35, SIX), left_out(Q35, BOTH)),
    Row("QEMU's pc", PC, FIVE, TABLES, memory_map(PC, FIVE), left_out(PC, BOTH)),
    Row("an odd size", 0xB01_00000, FIVE, TABLES, memory_map(0xB01_00000, FIVE), left_out(0xB01_00000, BOTH)),
    Row("page tables in low memory", Q35, SIX, None, memory_map(Q35, SIX), left_out(Q35, BOTH)),
    Row("no memory map", Q35, SIX, TABLES, (), left_out(Q35, ALONE)),
    Row("a memory map that is no map", Q35, SIX, TABLES, [(0, 0, 0)] * 2000, left_out(Q35, ALONE)),
    Row("Xen's mem= ends memory", Q35, SIX, TABLES, memory_map(Q35, SIX - GB), left_out(Q35, ALONE)),
    Row("firmware keeps the top", Q35, SIX, TABLES, memory_map(Q35, SIX - (1 << 21)), left_out(Q35, ALONE)),
    Row(
        "smaller than 4 GiB", Q35, 4 * GB + FIVE // 4, TABLES, memory_map(Q35, 4 * GB + FIVE // 4), left_out(Q35, BOTH)
    ),
    Row("all of it, with the hole", 4 * GB, SIX, TABLES, memory_map(Q35, SIX), ""),
    Row("all of it, and no memory map", 4 * GB, SIX, TABLES, (), ""),
    Row("all of it, tables in low memory", 4 * GB, SIX, None, memory_map(Q35, SIX), ""),
    Row("nothing shows where it is", Q35, SIX, None, memory_map(PC, SIX), CUT, Verdict.UNKNOWN),
]


@pytest.mark.parametrize("given", [False, True], ids=["carried", "map"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_where_memory_above_4_gib_is(row: Row, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xen = machine(monkeypatch, row.tables, row.entries)
    path = written(tmp_path / "ram", xen, row.low, row.top)
    (tmp_path / "map").write_text(xen.map_file())
    found = open_dump(path, tmp_path / "map" if given else None, base=0)
    assert found.target.format == f"raw image at 0x0{row.answer}"
    low = [(0, row.low), (4 * GB, row.top)] if "left out" in row.answer else [(0, 4 * GB if row.answer else row.top)]
    assert list(found.target.physical_ranges()) == low
    assert evaluate(found).verdict is row.verdict
    if row.verdict is Verdict.PASS:
        assert found.target.read_physical(HIGH, 4) == xen.content[HIGH][:4]
        starts = [start for start, _ in found.target.written_ranges()]
        assert HIGH & -4096 in {start & -4096 for start in starts} or any(start > 4 * GB for start in starts)
    assert evaluate(found).to_json()["target"]["format"] == found.target.format


def test_without_this_the_machine_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator makes what it should: as it is, Xen's page tables lead nowhere."""
    xen = machine(monkeypatch, TABLES, memory_map(Q35, SIX))
    path = written(tmp_path / "ram", xen, Q35, SIX)
    with pytest.raises(Undecidable, match=r"is what is where in the file as --map says"):
        open_dump(path, maps=[(0, 0, path.stat().st_size)])


GIVEN = [Map(0, 0, Q35), Map(4 * GB, Q35, 4 * GB)]


def words(maps: Sequence[Map]) -> list[str]:
    return [word for one in maps for word in ("--map", f"{one.physical:#x}={one.offset:#x}:{one.size:#x}")]


def test_it_is_given_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    xen = machine(monkeypatch, TABLES, ())
    path = written(tmp_path / "ram", xen, Q35, SIX)
    assert main(["check", str(path), *words(GIVEN)]) == 0
    assert f"{path} (raw image in 2 stretches)" in capsys.readouterr().out
    assert main(["info", str(path), *words(reversed(GIVEN))]) == 0  # type: ignore[arg-type]
    assert "memory       0x0-0x80000000, 0x100000000-0x200000000\n" in capsys.readouterr().out
    assert main(["info", str(path), "--base", "0"]) == 0
    out = capsys.readouterr().out
    assert left_out(Q35, ALONE) in out and "memory       0x0-0x80000000, 0x100000000-0x200000000\n" in out


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        ([Map(0, 0, GB), Map(GB - 1, GB, GB)], "physical 0x3fffffff is mapped twice; give each address once (--map)"),
        ([Map(0, 0, GB)] * 2, "physical 0x0 is mapped twice; give each address once (--map)"),
        ([Map(0, 1, 4096)], "it has no 0x1000 bytes at offset 0x1: it ends at 0x1000 (--map)"),
        ([Map(0, 0, 4097)], "it has no 0x1001 bytes at offset 0x0: it ends at 0x1000 (--map)"),
        ([Map(0, -1, 4)], "it has no 0x4 bytes at offset -0x1: it ends at 0x1000 (--map)"),
        ([Map((1 << 52) - 1, 0, 2)], "0x2 bytes at physical 0xfffffffffffff are not a stretch of memory (--map)"),
        ([Map(0, 0, 0)], "0x0 bytes at physical 0x0 are not a stretch of memory (--map)"),
        ([Map(-4, 0, 4)], "0x4 bytes at physical -0x4 are not a stretch of memory (--map)"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, maps: Sequence[Map], says: str) -> None:
    size = 2 * GB if "twice" in says else 4096
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(size)
    with pytest.raises(Undecidable) as error:
        dump.open_dump(str(path), maps=maps)
    assert str(error.value) == f"{path}: {says}"


@pytest.mark.parametrize("text", ["0", "0=0", "0=0:0", "0:0=1", "x=0:1", "0=0:1:2", "=:", "0=0:-1"])
def test_a_map_that_is_none_is_bad_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "ram", "--map", text])
    assert ended.value.code == 2
    assert f"{text!r} is not PHYS=OFFSET:SIZE, such as 0x100000000=0x80000000:0x40000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["ram", "--base", "0"], "--map says all of what is where in a raw image, and --base as well: leave one out"),
        (["gdb:/s"], "--map is for a raw image of memory, and gdb:/s is a live machine: leave it out"),
    ],
)
def test_a_map_where_it_has_no_place(more: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *more, "--map", "0=0:1"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("way", [["--base", "0"], words(GIVEN)], ids=["found", "given"])
def test_gdb_reads_the_same(way: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both gdb's own reads, which the command serves, and the xen commands, which open the file themselves."""
    xen = machine(monkeypatch, TABLES, memory_map(Q35, SIX))
    path = written(tmp_path / "ram", xen, Q35, SIX)
    code = "import sys; from xencrash.cli import main; sys.exit(main(sys.argv[1:]))"
    commands = [f"x/2xb {syntheticxen.DIRECTMAP + HIGH:#x}", "xen crash check"]
    theirs = ["-batch", *(part for command in commands for part in ("-ex", command))]
    done = subprocess.run(
        [sys.executable, "-c", code, "gdb", path, *way, "--", *theirs], capture_output=True, text=True, check=False
    )
    first, second = xen.content[HIGH][:2]
    assert f"{syntheticxen.DIRECTMAP + HIGH:#x}:\t{first:#04x}\t{second:#04x}\n" in done.stdout
    assert "\nPASS  " in done.stdout and "raw image" in done.stdout
