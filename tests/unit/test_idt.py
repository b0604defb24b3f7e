"""Where each CPU's IDT is, by both of its names in Xen, and how a gate read there is named."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.symbols.mapfile import ListedRows
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.x86.gate import SIZE, VECTOR_DF, VECTOR_MC, VECTOR_NMI, Gate, encode
from xen_symbols.xen.idt import ask_gates, ask_pointers, gate_of, idt_address, table_of
from xen_symbols.xen.percpu import PerCpuAreas, per_cpu_address, per_cpu_areas
from xen_symbols.xen.reads import Batch

START = 0xFFFF_82D0_4050_0000  # __per_cpu_start
INVALID = 0x8000_0000_0000_0000 - START  # an offset that leads to INVALID_PERCPU_AREA
SYMBOLS = {
    "nr_cpu_ids": START + 0x1000, "__per_cpu_offset": START + 0x1100, "__per_cpu_start": START,
    "idt_tables": START + 0x1200, "per_cpu__idt": START + 0x40, "per_cpu__crash_save_done": START + 0x48,
}  # fmt: skip
TABLES = (0x10_0000, 0, 0x30_0000)  # CPU 1 has none, CPU 3 no per-CPU area
OFFSETS = (0, 0x1_0000, 0x2_0000, INVALID)


def gates(cpu: int) -> bytes:
    made = (Gate(handler=0x1000 * cpu + number, selector=0xE008, ist=number % 8, type=14, dpl=0, present=True)
            for number in range(32))  # fmt: skip
    return b"".join(map(encode, made))


class Memory:
    """Four CPUs, with their tables found by `name`."""

    def __init__(self, name: str) -> None:
        others = {"idt_tables", "per_cpu__idt"} - {name}
        names = [symbol for symbol in SYMBOLS if symbol not in others]
        rows = ListedRows([SYMBOLS[symbol] for symbol in names], "D" * len(names), names)
        self.symbols = SymbolTable("made here", ".map", rows, [(START, START + 0x2000)])
        words = dict(enumerate(OFFSETS))
        self.content = {SYMBOLS["__per_cpu_offset"]: b"".join(_word(words[cpu]) for cpu in range(4))}
        for cpu, table in enumerate(TABLES):
            self.content[START + 0x40 + OFFSETS[cpu]] = _word(table)
            if table:
                self.content[table] = gates(cpu)
        self.content[SYMBOLS["idt_tables"]] = b"".join(map(_word, (*TABLES, 0)))

    def variable(self, name: str, size: int, kinds: str) -> int:
        assert name == "nr_cpu_ids"
        return len(OFFSETS)

    def read_many(self, requests: Iterable[tuple[int, int]]) -> list[bytes | Absent]:
        return [self._read(*request) for request in requests]

    def _read(self, address: int, size: int) -> bytes | Absent:
        for start, content in self.content.items():
            if start <= address and address + size <= start + len(content):
                return content[address - start : address - start + size]
        return Absent(f"{address:#x} was not made")


def _word(value: int) -> bytes:
    return (value % (1 << 64)).to_bytes(8, "little")


@pytest.mark.parametrize(("name", "shown"), [("idt_tables", "idt_tables[{}]"), ("per_cpu__idt", "per_cpu(idt, {})")])
def test_a_gate_is_named_by_the_table_it_was_read_in(name: str, shown: str) -> None:
    memory = Memory(name)
    batch = Batch(memory)  # type: ignore[arg-type]
    areas = per_cpu_areas(memory)  # type: ignore[arg-type]
    assert areas.existing == [0, 1, 2]
    pointers = ask_pointers(batch, memory.symbols, areas)
    batch.read()
    asked = {cpu: ask_gates(batch, pointers(cpu)) for cpu in areas.existing}
    batch.read()
    assert [table_of(pointers(cpu)).value for cpu in (0, 2)] == [TABLES[0], TABLES[2]]
    assert table_of(pointers(2)).symbol == shown.format(2)
    for vector, vector_name in ((VECTOR_NMI, "NMI"), (VECTOR_DF, "DF"), (VECTOR_MC, "MC")):
        for cpu in (0, 2):
            read = gate_of(asked[cpu], pointers(cpu), vector)
            assert read.value.handler == 0x1000 * cpu + vector
            assert read.address == TABLES[cpu] + SIZE * vector
            assert read.raw == gates(cpu)[SIZE * vector : SIZE * vector + SIZE]
            assert read.symbol == f"{shown.format(cpu)}[{vector_name}]"
        none = Absent("it has no IDT", Kind.NOT_APPLICABLE)
        assert table_of(pointers(1)).value == gate_of(asked[1], pointers(1), vector).value == none


@pytest.mark.parametrize("name", ["idt_tables", "per_cpu__idt"])
def test_one_cpus_table(name: str) -> None:
    memory = Memory(name)
    assert idt_address(memory, 2) == TABLES[2]  # type: ignore[arg-type]
    for cpu, why in (
        (1, "CPU 1 has no IDT"),
        (3, "CPU 3 is possible but not present: it has no per-CPU area"),
        (4, "CPU 4 does not exist: nr_cpu_ids is 4"),
        (-1, "CPU -1 does not exist: nr_cpu_ids is 4"),
    ):
        with pytest.raises(Unreadable, match=f"^{why}$"):
            idt_address(memory, cpu)  # type: ignore[arg-type]


def test_one_cpus_variable() -> None:
    memory = Memory("idt_tables")
    assert per_cpu_address(memory, "crash_save_done", 2) == START + 0x48 + 0x2_0000  # type: ignore[arg-type]
    with pytest.raises(Unreadable, match=r"^CPU 3 is possible but not present"):
        per_cpu_address(memory, "per_cpu__crash_save_done", 3)  # type: ignore[arg-type]


def test_an_offset_of_0_is_cpu_0s_alone() -> None:
    assert PerCpuAreas(START, [0, 0, -START, 0x1000]).existing == [0, 3]
