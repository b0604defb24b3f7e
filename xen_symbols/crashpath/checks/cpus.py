"""Each CPU itself: whether all were found, and how those that answered are left."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.crashpath.checks.model import (
    NO_DUMP,
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
    unknown,
)
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.stages import AFTERWARDS, CrashStep, OtherStep
from xen_symbols.crashpath.timeline import NMI_LATCH, SELF_NMI
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.targets import PhysicalCpu
from xen_symbols.text import cpu_list
from xen_symbols.xen.memory import image_region
from xen_symbols.xen.reads import Read, mask

_RFLAGS_IF = 1 << 9

# -- Whether every CPU was found --------------------------------------------------------------

_MASKS = ("online", "saved", "waiting_mask")
_STRAYS_MAX = 4  # CPUs that are named one by one
# Where Xen leaves a CPU that is no longer online: xen/arch/x86/domain.c, acpi/cpu_idle.c, smp.c.
_AT_REST = {"play_dead", "default_dead_idle", "acpi_dead_idle", "stop_this_cpu"}


def _cpus_found(context: Context, _cpu: int) -> Outcome:
    """Whether every CPU that Xen's masks, the machine or the dump's notes mention is among those judged."""
    state, online = context.state, context.position.online
    known, lost = set(online), []
    evidence: tuple[Evidence, ...] = ()
    for read in (state.system[name] for name in _MASKS):
        if read.raw is None:
            continue
        evidence += read.evidence
        if beyond := int.from_bytes(read.raw, "little") >> len(state.cpus):
            numbers = {len(state.cpus) + bit for bit in mask(beyond.to_bytes(len(read.raw), "little"))}
            known |= numbers
            lost.append(f"{cpu_list(numbers)} in {read.symbol}, and nr_cpu_ids is {len(state.cpus)}")
    known |= {cpu for name in _MASKS if (read := state.system[name]).present for cpu in read.value - online}
    if absentees := {cpu for cpu in known if cpu in state.cpus and not state.cpus[cpu].exists}:
        lost.append(f"online, but without a per-CPU area: {cpu_list(absentees)}")
    unmatched: list[tuple[int | None, PhysicalCpu | Absent]] = [(None, one) for one in state.unmatched]
    offline = [(cpu.cpu, cpu.physical) for cpu in state.cpus.values() if cpu.exists and cpu.cpu not in online]
    strays = []
    for number, one in (*offline, *unmatched):
        if not isinstance(one, Absent) and (at := _at_work(context, one)):
            whose = "none of the CPUs found in Xen's memory" if number is None else f"CPU {number}, which is not online"
            strays.append(f"{one.source or 'the target'}: its CPU {one.index} {at}, and is {whose}")
    lost += strays[:_STRAYS_MAX]
    if len(strays) > _STRAYS_MAX:
        lost.append(f"{len(strays) - _STRAYS_MAX} more like these")
    if not known:
        lost.append("no CPU is online")
    lost += _shared(context, known)
    found = {cpu for cpu in known if cpu in state.cpus and state.cpus[cpu].exists}
    if lost:
        return Outcome(Verdict.UNKNOWN, cpu_list(known), cpu_list(found), evidence, "; ".join(lost))
    reason = f"{len(unmatched)} of the machine's CPUs are not used by Xen" if unmatched else None
    return Outcome(Verdict.PASS, cpu_list(known), cpu_list(found), evidence, reason)


def _shared(context: Context, cpus: set[int]) -> list[str]:
    """What two CPUs have and each should have for itself: of one of them another's is judged."""
    idts: dict[int, set[int]] = {}
    areas: dict[int, set[int]] = {}
    for cpu in (context.state.cpus[number] for number in cpus if number in context.state.cpus):
        if cpu.exists:
            areas.setdefault(cpu.per_cpu_offset, set()).add(cpu.cpu)
        if cpu.idt.present:
            idts.setdefault(cpu.idt.value, set()).add(cpu.cpu)
    named = (("IDT", idts), ("per-CPU area", areas))
    return [f"{cpu_list(two)} have one {what}" for what, held in named for two in held.values() if len(two) > 1]


def _at_work(context: Context, physical: PhysicalCpu) -> str | None:
    """The evidence that a CPU is, or was, one that Xen runs on; None if there is none."""
    if not physical.current:
        return "saved its registers" if physical.registers else None
    rip = physical.registers.get("rip")
    if rip is None:
        return "may run Xen: its registers could not be read"
    if physical.guest_mode is True or _outside_xen(context, physical):
        return None
    found = context.symbols.lookup(rip)
    if found is not None and found[0].name in _AT_REST:
        return None
    return f"runs Xen ({context.symbols.describe(rip)})"


def _outside_xen(context: Context, physical: PhysicalCpu) -> bool:
    rip = physical.registers.get("rip")
    return rip is not None and image_region(rip) != image_region(context.symbols.address("idle_pg_table"))


