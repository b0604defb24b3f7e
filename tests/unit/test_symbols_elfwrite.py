"""A symbol table written as an ELF file: the same when read back, and gdb knows functions from variables."""

from __future__ import annotations

import subprocess
from pathlib import Path

from xen_symbols.symbols.elfwrite import symbol_file
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable
from xencrash.gdbprogram import find_gdb

START = 0xFFFF82D040200000
ROWS = [
    (0x0, "T", "_start"), (0x10, "t", "a.c#helper"), (0x20, "t", "b.c#helper"), (0x30, "W", "weak"),
    (0x40, "t", ".plain"), (0x50, "T", "_etext"), (0x50, "D", "idle_pg_table"),
    (0x60, "d", "a.c#counter"), (0x70, "b", "b.c#counter"),
    (0x80, "T", "init"), (0x88, "T", ""), (0x90, "B", "_end"),
]  # fmt: skip
BUILD_ID = bytes(range(20))


def table(rows: list[tuple[int, str, str]]) -> SymbolTable:
    listed = ListedRows([START + at for at, _, _ in rows], [kind for _, kind, _ in rows], [name for _, _, name in rows])
    return SymbolTable("xen", "test", listed, [(START, START + 0x90)], build_id=BUILD_ID)


def written(folder: Path, rows: list[tuple[int, str, str]]) -> Path:
    path = folder / "xen-syms"
    path.write_bytes(symbol_file(table(rows)))
    return path


def test_it_is_read_back_as_it_was(tmp_path: Path) -> None:
    again = load_symbols(str(written(tmp_path, ROWS)))
    assert again.build_id == BUILD_ID
    symbols = {again.rows.symbol(row) for row in again.rows.placed()}
    kept = table([row for row in ROWS if row[2]])
    # Sections without content are all nm's b.
    assert {
        s._replace(kind=s.kind.translate({68: 66, 100: 98})) for s in map(kept.rows.symbol, kept.rows.placed())
    } == (symbols)
    assert again.describe(START + 0x25) == "helper+0x5" and again.address("a.c#helper") == START + 0x10
    assert again.describe(START + 0x51) == "idle_pg_table+0x1" and again.describe(START + 0x8F) == "init+0xf"


def test_no_symbols_and_very_many_sections(tmp_path: Path) -> None:
    assert load_symbols(str(written(tmp_path, [(0, "T", "only")]))).address("only") == START
    rows = [(8 * number, "td"[number % 2], f"name{number}") for number in range(3000)]
    again = load_symbols(str(written(tmp_path, rows)))
    assert [again.address(name) for _, _, name in rows] == [START + at for at, _, _ in rows]


def test_gdb_takes_it(tmp_path: Path) -> None:
    words = ["info symbol 0xffff82d040200021", "p &idle_pg_table", "p &init"]
    gdb = [find_gdb(), "-q", "-nx", "-batch", *(part for word in words for part in ("-ex", word))]
    done = subprocess.run([*gdb, written(tmp_path, ROWS)], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[0] == "helper + 1 in section .text"
    assert said[1] == "$1 = (<data variable, no debug info> *) 0xffff82d040200050"
    assert said[2] == "$2 = (<text variable, no debug info> *) 0xffff82d040200080 <init>"
    assert done.stderr == ""
