"""What an NMI or a machine check would do on a CPU in its present state, from its tables alone."""

from __future__ import annotations

import contextlib

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.x86 import gate
from xen_symbols.xen.memory import AddressSpace

VECTORS = {"nmi": gate.VECTOR_NMI, "mc": gate.VECTOR_MC}
_FRAME = 40  # bytes: SDM vol. 3, "64-Bit Mode Stack Frame"
_TSS_IST = 0x24  # SDM vol. 3, "64-Bit TSS Format": IST1


class Delivery(NamedTuple):
    """`handler` and `frame`: where it would begin, and where RSP would point; None if the tables do not lead that far.

    `obstacle` is the first thing that is missing; with one, the machine ends in a triple fault, whatever the handler's
    code.
    """

    handler: int | None
    frame: int | None
    ist: int | None = None
    obstacle: str | None = None


def foresee(target: Target, cpu: PhysicalCpu, vector: int) -> Delivery:
    if isinstance(cpu.idtr, Absent):
        return Delivery(None, None, None, f"its IDTR is not known: {cpu.idtr}")
    base, limit = cpu.idtr
    if limit < gate.SIZE * (vector + 1) - 1:
        return Delivery(None, None, None, f"its IDTR has the limit {limit:#x}, and no gate {vector}")
    space = AddressSpace(target, cpu.registers["cr3"], "its CR3")
    try:
        found = gate.decode(space.read(base + gate.SIZE * vector, gate.SIZE))
    except Unreadable:
        return Delivery(None, None, None, "its page tables do not map its IDT")
    if not found.present:
        return Delivery(None, None, None, f"gate {vector} is not present")
    if not _has_segment(space, cpu, found.selector):
        return Delivery(found.handler, None, found.ist, f"its GDT has no code segment {found.selector:#x}")
    frame = _frame(space, cpu, found.ist)
    if not _mapped(space, found.handler):
        return Delivery(found.handler, frame, found.ist, "its page tables do not map the handler")
    if frame is None or not _mapped(space, frame):
        return Delivery(found.handler, frame, found.ist, "its page tables do not map the stack")
    return Delivery(found.handler, frame, found.ist)


def _frame(space: AddressSpace, cpu: PhysicalCpu, ist: int) -> int | None:
    """From ring 0: the stack is the IST's, or continues where it is (SDM vol. 3, "Stack Switching in IA-32e Mode")."""
    if ist == 0 and cpu.registers["cs"] & 3:
        at = _TSS_IST - 32  # RSP0
    elif ist == 0:
        return ((cpu.registers["rsp"] & -16) - _FRAME) & (1 << 64) - 1
    else:
        at = _TSS_IST + 8 * (ist - 1)
    if isinstance(cpu.tr_base, Absent):
        return None
    with contextlib.suppress(Unreadable):
        return (space.read_uint(cpu.tr_base + at) & -16) - _FRAME
    return None


def _has_segment(space: AddressSpace, cpu: PhysicalCpu, selector: int) -> bool:
    """Whether the selector names a present code segment (SDM vol. 3, "Segment Descriptors")."""
    offset = selector & ~7
    if offset + 7 > cpu.registers["gdt_limit"]:
        return False
    try:
        descriptor = space.read_uint(cpu.registers["gdt_base"] + offset)
    except Unreadable:
        return False
    return descriptor >> 43 & 3 == 3 and bool(descriptor >> 47 & 1)


def _mapped(space: AddressSpace, address: int) -> bool:
    try:
        space.physical(address)
    except Unreadable:
        return False
    return True