FOUND = (
    Check(
        "cpus-found", Subject.MACHINE, "xen/arch/x86/percpu.c and smpboot.c (7cfb005362)",
        "never fails; UNKNOWN if a CPU that was online is not found among Xen's, or has another's IDT or per-CPU area",
        _cpus_found, shows=Shows.NOT_BROKEN, by_generation=ByGeneration.NEVER,
    ),
)  # fmt: skip

# -- What a CPU does, and how that is known ---------------------------------------------------


@lru_cache
def said_by(source: str) -> tuple[Evidence, ...]:
    return (Evidence(source),) if source else ()


def _physical_read(context: Context, cpu: int, of: Callable[[PhysicalCpu], Any]) -> Read:
    physical = context.physical(cpu)
    value = physical if isinstance(physical, Absent) else of(physical)
    return Read(value) if isinstance(physical, Absent) else Read(value, said_by(physical.source))


def on_its_way(context: Context, cpu: int) -> Outcome | None:
    """What the last steps of another CPU leave can be judged once Xen hands over; None means judge it now."""
    if not context.crash.reached(CrashStep.NEUTRALISED):
        return skip("Xen has not handed over yet")
    if context.other(cpu).before(OtherStep.SELF_NMI) or context.position.subject == cpu:  # it has stopped on its way
        return skip("it has not got that far")
    physical = context.physical(cpu)
    if isinstance(physical, Absent) or not physical.current or context.other(cpu).reached(OtherStep.PARKED):
        return None
    if physical.halted is True:
        return None
    inside = _in_function(context, physical, context.generation.parks_in)
    if isinstance(inside, Absent):
        return from_absence(inside)
    if not inside or _stands(context, physical) != _AWAKE:
        return None
    if context.position.stage is AFTERWARDS:
        return None
    if context.followed and context.followed.looks is not None:
        return skip("it has signed off and is still on its way into the halt loop: it is looked at again later")
    return unknown("it is awake where it should halt: look again, it may have been on its way into the halt loop")


def _in_function(context: Context, physical: PhysicalCpu, name: str) -> bool | Absent:
    try:
        start, end = context.symbols.extent(name)
    except Unreadable as error:
        return error.absent
    if "rip" not in physical.registers:
        return Absent("its registers could not be read")
    return start <= physical.registers["rip"] < end


_HALTED, _AFTER_HLT, _AWAKE = "halted in", "after HLT in", "awake in"


def _stands(context: Context, physical: PhysicalCpu) -> str | Absent:
    """Whether a CPU in Xen's code is halted; where the target does not say so, whether it may be."""
    if not isinstance(physical.halted, Absent):
        return _HALTED if physical.halted else _AWAKE
    after = context.halts.behind_hlt(physical.registers["rip"])
    if isinstance(after, Absent):
        return after
    return _AFTER_HLT if after else _AWAKE


# -- Its NMIs, once it has answered -----------------------------------------------------------


def _nmi_latch(context: Context, cpu: int) -> Outcome:
    read = _physical_read(context, cpu, lambda physical: physical.nmi_blocked)
    if not context.written(NMI_LATCH, cpu):
        crashing = context.is_crashing(cpu)
        return skip("NMIs are unblocked in machine_kexec" if crashing else "it may not have taken the NMI yet")
    outcome = expect(read, context.allowed(NMI_LATCH, cpu), of=_latch)
    return because(outcome, "enable-nmis") if context.is_crashing(cpu) else outcome


def _latch(blocked: bool) -> str:
    return "blocked" if blocked else "unblocked"


LATCH = Check(
    "nmi-latch", Subject.ONLINE, "xen/arch/x86/machine_kexec.c, enable_nmis (77ad1faa6b)",
    "the crash kernel starts with NMIs blocked and without a watchdog, or a parked CPU can be woken", _nmi_latch,
    {"unblocked": "the crash kernel starts with NMIs blocked: its watchdog and its own crash NMIs do not work",
     "blocked": "NMIs are unblocked on this CPU while it runs its NMI handler, or is parked in it: the next one starts "
     "it again"},
    Need.DEVICE_STATE, Shows.SO_ALREADY,
)  # fmt: skip


def _nmi_pending(context: Context, cpu: int) -> Outcome:
    if not context.makes(SELF_NMI):
        return skip(NO_SELF_NMI)
    early = on_its_way(context, cpu)
    pending = expect(_physical_read(context, cpu, lambda physical: physical.nmi_pending), (True,))
    return early or because(pending, "lapic-self-nmi")


NO_SELF_NMI = "this generation queues no NMI to itself"
PENDING = Check(
    "nmi-pending", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
    "no NMI is pending on the parked CPU: an IRET there (from a machine check) lets it run on",
    _nmi_pending, needs=Need.DEVICE_STATE,
)  # fmt: skip

# -- Whether it died -------------------------------------------------------------------------

_NEVER_SIGNS_OFF = (
    "it never signs off: the crashing CPU waits for it in vain, and it is not stopped for the crash kernel"
)


