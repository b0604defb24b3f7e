"""How a CPU runs on the crash path: with interrupts off, on its own stack, and by its own task state segment."""

from __future__ import annotations

from collections.abc import Callable

from xen_symbols.absence import Absent, Kind
from xen_symbols.crashpath.checks import registers
from xen_symbols.crashpath.checks.cpus import said_by
from xen_symbols.crashpath.checks.model import (
    ByGeneration,
    Check,
    Need,
    Outcome,
    Shows,
    Subject,
    because,
    expect,
    from_absence,
    skip,
)
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.stages import CrashStep, OtherStep
from xen_symbols.crashpath.timeline import INTERRUPTS
from xen_symbols.report.model import Verdict
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86.control import RFLAGS_IF
from xen_symbols.xen.cpuinfo import IST_SSP_SIZE
from xen_symbols.xen.memory import image_region
from xen_symbols.xen.reads import Read

_SAVED_ONES = Absent("the registers are those saved in the notes", Kind.NOT_HELD)
_UNREAD = Absent("its registers could not be read")


def _register(context: Context, cpu: int, name: str) -> tuple[int | Absent, PhysicalCpu | None]:
    """A register as it is now, of a CPU that is in Xen."""
    physical = context.physical(cpu)
    if isinstance(physical, Absent):
        return physical, None
    if not physical.current:
        return _SAVED_ONES, physical
    if "rip" not in physical.registers or name not in physical.registers:
        return _UNREAD, physical
    if _outside_xen(context, physical):
        return Absent("it runs outside Xen", Kind.NOT_APPLICABLE), physical
    return physical.registers[name], physical


def _outside_xen(context: Context, physical: PhysicalCpu) -> bool:
    xen = image_region(context.symbols.address("idle_pg_table"))
    return physical.guest_mode is True or image_region(physical.registers["rip"]) != xen


# -- Interrupts of the crashing CPU -----------------------------------------------------------


def _interrupts(context: Context, cpu: int) -> Outcome:
    if not context.written(INTERRUPTS, cpu):
        return skip("it switches its interrupts off in nmi_shootdown_cpus")
    rflags, physical = _register(context, cpu, "rflags")
    allowed = context.allowed(INTERRUPTS, cpu)
    if isinstance(rflags, Absent) or physical is None:
        return expect(Read(rflags), allowed)
    outcome = expect(Read("on" if rflags & RFLAGS_IF else "off", said_by(physical.source)), allowed)
    if outcome.verdict is not Verdict.PASS:
        return outcome
    notes = context.state.of(cpu).notes.value
    before = Absent("") if isinstance(notes, Absent) else notes.registers
    if isinstance(before, Absent) or before["rflags"] & RFLAGS_IF:
        return outcome
    return outcome._replace(reason="they were off before, when it saved its registers: nothing shows that Xen did it")


INTERRUPTS_OFF = Check(
    "crashing-cpu-interrupts", Subject.CRASHING,
    "xen/arch/x86/crash.c, nmi_shootdown_cpus: local_irq_disable() (6dd60f6880, in every generation); "
    "machine_kexec does it again (2de77fa3cd)",
    "an interrupt on the crashing CPU runs a handler, and what that schedules, while the others stop: it takes locks "
    "that a stopped CPU holds, or the crash never ends", _interrupts, needs=Need.REGISTERS,
    shows=Shows.SO_ALREADY,
)  # fmt: skip

# -- Its stack --------------------------------------------------------------------------------


def _in_the_crash(context: Context, cpu: int) -> bool:
    """Whether it is sure to run Xen's code of the crash path, in C: before, a guest's stack pointer may be there."""
    if context.is_crashing(cpu):
        return context.crash.reached(CrashStep.SAVED)
    return context.identified and context.other(cpu).reached(OtherStep.NOTES_SAVED)


_MAY_BE_A_GUESTS = skip("it may run a guest, or be on its way into Xen: no stack of Xen's is in use there")


