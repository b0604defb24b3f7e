"""A CPU's stacks (xen/include/asm-x86/current.h): which page is which follows from its TSS.

Xen gives each CPU 32 KiB, aligned to their size. The IST stacks are pages at the bottom, the primary stack the two
pages at the top, and at the very end lies struct cpu_info, which begins with the guest's registers.
"""

from __future__ import annotations

from collections.abc import Sequence

from xen_symbols.absence import Absent
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86 import gate, tss
from xen_symbols.x86.paging import PAGE_SIZE
from xen_symbols.x86.tss import Tss
from xen_symbols.xen.cpuinfo import IST_SSP_SIZE, STACK_SIZE, CpuInfo, base_by
from xen_symbols.xen.ist import IST_NUMBERS, IstNumbers, ist_numbers
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import CpuState, State

_PRIMARY_SIZE = 2 * PAGE_SIZE  # PRIMARY_STACK_SIZE
# A page of TSS (4.13) begins with ist_ssp[] (4.14): where the TSS is in it follows from its content.
_TSS_AT = (IST_SSP_SIZE, 0)
REGS_SIZE = 168  # struct cpu_user_regs from r15 to ss, in every release


class Stack(NamedTuple):
    """[start, end): the page of an IST entry, with the exception that uses it, or with `ist` 0 the primary stack."""

    name: str
    start: int
    end: int
    ist: int = 0
    vector: int | None = None


class CpuStacks(NamedTuple):
    """One CPU's stacks; `found_by` says what they are known from.

    `guest_regs`: where the frame lies with which a guest entered Xen, above all that Xen itself pushes.
    `processor_id` and `current` are cpu_info's: whose stack it says it is, and the vCPU that runs.
    """

    base: int
    found_by: str
    numbering: str
    stacks: tuple[Stack, ...]
    guest_regs: int
    processor_id: int | Absent
    current: int | Absent

    @property
    def end(self) -> int:
        return self.base + STACK_SIZE

    def at(self, address: int) -> Stack | None:
        """The stack that a stack pointer is on: one that has just been entered points at its end."""
        return next((stack for stack in self.stacks if stack.start < address <= stack.end), None)

    def place(self, address: int) -> str:
        """Where an address lies, in words."""
        stack = self.at(address)
        if stack is not None:
            return f"the {stack.name} stack"
        if self.base <= address < self.end:
            return "no stack: below the primary one, which has overflowed, or not a stack pointer"
        return "none of this CPU's stacks"


def stacks_of(memory: XenMemory, state: State, cpu: CpuState) -> CpuStacks | Absent:
    """A CPU's stacks by its TSS; Absent when that cannot be read or is not Xen's TSS."""
    return stacks_of_each(memory, state, [cpu])[cpu.cpu]


def stacks_of_each(memory: XenMemory, state: State, cpus: Sequence[CpuState]) -> dict[int, CpuStacks | Absent]:
    """The same of several CPUs, in two batches: what their TSSs hold, and the struct cpu_info that these lead to."""
    numbers = ist_numbers(state)
    asked = [(cpu, cpu.tss + offset) for cpu in cpus if not isinstance(cpu.tss, Absent) for offset in _TSS_AT]
    pages = memory.read_many([(address, tss.SIZE) for _, address in asked])
    found: dict[int, CpuStacks | Absent] = {cpu.cpu: cpu.tss for cpu in cpus if isinstance(cpu.tss, Absent)}
    layouts: dict[int, _Layout] = {}
    for (cpu, address), page in zip(asked, pages, strict=True):
        if cpu.cpu in layouts or cpu.cpu in found:
            continue
        layout = _layout(address, page, cpu)
        if isinstance(layout, _Layout):
            layouts[cpu.cpu] = layout
        elif isinstance(layout, Absent):
            found[cpu.cpu] = layout
    fields = [(layout.end - at, size) for layout in layouts.values()
              for at, size in ((layout.info.processor_id, 4), (layout.info.current, 8))]  # fmt: skip
    answers = iter(memory.read_many(fields))
    for number, layout in layouts.items():
        found[number] = _stacks(layout, next(answers), next(answers), numbers)
    for cpu in cpus:
        if cpu.cpu not in found:
            found[cpu.cpu] = Absent(f"what lies at {cpu.tss:#x} is not Xen's TSS: {_NOT_ONE_CPUS}")
    return found


_NOT_ONE_CPUS = "its stack pointers are not in one CPU's stacks"


class _Layout(NamedTuple):
    """What one TSS says."""

    tss: Tss
    base: int
    info: CpuInfo
    found_by: str

    @property
    def end(self) -> int:
        return self.base + STACK_SIZE


def _layout(address: int, raw: bytes | Absent, cpu: CpuState) -> _Layout | Absent | None:
    """None where no TSS of Xen's lies."""
    if isinstance(raw, Absent):
        return Absent(f"its TSS could not be read: {raw}")
    found = tss.decode(raw)
    known = base_by(found)
    if known is None:
        return None
    base, info = known
    loaded = cpu.physical.tr_base if isinstance(cpu.physical, PhysicalCpu) else None
    by = f"the TSS at {address:#x}" + (", which TR points to" if loaded == address else "")
    return _Layout(found, base, info, by)


def _stacks(
    layout: _Layout, id_raw: bytes | Absent, current: bytes | Absent, numbers: IstNumbers | Absent
) -> CpuStacks:
    found, base, end = layout.tss, layout.base, layout.end
    page = (found.ist[0] - 1 - base) // PAGE_SIZE
    numbers, numbering = _agreed(numbers, page)
    stacks = []
    for ist, top in enumerate(found.ist, start=1):
        if base < top <= end - _PRIMARY_SIZE:
            vector = None if isinstance(numbers, Absent) else numbers.vector(ist)
            name = f"IST {ist}" if vector is None else gate.VECTOR_NAMES[vector]
            stacks.append(Stack(name, (top - 1) & -PAGE_SIZE, top, ist, vector))
    stacks.sort(key=lambda stack: stack.start)
    stacks.append(Stack("primary", end - _PRIMARY_SIZE, end))
    return CpuStacks(
        base=base,
        found_by=layout.found_by,
        numbering=numbering,
        stacks=tuple(stacks),
        guest_regs=found.rsp[0] - REGS_SIZE,
        processor_id=id_raw if isinstance(id_raw, Absent) else int.from_bytes(id_raw, "little"),
        current=current if isinstance(current, Absent) else int.from_bytes(current, "little"),
    )


def _agreed(by_gate: IstNumbers | Absent, page: int) -> tuple[IstNumbers | Absent, str]:
    """The numbers that the #DF gate and the page of IST 1 both say, and what they are known from."""
    by_page = next((row for row in IST_NUMBERS if row.first_page == page), None)
    if isinstance(by_gate, Absent):
        return (by_gate, str(by_gate)) if by_page is None else (by_page, f"the page of IST 1 ({by_page.source})")
    if by_gate is not by_page:
        return Absent(why := f"contradictory: the #DF gate says {by_gate.source}, and IST 1 has page {page}"), why
    return by_gate, f"the #DF gate ({by_gate.source})"