def _fatal_trap(context: Context, cpu: int) -> Outcome:
    death = context.deaths[cpu]
    evidence = []
    if death.frame is not None:
        evidence.append(Evidence("memory", death.frame, None, "struct cpu_user_regs"))
    if death.lines:
        evidence.append(Evidence("Xen's console ring"))
    said = [f"Xen said: {'; '.join(death.lines)}"] if death.lines else []
    known = [f"{death.defect.says}: fixed by {death.defect.source}"] if death.defect else []
    consequence = NO_DUMP if context.is_crashing(cpu) else _NEVER_SIGNS_OFF
    reason = "; ".join([*said, *known, consequence])
    return Outcome(Verdict.FAIL, "none", f"{death.event} at {death.at}", tuple(evidence), reason)


FATAL_TRAP = Check(
    "fatal-trap", Subject.DIED, "xen/arch/x86/traps.c, fatal_trap; xen/common/kexec.c, one_cpu_only (470f58c159)",
    f"an exception, or a panic, ended the crash path: {NO_DUMP}", _fatal_trap, needs=Need.REGISTERS,
    shows=Shows.NOT_BROKEN, by_generation=ByGeneration.NEVER,
)  # fmt: skip

# -- How it is left ---------------------------------------------------------------------------


def _cpu_parked(context: Context, cpu: int) -> Outcome:
    early = on_its_way(context, cpu)
    if early:
        return early
    function = context.generation.parks_in
    known = context.physical(cpu)
    known_halted = isinstance(known, Absent) or not isinstance(known.halted, Absent)
    parked = f"{_HALTED if known_halted else _AFTER_HLT} {function}, interrupts off"

    def where(physical: PhysicalCpu) -> str | Absent:
        if not physical.current:
            return Absent("the registers are those saved in the notes", Kind.NOT_HELD)
        if "rip" not in physical.registers or "rflags" not in physical.registers:
            return Absent("its registers could not be read")
        interrupts = "on" if physical.registers["rflags"] & _RFLAGS_IF else "off"
        inside = _in_function(context, physical, function)
        if isinstance(inside, Absent):
            return inside
        stands = _stands(context, physical) if inside or known_halted else ""
        if isinstance(stands, Absent):
            return stands
        if inside and stands != _AWAKE and interrupts == "off":
            after = context.halts.behind_hlt(physical.registers["rip"])  # RIP of a halted CPU is behind a HLT
            loops = context.halts.again(physical.registers["rip"], function) if after is True else after
            if loops is True or isinstance(loops, Absent):
                return parked if loops is True else loops
            stands = "halted once, in no loop, in" if after else "halted, and not after a HLT, in"
        at = context.symbols.describe(physical.registers["rip"])
        return f"{stands} {at}, interrupts {interrupts}".lstrip()

    outcome = because(expect(_physical_read(context, cpu, where), (parked,)), "fatal-trap")
    if outcome.verdict is Verdict.FAIL and context.position.stage is AFTERWARDS and context.followed:
        times = f"{context.followed.looks} time{'s' * (context.followed.looks != 1)}"
        return outcome._replace(reason=f"it was looked at {times} after the handover: {PARKED.consequence}")
    return outcome


PARKED = Check(
    "cpu-parked", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash's halt loop (77ad1faa6b)",
    "it still runs, or can be woken, while the crash kernel takes the machine over", _cpu_parked,
    needs=Need.REGISTERS,
)  # fmt: skip


def _idtr(context: Context, cpu: int) -> Outcome:
    state = context.state.of(cpu)
    if context.no_idt:
        return from_absence(context.no_idt)

    def table(physical: PhysicalCpu) -> tuple[int, int] | Absent:
        if physical.guest_mode is True:
            return Absent("it is in a guest: IDTR is the guest's", Kind.NOT_APPLICABLE)
        if not physical.current or not isinstance(physical.guest_mode, Absent) or not _outside_xen(context, physical):
            return physical.idtr
        if physical.idtr == (state.idt.value, 0xFFF):
            return physical.idtr
        if context.guest_state_loaded(state) is True:
            return Absent("it runs outside Xen with an HVM guest's state: IDTR is the guest's", Kind.NOT_APPLICABLE)
        return Absent(f"it runs outside Xen, in perhaps an HVM guest, whose IDTR this is: {physical.guest_mode.reason}")

    if not state.idt.present:
        return from_absence(state.idt.value)
    return expect(
        _physical_read(context, cpu, table),
        ((state.idt.value, 0xFFF),),
        lambda value: {"base": hex(value[0]), "limit": value[1]},
    )


IDTR = Check(
    "idtr", Subject.ONLINE, "xen/arch/x86/cpu/common.c, load_system_tables",
    "the CPU does not use the IDT that Xen writes to: it takes other handlers than the gates show", _idtr,
    needs=Need.REGISTERS, shows=Shows.NOT_BROKEN, by_generation=ByGeneration.NEVER,
)  # fmt: skip

LEFT = (LATCH, PENDING, PARKED, IDTR)