def _stack(context: Context, cpu: int) -> Outcome:
    sure = _in_the_crash(context, cpu)
    if not sure and context.position.crashing_cpu is None:
        return _MAY_BE_A_GUESTS
    rsp, physical = _register(context, cpu, "rsp")
    if isinstance(rsp, Absent) or physical is None:
        absence = rsp if isinstance(rsp, Absent) else _UNREAD
        return from_absence(absence) if sure else _MAY_BE_A_GUESTS
    if not sure:
        whose = context.owned.owner(rsp)
        if whose is None:
            lost = context.owned.unknown()
            return _MAY_BE_A_GUESTS if lost is None else from_absence(lost, "on a stack of its own")
        at = f"{rsp:#x}, on {context.owned.whose(rsp)}"
        verdict = Verdict.PASS if whose == cpu else Verdict.FAIL
        return because(Outcome(verdict, "on a stack of its own", at, said_by(physical.source)), "tr")
    stacks = context.owned.stacks(cpu)
    if not isinstance(stacks, Absent) and stacks.processor_id != cpu:
        if isinstance(stacks.processor_id, Absent):
            return from_absence(stacks.processor_id, "on a stack of its own")
        at = f"{rsp:#x}, on a stack whose struct cpu_info says CPU {stacks.processor_id}"
        return Outcome(Verdict.FAIL, "on a stack of its own", at, said_by(physical.source))
    part = registers.stack_pointer(context, cpu, rsp)
    if isinstance(part.right, Absent):
        return from_absence(part.right, part.expected)
    verdict = Verdict.PASS if part.right else Verdict.FAIL
    outcome = Outcome(verdict, part.expected, part.observed, said_by(physical.source))
    return because(outcome, *part.explained_by, "tr")


STACK = Check(
    "cpu-stack", Subject.ONLINE, "xen/arch/x86/include/asm/current.h; load_system_tables in xen/arch/x86/cpu/common.c",
    "it runs on memory that another CPU, or nothing of Xen's, uses as its stack: both return to garbage", _stack,
    needs=Need.REGISTERS, shows=Shows.NOT_BROKEN, by_generation=ByGeneration.NEVER,
)  # fmt: skip

# -- Its TSS ----------------------------------------------------------------------------------

_IN_A_GUEST = Absent("it is in a guest: TR is the guest's", Kind.NOT_APPLICABLE)
_OF_A_GUEST = Absent("an HVM guest's state is loaded there: TR may be the guest's", Kind.NOT_APPLICABLE)


def _tr(context: Context, cpu: int) -> Outcome:
    state = context.state.of(cpu)
    if isinstance(state.tss, Absent):
        return from_absence(state.tss)
    own = (state.tss, state.tss + IST_SSP_SIZE)  # in a page of its own it may have a shadow-stack table before it

    def base(physical: PhysicalCpu) -> object:
        if isinstance(physical.tr_base, Absent) or physical.tr_base in own:
            return physical.tr_base
        if physical.guest_mode is True:
            return _IN_A_GUEST
        loaded = context.guest_state_loaded(state)
        if loaded is True:
            return _OF_A_GUEST
        if isinstance(loaded, Absent):
            return loaded
        if "rip" not in physical.registers:
            return _UNREAD
        if isinstance(physical.guest_mode, Absent) and _outside_xen(context, physical):
            return Absent(f"it runs outside Xen, in an HVM guest perhaps, whose TR this is: {physical.guest_mode}")
        return physical.tr_base

    return expect(_of(context, cpu, base), own, lambda address: {"base": hex(address)})


def _of(context: Context, cpu: int, of: Callable[[PhysicalCpu], object]) -> Read:
    physical = context.physical(cpu)
    return Read(physical) if isinstance(physical, Absent) else Read(of(physical), said_by(physical.source))


TR = Check(
    "tr", Subject.ONLINE, "xen/arch/x86/cpu/common.c, load_system_tables",
    "an NMI or a machine check on this CPU is taken on a stack that another CPU uses, or on none", _tr,
    needs=Need.REGISTERS, shows=Shows.NOT_BROKEN, by_generation=ByGeneration.NEVER,
)  # fmt: skip

CHECKS = (INTERRUPTS_OFF, STACK, TR)
