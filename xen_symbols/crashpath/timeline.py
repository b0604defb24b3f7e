"""Xen's crash path as one table: each write that it makes, in order, a row each.

PATH reads from top to bottom as Xen runs: kexec_crash() and nmi_shootdown_cpus() on the crashing CPU, do_nmi_crash() on
each other CPU, and on the crashing CPU again what follows the wait, and machine_kexec(). BESIDE holds what may write to
the same gates and is not a step of the path. From the rows follow what an object may be at a stop (`values`), what may
change between two stops and who may have written it (gatechanges.py), which symbols a generation needs (missing.py) and
docs/reference.md.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from xen_symbols.crashpath.generations import Bookkeeping, Generation, Hook
from xen_symbols.crashpath.stages import CrashStep, OtherStep, Span
from xen_symbols.records import NamedTuple
from xen_symbols.x86.gate import VECTOR_MC, VECTOR_NAMES, VECTOR_NMI


class Value(enum.Enum):
    """What an object holds, where that depends on the machine: the checks' context says what it is there."""

    NORMAL = "normal"  # the handler, or the IST, of a running Xen
    CRASHING_CPU = "the crashing CPU's number"
    IDLE_CALLBACK = "none, or that of another part of Xen"
    RUNNING_MODE = "the mode that Xen runs in"
    BOOT_MODE = "the mode in which the firmware left it"
    IS_BOOT_MODE = "whether the firmware left x2APIC on"
    XEN_PHYS_START = "xen_phys_start and the rest"


class Code(str):
    """The address of one of Xen's functions, by its name."""


