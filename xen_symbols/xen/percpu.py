"""Xen's CPU numbers and per-CPU areas: nr_cpu_ids and __per_cpu_offset[] (xen/include/xen/percpu.h)."""

from __future__ import annotations

from collections.abc import Sequence

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.table import DATA, SymbolTable
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import Asked, Batch

# xen/include/xen/percpu.h, INVALID_PERCPU_AREA: 0 until 7cfb005362 (4.2.5, 4.3.1), non-canonical since.
INVALID_PERCPU_AREAS = (0, 0x8000_0000_0000_0000)
NR_CPUS_MAX = 16384  # no build of Xen allows more (Kconfig NR_CPUS); a larger nr_cpu_ids is not one


def cpu_count(memory: XenMemory) -> int:
    """nr_cpu_ids: how many CPUs are possible. Raises Unreadable, also for a number that no Xen can have."""
    count = memory.variable("nr_cpu_ids", 4, DATA)
    if not 0 < count <= NR_CPUS_MAX:
        raise Unreadable(f"nr_cpu_ids is {count}, which is impossible: it is not set yet, or the symbols are wrong")
    return count


class PerCpuAreas:
    """Where each CPU's per-CPU area is. `offsets` has every CPU's, `existing` the CPUs that have an area."""

    def __init__(self, start: int, offsets: Sequence[int]) -> None:
        """`start` is that of the template, which CPU 0 alone uses (percpu_init_areas): an offset of 0 would take
        CPU 0's variables for another's."""
        self.offsets = offsets
        self.existing = [
            cpu
            for cpu, offset in enumerate(offsets)
            if (start + offset) % (1 << 64) not in INVALID_PERCPU_AREAS and (offset != 0 or cpu == 0)
        ]
        self._existing = frozenset(self.existing)

    def require(self, cpu: int) -> None:
        """Raises Unreadable for a CPU that does not exist, or has no area."""
        if not 0 <= cpu < len(self.offsets):
            raise Unreadable(f"CPU {cpu} does not exist: nr_cpu_ids is {len(self.offsets)}")
        if cpu not in self._existing:
            raise Unreadable(f"CPU {cpu} is possible but not present: it has no per-CPU area")

    def address(self, variable: int, cpu: int) -> int:
        """Where one CPU has the variable whose symbol is at `variable`. Raises Unreadable as `require` does."""
        self.require(cpu)
        return (variable + self.offsets[cpu]) % (1 << 64)


def ask_areas(batch: Batch, symbols: SymbolTable, count: int) -> Asked:
    """Ask for __per_cpu_offset[], of which `areas_of` makes the areas."""
    return batch.ask(symbols.address("__per_cpu_offset"), 8 * count)


def areas_of(symbols: SymbolTable, offsets: Asked) -> PerCpuAreas:
    """Raises Unreadable."""
    raw = offsets.answer
    if isinstance(raw, Absent):
        raise Unreadable(f"__per_cpu_offset could not be read: {raw}")
    words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
    return PerCpuAreas(symbols.address("__per_cpu_start"), words)


def per_cpu_areas(memory: XenMemory) -> PerCpuAreas:
    """Read where the per-CPU areas are. Raises Unreadable."""
    batch = Batch(memory)
    offsets = ask_areas(batch, memory.symbols, cpu_count(memory))
    batch.read()
    return areas_of(memory.symbols, offsets)


def per_cpu_variable(symbols: SymbolTable, name: str) -> int:
    """The address of a per-CPU variable's symbol, with or without its `per_cpu__`. Raises Unreadable."""
    return symbols.address(f"per_cpu__{name.removeprefix('per_cpu__')}")


def per_cpu_address(memory: XenMemory, name: str, cpu: int) -> int:
    """The address of a per-CPU variable of one CPU. Raises Unreadable for an absent CPU or an unknown name."""
    variable = per_cpu_variable(memory.symbols, name)
    return per_cpu_areas(memory).address(variable, cpu)
