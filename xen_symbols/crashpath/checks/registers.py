"""Whether the registers that a CPU saved are its own: each by what it must be where this generation saves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.crashpath.checks.model import Outcome
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.generations import references
from xen_symbols.crashpath.stages import OtherStep
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.symbols.table import TEXT
from xen_symbols.x86 import control, paging
from xen_symbols.xen.crashnotes import CpuNotes
from xen_symbols.xen.memory import HYPERVISOR_CS, HYPERVISOR_DS

_SAVE = "kexec_crash_save_cpu"
# Until 1e15dcfbae (4.15) rip is the address of this function, which therefore has one; since, it is that of one
# instruction in whatever it was inlined into.
_CALLED = "elf_core_save_regs"
_CALLER = "kexec_crash"  # into which a compiler may have put the crashing CPU's copy
NOT_ITS_OWN = "tools show a stack and a place in Xen's code that are not this CPU's, or none at all"


class Part(NamedTuple):
    """One register: what it must be and what it is, in words. `right` is Absent where that cannot be determined."""

    name: str
    expected: str
    observed: str
    right: bool | Absent
    explained_by: tuple[str, ...] = ()


def parts(context: Context, cpu: int, notes: CpuNotes) -> list[Part]:
    """Every register that can be judged of a buffer that was filled in."""
    saved = notes.saved
    return [
        _rip(context, cpu, saved["rip"]),
        _aligned(stack_pointer(context, cpu, saved["rsp"]), saved["rsp"]),
        _rflags(context, cpu, saved["rflags"]),
        Part("cs", hex(HYPERVISOR_CS), hex(saved["cs"]), saved["cs"] == HYPERVISOR_CS),
        # An NMI or an interrupt that finds a guest loads a null SS (SDM vol. 3, 6.14.2).
        Part("ss", f"0x0 or {HYPERVISOR_DS:#x}", hex(saved["ss"]), saved["ss"] in (0, HYPERVISOR_DS)),
        _selectors(saved),
        _bases(saved),
        Part("cr0", "protection and paging on", hex(saved["cr0"]), control.is_cr0_of_64_bit_mode(saved["cr0"])),
        _cr2(context, cpu, saved["cr2"]),
        _cr3(context, cpu, saved["cr3"], saved["cr4"]),
        Part("cr4", "PAE on", hex(saved["cr4"]), control.is_cr4_of_64_bit_mode(saved["cr4"])),
    ]


def outcome(found: Sequence[Part], evidence: tuple[Evidence, ...]) -> Outcome:
    """All of them as one finding."""
    expected: dict[str, Any] = {part.name: part.expected for part in found}
    observed: dict[str, Any] = {part.name: None if isinstance(part.right, Absent) else part.observed for part in found}
    wrong = [part for part in found if part.right is False]
    unread = [part for part in found if isinstance(part.right, Absent)]
    if wrong:
        names = ", ".join(part.name for part in wrong)
        groups = tuple((check,) for check in wrong[0].explained_by) if len(wrong) == 1 else ()
        return Outcome(Verdict.FAIL, expected, observed, evidence, f"{names} not its own: {NOT_ITS_OWN}", groups)
    if unread:
        reasons = "; ".join(f"{part.name}: {part.right}" for part in unread)
        return Outcome(Verdict.UNKNOWN, expected, observed, evidence, reasons)
    return Outcome(Verdict.PASS, expected, observed, evidence)


def _rip(context: Context, cpu: int, rip: int) -> Part:
    symbols = context.symbols
    try:
        inside = _CALLED if symbols.has(_CALLED, TEXT) else _SAVE
    except Unreadable as error:
        return Part("rip", f"in {_SAVE}", hex(rip), error.absent)
    if not symbols.has(inside, TEXT):
        return Part("rip", f"in {inside}", symbols.describe(rip), Absent(f"the symbols name no {inside}"))
    name = symbols.function_at(rip)
    right: bool | Absent = name == inside
    if name == _CALLED:
        right = rip == symbols.address(_CALLED, TEXT)
    elif right:
        right = _where_all_save(rip, context.rips_saved[inside])
    if name == _CALLER and inside == _SAVE and context.is_crashing(cpu):
        try:
            right = not references(context.memory, _CALLER, _SAVE)
        except Unreadable as error:
            right = error.absent
    return Part("rip", f"in {inside}", symbols.describe(rip), right)


def _where_all_save(rip: int, most: Sequence[int]) -> bool | Absent:
    """Every CPU reads rip by the same instruction of the function: what most saved is right."""
    if rip not in most:
        return False
    return True if len(most) == 1 else Absent(f"as many CPUs saved {most[0]:#x} as {most[1]:#x}")


def _aligned(part: Part, rsp: int) -> Part:
    """In Xen's C code a stack pointer is a multiple of 8."""
    return part if rsp % 8 == 0 or part.right is not True else part._replace(right=False)