class Object:
    """Something that the path writes to: one for each CPU, or one for the machine.

    `before` is what it holds before the crash, `offline` the same for a CPU that was not online; None where that is
    not judged. `field` is its name among the state's variables. `exists`: the generations whose symbols are sure to
    name it, where these are not just those that write it.
    """

    def __init__(
        self, name: str, before: Any = None, *, offline: Any = ..., field: str = "",
        exists: Callable[[Generation], bool] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.before, self.field, self.exists = name, before, field, exists
        self.offline = before if offline is ... else offline


class GateProperty(Object):
    """One property of each CPU's gate for a vector; `property` is its name in `Gate`."""

    def __init__(self, vector: int, property: str) -> None:
        super().__init__(f"{VECTOR_NAMES[vector]} gate, {property}", Value.NORMAL)
        self.vector, self.property = vector, property


KEXECING = Object("kexecing", False, field="kexecing")
IN_PROGRESS = Object("KEXEC_FLAG_IN_PROGRESS of kexec_flags", False, field="kexec_flags", exists=lambda _: True)
# 470f58c159 is in 4.2.4, 4.3.2 and 4.4.0: of the generations that count, only some have it.
CRASH_OWNER = Object("crashing_cpu of one_cpu_only()", -1, field="crash_owner",
                     exists=lambda generation: generation.bookkeeping is Bookkeeping.MASK)  # fmt: skip
SAVED = Object("its bit in crash_saved_cpus", False, field="saved")
NOTES = Object("its crash notes", "empty")
CRASH_INFO = Object("the CRASH_INFO note")
WAITING_COUNT = Object("waiting_for_crash_ipi", 0, field="waiting_count")
WAITING_MASK = Object("its bit in waiting_to_crash", False, field="waiting_mask")
NMI_HANDLER, NMI_IST = GateProperty(VECTOR_NMI, "handler"), GateProperty(VECTOR_NMI, "ist")
MC_HANDLER, MC_IST = GateProperty(VECTOR_MC, "handler"), GateProperty(VECTOR_MC, "ist")
EXCEPTION_TABLE = Object("exception_table[2]", Code("do_nmi"), field="exception_table_nmi")
NMI_CALLBACK = Object("nmi_callback", Value.IDLE_CALLBACK, field="nmi_callback", exists=lambda generation: True)
NMI_ENTRIES = Object("its entries into the handler", 0)
NMI_LATCH = Object("its NMI latch")
INTERRUPTS = Object("its interrupts")
ONLINE = Object("its bit in cpu_online_map", True, offline=False, field="online")
SAVE_DONE = Object("its crash_save_done", False)
LAPIC_MODE = Object("its LAPIC's mode", Value.RUNNING_MODE)
LAPIC_ENABLED = Object("its LAPIC, by software", True)
LAPIC_LVT = Object("its local vector table")
SELF_NMI = Object("its ICR, and with it a pending NMI")
X2APIC_ENABLED = Object("x2apic_enabled", field="x2apic_enabled")
REPORT = Object("Xen's console")


class Whose(enum.Enum):
    """Whose object a row writes to. A CPU is CRASHING, OTHER or OFFLINE; the machine as a whole is MACHINE."""

    CRASHING = "the crashing CPU's"
    OTHER = "another's that was online"
    OFFLINE = "that of a CPU going offline, or coming back"
    NOT_CRASHING = "every other's"
    EVERY = "every CPU's"
    MACHINE = "the machine's"


class Writer(NamedTuple):
    """Who makes a write: code of one of these functions (gcc may have put one into the other), on the object's own CPU
    or, not `itself`, on the crashing one. Of a helper that was not inlined the caller is not seen."""

    source: str
    functions: tuple[str, ...]
    itself: bool = True


class Window(NamedTuple):
    """When a write may be made that is not a step: while the crashing CPU is on its way to one of the steps `first` to
    `last`, and the object's own CPU has not completed `until`.

    `with_guest`: only where an HVM guest's state is loaded, or was. `stays`: a stop may find it so.
    """

    first: CrashStep
    last: CrashStep
    until: OtherStep | None = None
    with_guest: bool = False
    stays: bool = False


class Write(NamedTuple):
    """One write: the object is `to` for the CPU that has completed the step `when`, or may become so in a window.

    `where`: the features of the generations that make it.
    """

    object: Object
    whose: Whose
    when: CrashStep | OtherStep | Window
    to: Any
    by: Writer
    where: Mapping[str, Any] = MappingProxyType({})

    def made_in(self, generation: Generation) -> bool:
        for feature, value in self.where.items():  # noqa: SIM110 - on the way of every check of four CPUs
            if getattr(generation, feature) != value:
                return False
        return True

    def made(self, crash: Span, other: Span) -> bool | None:
        """Whether it has been, given how far the crashing CPU and the object's own have come; None where that is not
        sure: the CPU may be on either side of the step, or it is not a step."""
        if isinstance(self.when, Window):
            return None
        span = other if isinstance(self.when, OtherStep) else crash
        return True if span.reached(self.when) else False if span.before(self.when) else None

    @property
    def stays(self) -> bool:
        """Whether a stop may find it."""
        return self.when.stays if isinstance(self.when, Window) else True

    def concerns(self, role: Whose) -> bool:
        if self.whose is Whose.EVERY:
            return role is not Whose.MACHINE
        return self.whose is role or (self.whose is Whose.NOT_CRASHING and role in (Whose.OTHER, Whose.OFFLINE))

    @property
    def window(self) -> Window:
        """When it may be seen to be made: another CPU that answers late takes its steps as late as it answers."""
        if isinstance(self.when, Window):
            return self.when
        if isinstance(self.when, OtherStep):
            return Window(CrashStep.WAITED, CrashStep.LEFT)
        return Window(self.when, self.when)


# -- The functions ----------------------------------------------------------------------------

_RFC = "RFC of 2012-12-04"
# Inline functions, mostly; set_intr_gate and _set_gate are the RFC's.
HELPERS = (
    "set_ist", "_write_gate_lower", "_set_gate_lower", "_update_gate_addr_lower", "enable_each_ist", "disable_each_ist",
    "_set_gate", "set_intr_gate", "__set_intr_gate",
)  # fmt: skip


def _on_crashing(source: str, *functions: str) -> Writer:
    return Writer(source, functions, itself=False)


def _shootdown(source: str) -> Writer:
    return _on_crashing(source, "nmi_shootdown_cpus", "machine_crash_shutdown", *HELPERS)


def _handover(source: str) -> Writer:
    return _on_crashing(source, "machine_kexec", *HELPERS)


_KEXEC_CRASH = _on_crashing("xen/common/kexec.c, kexec_crash", "kexec_crash")
_MARK = _on_crashing("xen/common/kexec.c, one_cpu_only", "one_cpu_only")
_ONE_CPU_ONLY = _on_crashing("xen/common/kexec.c, one_cpu_only (470f58c159)", "one_cpu_only")
_SAVE_CPU = Writer("xen/common/kexec.c, kexec_crash_save_cpu", ("kexec_crash_save_cpu",))
_SAVE_INFO = _on_crashing("xen/common/kexec.c, kexec_crash_save_info", "kexec_crash_save_info")

_NMI_SHOOTDOWN = "77ad1faa6b, nmi_shootdown_cpus"
_ARM = _shootdown("xen/arch/x86/crash.c, nmi_shootdown_cpus")
_OWN_NMI_GATE = _shootdown(f"{_NMI_SHOOTDOWN} (until ad9c7d86c9)")
_OWN_MC_GATE = _shootdown(_NMI_SHOOTDOWN)
_HOOK_GATE = _shootdown(f"{_NMI_SHOOTDOWN} (until cbeeaa7da0)")
_HOOK_TABLE = _shootdown("cbeeaa7da0, nmi_shootdown_cpus (until e7f147bf4a)")
_HOOK_CALLBACK = _shootdown("e7f147bf4a, nmi_shootdown_cpus")
_REMOTE_IST = _shootdown(f"{_RFC}, nmi_shootdown_cpus")
_SAY = _shootdown("f12c1f0b09, nmi_shootdown_cpus")

_DELIVERY = Writer("SDM vol. 3, 6.7.1: an NMI blocks NMIs until the next IRET", ("do_nmi_crash", "crash_nmi_callback"))
_ANSWER = Writer("77ad1faa6b, do_nmi_crash", ("do_nmi_crash", *HELPERS))
_SIGN_OFF = Writer("xen/arch/x86/crash.c, do_nmi_crash", ("do_nmi_crash", "crash_nmi_callback"))
_STOP = Writer("xen/arch/x86/smp.c, __stop_this_cpu", ("__stop_this_cpu",))
_LAPIC_OFF = Writer("xen/arch/x86/apic.c, disable_local_APIC", ("disable_local_APIC", "clear_local_APIC"))
_LAPIC_ON = Writer("xen/arch/x86/apic.c, disconnect_bsp_APIC", ("disable_IO_APIC", "disconnect_bsp_APIC"))

_SWAP = _handover("77ad1faa6b, machine_kexec")
_REWRITE = _handover(f"{_RFC}, machine_kexec")
_OVERTAKE = _handover("77ad1faa6b, machine_kexec: it may overtake do_nmi_crash")
_UNBLOCK = _on_crashing("77ad1faa6b, enable_nmis in machine_kexec", "enable_nmis", "machine_kexec")

# Both are for a CPU that is not online, of which writers are not judged.
_PLAY_DEAD = Writer("73cb1383bf, play_dead", ("play_dead", "idle_loop", *HELPERS))
_COPIED = _on_crashing(
    "cc08c73c8c, cpu_smpboot_alloc: a CPU that comes online starts with a copy of the table",
    "cpu_smpboot_alloc", "cpu_smpboot_callback", "memcpy",
)  # fmt: skip
# 4.2 to 4.10 bit by bit; enable_each_ist and disable_each_ist since.
_SVM = Writer(
    "f9fc2e584d, svm_ctxt_switch_to and svm_ctxt_switch_from", ("svm_ctxt_switch_to", "svm_ctxt_switch_from", *HELPERS)
)

# -- The table --------------------------------------------------------------------------------

_COUNT, _MASK = {"bookkeeping": Bookkeeping.COUNT}, {"bookkeeping": Bookkeeping.MASK}
_HARDENED = {"swaps_mc": True}  # 77ad1faa6b, and the RFC before it
_OWN_GATE = {"own_nmi_gate": True}
_REMOTE = {"clears_remote_ist": True}
_BY_ITSELF = {"swaps_mc": True, "clears_remote_ist": False}
_DONE = {"has_save_done": True}

PATH: tuple[Write, ...] = (
    # kexec_crash(), on the CPU that crashes
    Write(KEXECING, Whose.MACHINE, CrashStep.SAVED, True, _KEXEC_CRASH),
    Write(IN_PROGRESS, Whose.MACHINE, CrashStep.SAVED, True, _MARK),
    Write(CRASH_OWNER, Whose.MACHINE, CrashStep.SAVED, Value.CRASHING_CPU, _ONE_CPU_ONLY),
    Write(SAVED, Whose.CRASHING, CrashStep.SAVED, True, _SAVE_CPU),
    Write(NOTES, Whose.CRASHING, CrashStep.SAVED, "saved", _SAVE_CPU),

    # machine_crash_shutdown() and nmi_shootdown_cpus(), before the NMI is sent
    Write(INTERRUPTS, Whose.CRASHING, CrashStep.ARMED, "off", _ARM),
    Write(WAITING_COUNT, Whose.MACHINE, CrashStep.ARMED, "the number of other CPUs", _ARM, _COUNT),
    Write(WAITING_MASK, Whose.OTHER, CrashStep.ARMED, True, _ARM, _MASK),
    Write(NMI_HANDLER, Whose.CRASHING, CrashStep.ARMED, Code("trap_nop"), _OWN_NMI_GATE, _OWN_GATE),
    Write(NMI_IST, Whose.CRASHING, CrashStep.ARMED, 0, _OWN_NMI_GATE, _OWN_GATE),
    Write(MC_IST, Whose.CRASHING, CrashStep.ARMED, 0, _OWN_MC_GATE, _HARDENED),
    Write(NMI_HANDLER, Whose.NOT_CRASHING, CrashStep.ARMED, Code("nmi_crash"), _HOOK_GATE, {"hook": Hook.GATE}),
    Write(NMI_IST, Whose.NOT_CRASHING, CrashStep.ARMED, 0, _REMOTE_IST, _REMOTE),
    Write(MC_IST, Whose.NOT_CRASHING, CrashStep.ARMED, 0, _REMOTE_IST, _REMOTE),
    Write(EXCEPTION_TABLE, Whose.MACHINE, CrashStep.ARMED, Code("do_nmi_crash"), _HOOK_TABLE,
          {"hook": Hook.EXCEPTION_TABLE}),
    Write(NMI_CALLBACK, Whose.MACHINE, CrashStep.ARMED, Code("do_nmi_crash"), _HOOK_CALLBACK,
          {"hook": Hook.CALLBACK}),
    Write(NMI_CALLBACK, Whose.MACHINE, CrashStep.ARMED, Code("crash_nmi_callback"), _ARM,
          {"hook": Hook.CRASH_CALLBACK}),

    # do_nmi_crash(), on each other CPU (in 4.2 crash_nmi_callback())
    Write(NMI_LATCH, Whose.OTHER, OtherStep.NMI_TAKEN, "blocked", _DELIVERY),
    Write(NMI_ENTRIES, Whose.OTHER, OtherStep.NMI_TAKEN, 1, _DELIVERY),
    Write(MC_IST, Whose.OTHER, OtherStep.MC_IST_CLEARED, 0, _ANSWER, _BY_ITSELF),
    Write(SAVED, Whose.OTHER, OtherStep.NOTES_SAVED, True, _SAVE_CPU),
    Write(NOTES, Whose.OTHER, OtherStep.NOTES_SAVED, "saved", _SAVE_CPU),
    Write(LAPIC_LVT, Whose.OTHER, OtherStep.STOPPED, "masked", _LAPIC_OFF),
    Write(LAPIC_ENABLED, Whose.OTHER, OtherStep.STOPPED, False, _LAPIC_OFF),
    Write(LAPIC_MODE, Whose.OTHER, OtherStep.STOPPED, Value.BOOT_MODE, _LAPIC_OFF),
    Write(ONLINE, Whose.OTHER, OtherStep.STOPPED, False, _STOP),
    Write(SAVE_DONE, Whose.OTHER, OtherStep.DONE, True, _ANSWER, _DONE),
    # The RFC as posted lacks the decrement: waiting-cpus reports it.
    Write(WAITING_COUNT, Whose.OTHER, OtherStep.SIGNED_OFF, "one less", _SIGN_OFF, _COUNT),
    Write(WAITING_MASK, Whose.OTHER, OtherStep.SIGNED_OFF, False, _SIGN_OFF, _MASK),
    Write(SELF_NMI, Whose.OTHER, OtherStep.SELF_NMI, "an NMI to itself", _ANSWER, _DONE),

    # nmi_shootdown_cpus() after its wait. disable_IO_APIC() leaves the crashing CPU's LAPIC, enabled again and
    # unmasked, in virtual-wire mode: its LVT has no row. A CPU that is late may stop while the LAPIC is off.
    Write(REPORT, Whose.MACHINE, CrashStep.WAITED, "Shot down, or failed to shoot down", _SAY, {"announces": True}),
    Write(LAPIC_MODE, Whose.CRASHING, CrashStep.STOPPED, Value.BOOT_MODE, _LAPIC_OFF),
    Write(LAPIC_ENABLED, Whose.CRASHING, CrashStep.STOPPED, False, _LAPIC_OFF),
    Write(ONLINE, Whose.CRASHING, CrashStep.STOPPED, False, _STOP),
    Write(X2APIC_ENABLED, Whose.MACHINE, CrashStep.STOPPED, Value.IS_BOOT_MODE, _ARM),
    Write(LAPIC_ENABLED, Whose.CRASHING, CrashStep.STOPPED, True, _LAPIC_ON),
    Write(CRASH_INFO, Whose.MACHINE, CrashStep.INFO_SAVED, Value.XEN_PHYS_START, _SAVE_INFO),

    # machine_kexec()
    Write(MC_HANDLER, Whose.EVERY, CrashStep.MC_SWAPPED, Code("trap_nop"), _SWAP, _HARDENED),
    Write(MC_IST, Whose.EVERY, CrashStep.MC_SWAPPED, 0, _REWRITE, _REMOTE),
    Write(NMI_LATCH, Whose.CRASHING, CrashStep.NEUTRALISED, "unblocked", _UNBLOCK, _HARDENED),
)  # fmt: skip

_LEAVING = (CrashStep.MC_SWAPPED, CrashStep.MC_SWAPPED)
_RUNNING = (CrashStep.NOTHING, CrashStep.ARMED)
_EVER = (CrashStep.NOTHING, CrashStep.LEFT)
_DEAD = {"dead_cpus_use_trap_nop": True}
_OFFLINE_NMI = Window(*_EVER, stays=True)

# What a stop makes of these is not a matter of steps, and stands in checks/gates.py: a window that does not `stay` is
# for changes between two stops alone.
BESIDE: tuple[Write, ...] = (
    # The word in which the handler is replaced also holds the IST, which a late CPU may take away at that instant. At a
    # stop it is a failure all the same: a #MC on that CPU would use the stack.
    Write(MC_IST, Whose.OTHER, Window(*_LEAVING), Value.NORMAL, _OVERTAKE, _BY_ITSELF),
    # One write of the gate as a whole: the IST is 0 just where the handler is trap_nop.
    Write(NMI_HANDLER, Whose.OFFLINE, _OFFLINE_NMI, Code("trap_nop"), _PLAY_DEAD, _DEAD),
    Write(NMI_IST, Whose.OFFLINE, _OFFLINE_NMI, 0, _PLAY_DEAD, _DEAD),
    # The copied table may be that of a CPU which held an HVM guest's state: at a stop its #DF gate shows that.
    *(Write(gate, Whose.OFFLINE, Window(*_RUNNING), to, _COPIED)
      for handler, ist in ((NMI_HANDLER, NMI_IST), (MC_HANDLER, MC_IST))
      for gate, to in ((handler, Value.NORMAL), (ist, 0), (ist, Value.NORMAL))),
    # AMD: an HVM guest's state comes and goes with the guest, and at a stop the #DF gate, TR and CS show whether it is
    # there. A CPU that has taken the NMI switches no more; the crashing one has its interrupts off by then.
    *(Write(ist, whose, Window(*steps, OtherStep.NMI_TAKEN, with_guest=True), to, _SVM)
      for whose, steps in ((Whose.CRASHING, _RUNNING), (Whose.NOT_CRASHING, _EVER))
      for ist in (NMI_IST, MC_IST) for to in (0, Value.NORMAL)),
)  # fmt: skip

_WRITES: dict[Object, list[Write]] = {}
for _write in (*PATH, *BESIDE):
    _WRITES.setdefault(_write.object, []).append(_write)
BY_FIELD = {written.field: written for written in _WRITES if written.field}


# -- What follows -----------------------------------------------------------------------------


def at_stops(written: Object, generation: Generation | None, role: Whose) -> list[Write]:
    """The rows of an object that a stop may find made to a CPU, in order; of an unknown generation's path none is a
    step, and what is none may be made."""
    rows = [write for write in _WRITES[written] if write.concerns(role) and write.stays]
    if generation is None:
        return [write for write in rows if isinstance(write.when, Window)]
    return [write for write in rows if write.made_in(generation)]


def values(of: Object, writes: Sequence[Write], role: Whose, crash: Span, other: Span) -> tuple[Any, ...]:
    """What an object may be by its writes, given how far the crashing CPU has come, and the CPU whose it is.

    Where a CPU may be on either side of a step both values are allowed: a race window is not a failure.
    """
    found: tuple[Any, ...] = (of.offline if role is Whose.OFFLINE else of.before,)
    for write in writes:
        made = write.made(crash, other)
        if made is not False:
            found = (write.to,) if made else (*found, write.to)
    return tuple(dict.fromkeys(found))


def makes(written: Object, generation: Generation) -> bool:
    """Whether a generation's path writes it at all."""
    return any(write.made_in(generation) for write in _WRITES[written])


def exists_in(written: Object, generation: Generation) -> bool:
    """Whether a generation's symbols are sure to name it."""
    if written.exists is not None:
        return written.exists(generation)
    return makes(written, generation)


def needs_code(name: str, generation: Generation) -> bool:
    """Whether the path of a generation makes anything lead to one of Xen's functions."""
    return any(write.to == name and write.made_in(generation) for write in (*PATH, *BESIDE))
