"""Each CPU's interrupt descriptor table, and the gates in it that the crash path is about."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, SymbolTable
from xen_symbols.x86 import gate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.percpu import PerCpuAreas, per_cpu_areas
from xen_symbols.xen.reads import Asked, Batch, Read, absent, unsigned

# NMI (2), #DF (8) and #MC (18) in one read: the gates from vector 2 to vector 18.
_GATES_AT = gate.VECTOR_NMI * gate.SIZE
_GATES_SIZE = (gate.VECTOR_MC + 1) * gate.SIZE - _GATES_AT
_NO_TABLE = Absent("it has no IDT", Kind.NOT_APPLICABLE)


class EntryPoint(NamedTuple):
    """The handlers that a gate may have, by their names in Xen, newest first."""

    names: tuple[str, ...]
    source: str


ENTRY_POINTS = (
    EntryPoint(("entry_NMI", "nmi"), "renamed by abe93fc8aa (4.18.0)"),
    EntryPoint(("entry_MC", "machine_check"), "renamed by abe93fc8aa (4.18.0)"),
    EntryPoint(("trap_nop",), "77ad1faa6b (4.3.0)"),
)


class Pointer(NamedTuple):
    """What holds the address of one CPU's table. `name` is what it is called in Xen's source."""

    asked: Asked
    name: str


def ask_pointers(batch: Batch, symbols: SymbolTable, areas: PerCpuAreas) -> Callable[[int], Pointer]:
    """Ask where each existing CPU's table is; the function that is returned has the answer for one of them.

    idt_tables[] until 9c20d3c591 (4.21.0), per_cpu(idt) since.
    """
    array = symbols.get("idt_tables", DATA)
    if array is not None:
        tables = batch.ask(array, 8 * len(areas.offsets))
        return lambda cpu: Pointer(tables.part(8 * cpu, 8), f"idt_tables[{cpu}]")
    variable = symbols.get("per_cpu__idt", DATA)
    unnamed = Absent("the symbols name neither idt_tables nor per_cpu__idt", Kind.NO_SYMBOL)
    asked = {
        cpu: batch.ask(unnamed if variable is None else areas.address(variable, cpu), 8) for cpu in areas.existing
    }
    return lambda cpu: Pointer(asked[cpu], f"per_cpu(idt, {cpu})")


def table_of(pointer: Pointer) -> Read:
    """The address of a CPU's table."""
    table = pointer.asked.read(unsigned, pointer.name)
    return table if table.value != 0 else absent(_NO_TABLE)


def ask_gates(batch: Batch, pointer: Pointer) -> Asked:
    """Ask for a CPU's gates, for `gate_of`."""
    return batch.follow(pointer.asked, _GATES_AT, _GATES_SIZE, _NO_TABLE)


def gate_of(gates: Asked, pointer: Pointer, vector: int) -> Read:
    """A CPU's NMI, #DF or #MC gate."""
    name = gate.VECTOR_NAMES[vector].lstrip("#")  # as Xen's X86_EXC_NMI, X86_EXC_DF and X86_EXC_MC
    asked = gates.part(vector * gate.SIZE - _GATES_AT, gate.SIZE)
    asked.answer = _once(asked.answer)
    return asked.read(gate.decode, f"{pointer.name}[{name}]")


@lru_cache(maxsize=256)
def _once(answer: bytes | Absent) -> bytes | Absent:
    """Thousands of CPUs have the same few gates, whose bytes are kept as evidence: equal ones once."""
    return answer


def idt_address(memory: XenMemory, cpu: int) -> int:
    """Where one CPU's IDT lies. Raises Unreadable for a CPU without one."""
    areas = per_cpu_areas(memory)
    areas.require(cpu)
    batch = Batch(memory)
    pointers = ask_pointers(batch, memory.symbols, areas)
    batch.read()
    table = table_of(pointers(cpu)).value
    if isinstance(table, Absent):
        raise Unreadable(f"CPU {cpu} has no IDT" if table is _NO_TABLE else table)
    return int(table)
