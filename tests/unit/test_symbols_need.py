"""Which of a feature's symbols a build has."""

from __future__ import annotations

from xen_symbols.absence import Absent, Kind
from xen_symbols.symbols.mapfile import ListedRows
from xen_symbols.symbols.need import NEEDS, Need, survey
from xen_symbols.symbols.table import Symbol, SymbolTable

TABLE = SymbolTable(
    "m", ".map", ListedRows([8, 16, 24, 32], "tdTB", ["a.c#nmi", "t.c#nmi", "entry_NMI", "idt_tables"]), [(0, 64)]
)


def test_the_newest_name_that_the_build_has_meets_a_need() -> None:
    newest, older, none, ambiguous = survey(
        TABLE,
        [
            Need("gates", ("entry_NMI", "nmi"), "tT", ""),
            Need("gates", ("per_cpu__idt", "idt_tables"), "dDbB", ""),
            Need("gates", ("trap_nop", "other"), "tT", ""),
            Need("gates", ("nmi",), "dt", ""),
        ],
    )
    assert newest.symbol == Symbol(24, "entry_NMI", None, "T")
    assert older.symbol == Symbol(32, "idt_tables", None, "B")
    assert none.symbol == Absent("trap_nop is not in the .map (m)", Kind.NO_SYMBOL)
    assert ambiguous.symbol == Absent("nmi is ambiguous: a.c#nmi (t) at 0x8, t.c#nmi (d) at 0x10", Kind.NO_SYMBOL)


def test_the_needs_are_answerable() -> None:
    assert len({need.names for need in NEEDS}) == len(NEEDS)
    assert all(need.names and need.kinds and need.source for need in NEEDS)
    assert [have.need for have in survey(TABLE)] == list(NEEDS)
    assert {have.need.feature for have in survey(TABLE) if isinstance(have.symbol, Symbol)} == {"gates"}