def stack_pointer(context: Context, cpu: int, rsp: int) -> Part:
    """On the crashing CPU whichever stack it crashed on; on another the one on which its NMI was taken; on an unknown
    path any of its own."""
    stacks = context.owned.stacks(cpu)
    any_of_them = "on a stack of its own"
    if isinstance(stacks, Absent):
        return Part("rsp", any_of_them, hex(rsp), stacks)
    stack = stacks.at(rsp)
    at = f"{rsp:#x}, on " + (f"its {stack.name} stack" if stack else context.owned.whose(rsp))
    gate = context.state.of(cpu).nmi_gate
    ist = gate.value.ist if gate.present and not context.no_idt else 0
    expected = next((each for each in stacks.stacks if each.ist == ist), None)
    if ist == 0 or expected is None or not _took_an_nmi(context, cpu):
        return Part("rsp", any_of_them, at, stack is not None)
    on_nmis = f"on its {expected.name} stack"
    if stack is None or stack.ist:
        return Part("rsp", on_nmis, at, stack is expected, ("idtr", "nmi-gate-ist"))
    # The entry code moves the frame of an NMI that interrupted a PV guest to the primary stack, and on Intel one that
    # interrupted an HVM guest is a VM exit. The idle vCPU is neither.
    idle = context.owned.is_idle(cpu)
    right = idle if isinstance(idle, Absent) else not idle
    return Part("rsp", f"{on_nmis}, or of a guest its primary one", at, right, ("idtr", "nmi-gate-ist"))


def _rflags(context: Context, cpu: int, rflags: int) -> Part:
    if not _took_an_nmi(context, cpu):  # the crashing CPU switches interrupts off later, in nmi_shootdown_cpus()
        return Part("rflags", "as in Xen", hex(rflags), control.is_rflags_of_xen(rflags))
    off = not rflags & control.RFLAGS_IF
    return Part("rflags", "as in Xen, interrupts off", hex(rflags), off and control.is_rflags_of_xen(rflags),
                () if off else ("nmi-gate-type",))  # fmt: skip


def _took_an_nmi(context: Context, cpu: int) -> bool:
    """Whether it saves its registers in its handler of the shootdown NMI."""
    return context.identified and not context.is_crashing(cpu)


def _selectors(saved: dict[str, int]) -> Part:
    """DS, ES, FS and GS are still the guest's."""
    names = ("ds", "es", "fs", "gs")
    observed = " ".join(f"{saved[name]:#x}" for name in names)
    return Part("ds es fs gs", "selectors", observed, all(saved[name] < 1 << 16 for name in names))


def _bases(saved: dict[str, int]) -> Part:
    """Of FS and GS, since c8b2488a81 (4.15); a base of 0 cannot be distinguished from none."""
    bases = {name: saved[name] for name in ("fs_base", "gs_base") if name in saved}
    observed = " ".join(f"{base:#x}" for base in bases.values()) or "none"
    return Part("fs and gs base", "canonical", observed, all(map(paging.is_canonical, bases.values())))


def _cr2(context: Context, cpu: int, cr2: int) -> Part:
    """No page fault comes after it was saved."""
    now = _as_now(context, cpu, "cr2")
    return Part("cr2", "any address" if now is None else f"{now:#x}, as now", hex(cr2), now in (None, cr2))


def _cr3(context: Context, cpu: int, cr3: int, cr4: int) -> Part:
    maps = context.owned.maps_xen(cr3) if control.is_cr3(cr3, cr4) else False
    expected, now = "page tables that map Xen", _as_now(context, cpu, "cr3")
    if now is None or maps is not True:
        return Part("cr3", expected, hex(cr3), maps)
    return Part("cr3", f"{expected}: {now:#x}, as now", hex(cr3), cr3 == now)


def _as_now(context: Context, cpu: int, name: str) -> int | None:
    """A register of a CPU that has saved it and is on its way into the halt loop, or there: it keeps it."""
    physical = context.physical(cpu)
    if isinstance(physical, Absent) or not physical.current:
        return None
    saved = context.identified and context.other(cpu).reached(OtherStep.NOTES_SAVED)
    stopped = context.is_other(cpu) and saved
    return physical.registers.get(name) if stopped else None
