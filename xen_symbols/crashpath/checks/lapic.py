"""The local APIC of each CPU: its mode, what it may deliver, and the NMI that a parked CPU has sent to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xen_symbols.absence import Absent
from xen_symbols.crashpath.checks.cpus import NO_SELF_NMI, on_its_way, said_by
from xen_symbols.crashpath.checks.model import (
    ByGeneration,
    Check,
    Need,
    Outcome,
    Shows,
    Subject,
    as_written,
    because,
    expect,
    from_absence,
    skip,
    unknown,
)
from xen_symbols.crashpath.context import MACHINE, Context
from xen_symbols.crashpath.timeline import LAPIC_ENABLED, LAPIC_LVT, LAPIC_MODE, SELF_NMI, X2APIC_ENABLED, Value
from xen_symbols.report.model import Verdict
from xen_symbols.targets import Lapic
from xen_symbols.x86 import apic
from xen_symbols.xen.reads import Read


def _read(context: Context, cpu: int, of: Callable[[Lapic], Any]) -> Read:
    lapic = context.lapic(cpu)
    return Read(lapic) if isinstance(lapic, Absent) else Read(of(lapic), said_by(lapic.source))


def _x2apic_enabled(context: Context, _cpu: int) -> Outcome:
    if not context.written(X2APIC_ENABLED, MACHINE):
        return skip("re-evaluated by the crashing CPU after its own stop")
    read = context.state.system[X2APIC_ENABLED.field]
    return because(expect(read, context.allowed(X2APIC_ENABLED, MACHINE)), "lapic-mode")


X2APIC = Check(
    "x2apic-enabled", Subject.MACHINE, "xen/arch/x86/crash.c, nmi_shootdown_cpus",
    "Xen goes on to use the crashing CPU's LAPIC in the wrong mode: #GP, or writes that go nowhere", _x2apic_enabled,
    shows=Shows.SO_ALREADY,
)  # fmt: skip


def _lapic_mode(context: Context, cpu: int) -> Outcome:
    modes = {Value.RUNNING_MODE: context.running_mode, Value.BOOT_MODE: context.boot_mode}
    allowed = tuple(modes[value] for value in context.values(LAPIC_MODE, cpu))
    late = context.is_other(cpu) and not context.written(LAPIC_MODE, cpu)
    if late and context.written(X2APIC_ENABLED, MACHINE) is not False:
        # x2apic_enabled may describe only the crashing CPU by now, and not the mode in which this one ran.
        allowed = (*allowed, apic.Mode.XAPIC.value, apic.Mode.X2APIC.value)
    if len(allowed) > 1:  # from x2APIC to xAPIC a CPU must go through disabled (SDM vol. 3, 11.12.5)
        allowed = (*allowed, apic.Mode.DISABLED.value)
    missing = next((value for value in allowed if isinstance(value, Absent)), None)
    if missing is not None:
        return from_absence(missing)

    def mode(lapic: Lapic) -> Any:
        return lapic.apic_base if isinstance(lapic.apic_base, Absent) else apic.mode(lapic.apic_base).value

    outcome = expect(_read(context, cpu, mode), allowed)
    if outcome.verdict is Verdict.FAIL and outcome.observed == apic.Mode.DISABLED.value and _may_stay_off(context):
        return unknown(_STAYS_OFF, outcome.allowed, outcome.observed)
    return outcome


_STAYS_OFF = (
    "this path switches the LAPIC off and on again by IA32_APIC_BASE (until 77ffa26374, 4.5.0), and QEMU before 9.0 "
    "leaves it off under TCG: judge it under a newer QEMU"
)


def _may_stay_off(context: Context) -> bool:
    """Whether the emulator may be why a LAPIC is off (hw/intc/apic.c: "if disabled, cannot be enabled again", fixed by
    b5ee0468e9d2)."""
    switched = context.identified and context.generation.switches_lapic_off
    return switched and context.memory.target.accelerator != "kvm" and context.boot_mode == apic.Mode.XAPIC.value


MODE = Check(
    "lapic-mode", Subject.ONLINE, "xen/arch/x86/apic.c, disable_local_APIC",
    "the crash kernel finds the LAPIC in a mode that it does not expect and hangs or faults", _lapic_mode,
    needs=Need.DEVICE_STATE, shows=Shows.SO_ALREADY, by_generation=ByGeneration.ONCE_BEGUN,
)  # fmt: skip


_XAPIC_IDS = 255  # of eight bits, and the last one is everybody's (SDM vol. 3, 11.4.6)


def _lapic_id(context: Context, cpu: int) -> Outcome:
    own = context.state.of(cpu).apic_id
    if own.present and own.value >= _XAPIC_IDS:
        return skip("an APIC id of more than eight bits is not in the LAPIC's registers as QEMU has them")
    if isinstance(own.value, Absent):
        return unknown(own.value.reason)
    return expect(_read(context, cpu, lambda lapic: lapic.apic_id), (own.value,))


ID = Check(
    "lapic-id", Subject.ONLINE, "xen/arch/x86/smpboot.c, x86_cpu_to_apicid; do_nmi_crash goes by the register",
    "what Xen sends to this CPU reaches another, and the NMI that it sends to itself does, too", _lapic_id,
    needs=Need.LAPIC, shows=Shows.NOT_BROKEN, by_generation=ByGeneration.NEVER,
)  # fmt: skip


def _read_enabled(context: Context, cpu: int) -> Read:
    def enabled(lapic: Lapic) -> bool | Absent:
        return lapic.spiv if isinstance(lapic.spiv, Absent) else bool(lapic.spiv & apic.SPIV_SOFTWARE_ENABLE)

    return _read(context, cpu, enabled)


ENABLED = Check(
    "lapic-enabled", Subject.ONLINE, "xen/arch/x86/apic.c, disable_local_APIC",
    "a stopped CPU still takes interrupts, or a running one none",
    # One that died may have been about to stop.
    as_written(LAPIC_ENABLED, _read_enabled, because_of={False: ("fatal-trap",)}),
    {False: "this stopped CPU still takes interrupts", True: "this CPU takes no interrupts, and should"},
    Need.LAPIC, by_generation=ByGeneration.ONCE_BEGUN,
)  # fmt: skip


def _lapic_lvt(context: Context, cpu: int) -> Outcome:
    if not context.written(LAPIC_LVT, cpu):
        return skip("it is not stopped" if not context.is_crashing(cpu) else "it ends in virtual-wire mode")

    def unmasked(lapic: Lapic) -> tuple[str, ...] | Absent:
        if isinstance(lapic.lvt, Absent):
            return lapic.lvt
        entries = zip(apic.LVT_NAMES, lapic.lvt, strict=True)
        return tuple(name for name, entry in entries if not entry & apic.LVT_MASKED)

    return because(expect(_read(context, cpu, unmasked), ((),), list), "lapic-enabled")


LVT = Check(
    "lapic-lvt", Subject.OTHERS, "xen/arch/x86/apic.c, clear_local_APIC",
    "a local interrupt may wake the parked CPU: the entries of its local vector table that are named here are not "
    "masked", _lapic_lvt, needs=Need.LAPIC,
)  # fmt: skip


def _lapic_self_nmi(context: Context, cpu: int) -> Outcome:
    if not context.makes(SELF_NMI):
        return skip(NO_SELF_NMI)
    early = on_its_way(context, cpu)
    if early:
        return early

    def target(lapic: Lapic) -> str | Absent:
        # Xen's number for it, not the record's own: that may be another CPU's.
        own = context.state.of(cpu).apic_id.value
        for part in (lapic.apic_base, lapic.icr_low, lapic.icr_high, own):
            if isinstance(part, Absent):
                return part
        assert isinstance(lapic.icr_low, int) and isinstance(lapic.icr_high, int) and isinstance(lapic.apic_base, int)
        low = lapic.icr_low
        if low & apic.ICR_DELIVERY_MODE != apic.ICR_DELIVERY_NMI:
            return f"no NMI (ICR {low:#x})"
        if low & (apic.ICR_SHORTHAND | apic.ICR_DESTINATION_LOGICAL):
            return f"an NMI by shorthand or logical destination (ICR {low:#x})"
        destination = apic.icr_destination(lapic.icr_high, apic.mode(lapic.apic_base))
        return "an NMI to itself" if destination == own else f"an NMI to APIC ID {destination}"

    return expect(_read(context, cpu, target), ("an NMI to itself",))


SELF = Check(
    "lapic-self-nmi", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
    "no NMI is pending while NMIs are blocked: a later IRET on this CPU (from a machine check) would let it run on",
    _lapic_self_nmi, needs=Need.DEVICE_STATE,
)  # fmt: skip

CHECKS = (X2APIC, MODE, ID, ENABLED, LVT, SELF)
