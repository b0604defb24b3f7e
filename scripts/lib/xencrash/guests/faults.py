"""The guest's faults: ways in which the patch can be, or was, wrong, and what shows each.

Each row names the features (rows of generation.h) that a generation must have, or with a "!" must not have, for the
fault to apply to it. fault.h has the same names, and fault.c says what each does at which step of the path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from xencrash.guests.generations import feature, generations


def _has(generation: str, features: Iterable[str]) -> bool:
    return all(bool(feature(generation, name.lstrip("!"))) is not name.startswith("!") for name in features)


@dataclass(frozen=True)
class Expected:
    """A failure that must be found. No failure that is not listed may be.

    `cpu`: "C", the crashing CPU; "F", the faulty one (fault_cpu); "O", each CPU but C; None, the whole machine.
    `stage`: the first at which it can be seen. Failures that follow from another, by the report, are not listed.
    """

    check: str
    cpu: str | None
    stage: str
    needs: tuple[str, ...] = ()

    def cpus(self, crashing: int, faulty: int, online: Iterable[int]) -> tuple[int | None, ...]:
        if self.cpu == "O":
            return tuple(cpu for cpu in online if cpu != crashing)
        return ({"C": crashing, "F": faulty, None: None}[self.cpu],)


@dataclass(frozen=True)
class Storm:
    """The kind of experiment that shows a fault (`xencrash.lab.storm.explore.KINDS`), and the outcomes (`what`)."""

    kind: str
    what: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. `does` is one sentence; `words` is what selects it on the guest's command line.

    `invisible` says why no state that can be read shows it; "" for a fault that can be seen. `x2apic` is what the
    guest must be booted with to show it: "", "x2apic" or "x2apic=firmware". `not_in_a_dump` says why a dump taken at
    the end no longer shows it; "" if it does. `mended_with` is the feature of generations in which machine_kexec()
    undoes it. `gates`: only a trace that watches who writes to gates (`--gates`) shows it.
    `nobody_signs_off`: every other CPU is still waited for, which explains the count that the RFC as posted leaves.
    `storm`: the experiments of `lab storm` that show it; nothing else does.
    """

    id: str
    does: str
    needs: tuple[str, ...] = ()
    findings: tuple[Expected, ...] = ()
    invisible: str = ""
    cpus: int = 2  # the least with which it can be shown
    most_cpus: int = 16  # beyond this, what else happens at the same time decides what is seen first
    x2apic: str = ""
    words: str = field(default="")
    not_in_a_dump: str = ""
    mended_with: str = ""
    gates: bool = False
    nobody_signs_off: bool = False
    storm: Storm | None = None

    def __post_init__(self) -> None:
        if not self.words:
            object.__setattr__(self, "words", f"fault={self.id}")

    @property
    def visible(self) -> bool:
        return not self.invisible

    @property
    def generations(self) -> tuple[str, ...]:
        """Those to which it applies."""
        return tuple(generation for generation in generations() if _has(generation, self.needs))

    def gone_from_a_dump(self, generation: str) -> bool:
        """Whether a dump taken at the end does not show it."""
        return bool(self.not_in_a_dump or (self.mended_with and _has(generation, (self.mended_with,))))

    def expected(self, generation: str) -> tuple[Expected, ...]:
        """All that should be found in one generation with 3 CPUs or more. In `rfc-v1` that includes its own defect
        (with 2 CPUs, the one that a fault keeps from signing off explains it)."""
        found = tuple(finding for finding in self.findings if _has(generation, finding.needs))
        return found if self.nobody_signs_off else found + clean(generation)


def clean(generation: str) -> tuple[Expected, ...]:
    """What is found without any fault (with 2 CPUs or more): nothing, except in the RFC as posted."""
    return (Expected("waiting-cpus", None, "shootdown-done"),) if _has(generation, ("!SIGNS_OFF",)) else ()


_SILENT = Expected("nmi-answered", "F", "shootdown-done")
_NO_IRET = Expected("enable-nmis", None, "handover")  # NMIs that are blocked follow from it
_LOST = Expected("trace-complete", "C", "handover")
# In 4.2.0 nothing in memory names the crashing CPU by then.
_DIES = (Expected("fatal-trap", "C", "crashing", ("HARDENED",)),
         Expected("trace-complete", "C", "handover", ("!HARDENED",)))
_IN_DEVICES = "QEMU's dumps hold neither the local APICs nor the NMI latches"
_OVER = "by then the CPU has done all of it, in the wrong order"
_ON_ITS_WAY = "it shows a machine on the crash path, but not that it is stuck there"
_IN_A_STORM = "it is harmless unless an NMI, a machine check or a delay comes at the wrong moment: `xencrash lab storm`"
_COUNT, _MASK = ("WAITS_FOR_COUNTER",), ("!WAITS_FOR_COUNTER",)

# A wrong property of a gate: its name, what the fault does, and what else fails on a CPU that takes its NMI through it.
_GATE = (
    ("present", "is not present", None),
    ("handler", "leads a few bytes past the handler's beginning", None),
    ("selector", "has the data segment's selector", None),
    # The RFC's nmi_crash begins with cli.
    ("type", "is a trap gate", Expected("cpu-parked", "F", "handover", ("!REWRITES_GATES",))),
    ("dpl", "has privilege level 3", None),
    ("reserved", "has a reserved bit set", None),
)

FAULTS: tuple[Fault, ...] = (
    # Bookkeeping
    Fault("no-sign-off", "A CPU stops without signing off: the one defect of the RFC as posted, on one CPU alone.",
          ("SIGNS_OFF",), (Expected("waiting-cpus", None, "shootdown-done", _COUNT),
                           Expected("waiting-cpus", "F", "shootdown-done", _MASK))),
    Fault("sign-off-first", "A CPU signs off before it has saved its registers and stopped.",
          ("SIGNS_OFF",), (Expected("waiting-cpus", None, "cpu-save", _COUNT),
                           Expected("waiting-cpus", "F", "cpu-save", _MASK)), not_in_a_dump=_OVER),
    Fault("save-done-early", "A CPU sets crash_save_done before its registers are saved.",
          ("HARDENED",), (Expected("crash-save-done", "F", "cpu-save"),), not_in_a_dump=_OVER),
    Fault("save-done-never", "A CPU never sets crash_save_done: a second NMI would stop it a second time.",
          ("HARDENED",), (Expected("crash-save-done", "F", "shootdown-done"),)),
    Fault("save-done-on-crasher", "crash_save_done is set on the crashing CPU, which was never shot down.",
          ("HARDENED",), (Expected("crash-save-done", "C", "shootdown"),), cpus=1),
    Fault("still-online", "A CPU stops and leaves its bit in cpu_online_map.",
          (), (Expected("online-cpus", "F", "shootdown-done"),)),
    Fault("second-entry", "A CPU unblocks NMIs before it queues its own, and enters the handler a second time.",
          ("HARDENED",), (Expected("nmi-entries", "F", "shootdown-done"),),
          not_in_a_dump="only a trace of the crash can count how often the handler is entered"),
    Fault("wait-ends-early", "The crashing CPU goes on while a CPU has yet to save its registers.",
          ("SIGNS_OFF",), (_SILENT,)),
    Fault("owner-wrong", "one_cpu_only() records a CPU that did not crash.",
          ("RECORDS_OWNER",), (Expected("crash-owner", None, "shutdown-entry"),)),
    Fault("kexecing-unset", "kexecing stays false: the local APICs keep their mode.",
          (), (Expected("kexecing", None, "shutdown-entry"),), cpus=1),
    # The NMI and its handler
    Fault("hook-missing", "The NMI is sent with nothing hooked: every CPU runs its ordinary handler.",
          ("!HOOKS_GATES",), (Expected("nmi-dispatch", None, "shootdown"),), cpus=1),
    Fault("hook-restored", "Another user of nmi_callback puts back what it found there, after the crash path's hook.",
          ("HOOKS_CALLBACK", "HARDENED"), (Expected("nmi-dispatch", None, "shootdown"),), cpus=1),
    Fault("nmi-gate-not-hooked", "One CPU's NMI gate is forgotten.",
          ("HOOKS_GATES",), (Expected("nmi-gate-handler", "F", "shootdown"),)),
    Fault("handlers-exchanged", "nmi_crash goes to the crashing CPU, and trap_nop to all others.",
          ("HOOKS_GATES",), (Expected("nmi-gate-handler", "C", "shootdown"),
                             Expected("nmi-gate-handler", "O", "shootdown")), nobody_signs_off=True),
    Fault("nmi-not-sent", "One CPU is left out when the NMI is sent.", (), (_SILENT,)),
    Fault("shootdown-interrupts-on", "The crashing CPU has its interrupts on in the shootdown, as without "
          "local_irq_disable().", (), (Expected("crashing-cpu-interrupts", "C", "shootdown"),), cpus=1,
          not_in_a_dump="machine_kexec() switches them off (2de77fa3cd)"),
    Fault("nmi-by-vm-exit", "A CPU in VMX non-root mode takes the NMI as a VM exit, whose handler calls do_nmi() past "
          "the hooked gate, as until 4.5.0 on Intel.", ("HOOKS_GATES", "!REWRITES_GATES"), (_SILENT,)),
    Fault("stuck", "A CPU never leaves another NMI's handler: the shootdown's NMI stays pending there.",
          (), (_SILENT,)),
    Fault("late", "A CPU leaves another NMI's handler only after the crash image has started, and answers then.",
          (), (_SILENT,)),
    Fault("idtr-elsewhere", "A CPU uses a copy of its IDT, so writes to the table have no effect on it.",
          (), (Expected("idtr", "F", "normal"),)),
    *(Fault(f"own-nmi-gate-{name}", f"The NMI gate of the crashing CPU {does}.",
            ("OWN_GATE_TRAP_NOP",), (Expected(f"nmi-gate-{name}", "C", "shootdown"),), cpus=1)
      for name, does, _ in (*_GATE, ("ist", "keeps its IST: a nested NMI overwrites the first one's frame", None))),
    *(Fault(f"nmi-gate-{name}", f"The NMI gate of another CPU {does}.",
            ("HOOKS_GATES",), (Expected(f"nmi-gate-{name}", "F", "shootdown"), *((follows,) if follows else ())))
      for name, does, follows in (
          *_GATE, ("ist", "keeps the IST that the RFC clears, or loses the one that other generations keep", None))),
    # Machine checks
    *(Fault(f"mc-gate-{name}", f"The #MC gate of another CPU {does}, once it is rewritten.",
            ("HARDENED",), (Expected(f"mc-gate-{name}", "F", "nmis-unblocked"),))
      for name, does, _ in _GATE),
    Fault("own-mc-gate-ist", "The #MC gate of the crashing CPU keeps its IST.",
          ("HARDENED",), (Expected("mc-gate-ist", "C", "shootdown"),), cpus=1,
          mended_with="REWRITES_GATES"),
    Fault("mc-gate-ist", "The #MC gate of another CPU keeps its IST.",
          ("HARDENED",), (Expected("mc-gate-ist", "F", "cpu-save", ("!REWRITES_GATES",)),
                          Expected("mc-gate-ist", "F", "shootdown", ("REWRITES_GATES",))),
          mended_with="REWRITES_GATES"),
    Fault("mc-gate-ist-restored", "A race while another CPU's #MC gate is rewritten restores its IST.",
          ("HARDENED",), (Expected("mc-gate-ist", "F", "nmis-unblocked"),)),
    Fault("mc-gate-ist-twice", "A CPU clears the IST of its own #MC gate, restores it, and clears it again.",
          ("HARDENED", "!REWRITES_GATES"), (Expected("gate-change", "F", "cpu-stop"),), cpus=3, most_cpus=3,
          not_in_a_dump="by then the gate is as it should be"),
    Fault("mc-gate-ist-remote", "The crashing CPU clears the IST of another CPU's #MC gate just before that CPU does.",
          ("HARDENED", "!REWRITES_GATES"), (Expected("gate-change", "F", "cpu-save"),), most_cpus=2, gates=True,
          not_in_a_dump="the gate gets the right value at the right time: only a watchpoint shows who wrote it"),
    Fault("mc-not-swapped", "No #MC gate is redirected to trap_nop before the jump.",
          ("HARDENED",), (Expected("mc-gate-handler", "C", "nmis-unblocked"),
                          Expected("mc-gate-handler", "O", "nmis-unblocked")),
          cpus=1),
    Fault("mc-swapped-on-crasher-only", "Only the crashing CPU's own #MC gate is redirected to trap_nop.",
          ("HARDENED",), (Expected("mc-gate-handler", "O", "nmis-unblocked"),)),
    Fault("mc-swapped-last", "NMIs are unblocked before the #MC gates are redirected to trap_nop.",
          ("HARDENED",), (Expected("mc-gate-handler", "C", "nmis-unblocked"),
                          Expected("mc-gate-handler", "O", "nmis-unblocked")), not_in_a_dump=_OVER),
    Fault("mc-rewritten", "The #MC gates are rewritten whole, as by the RFC, where only the handler should change.",
          ("HARDENED", "!REWRITES_GATES"),
          invisible="the IST is already 0 on every CPU that answered, so the gates end up the same; only a machine "
          "check at the instant when one is not present would show it"),
    # Notes
    Fault("notes-missing", "A CPU stops without saving its registers.",
          (), (Expected("saved-cpus", "F", "cpu-stop"),)),
    Fault("notes-empty", "A CPU is marked as saved, and has saved nothing.",
          (), (Expected("crash-notes", "F", "cpu-stop"),)),
    Fault("info-note-missing", "The CRASH_INFO note is not written.",
          (), (Expected("crash-info-note", None, "exec-entry"),), cpus=1),
    # Local APIC
    Fault("lapic-not-stopped", "A CPU is parked with its local APIC running.",
          (), (Expected("lapic-enabled", "F", "shootdown-done"),), not_in_a_dump=_IN_DEVICES),
    Fault("lvts-not-masked", "A CPU disables its local APIC by software and leaves its LVT unmasked "
          "(hardware then masks it; QEMU shows what was written).",
          (), (Expected("lapic-lvt", "F", "shootdown-done"),), not_in_a_dump=_IN_DEVICES),
    Fault("lapic-mode-kept", "A CPU is left in x2APIC mode where the machine booted in xAPIC mode.",
          (), (Expected("lapic-mode", "F", "shootdown-done"),), x2apic="x2apic", not_in_a_dump=_IN_DEVICES),
    Fault("own-lapic-mode-kept", "The crashing CPU is left in x2APIC mode where the machine booted in xAPIC mode.",
          (), (Expected("lapic-mode", "C", "crash-info"),), cpus=1, x2apic="x2apic"),
    Fault("x2apic-enabled-stale", "x2apic_enabled is not updated after the stop: the next access to the local APIC "
          "uses MSRs that no longer exist, and Xen panics during the crash.",
          (), _DIES, cpus=1, x2apic="x2apic", not_in_a_dump=_ON_ITS_WAY),
    Fault("no-self-nmi", "A CPU parks without queueing an NMI to itself.",
          ("HARDENED",), (Expected("lapic-self-nmi", "F", "handover"),), not_in_a_dump=_IN_DEVICES),
    Fault("self-nmi-misdirected", "A CPU addresses its own NMI to an APIC ID that no CPU has.",
          ("HARDENED",), (Expected("lapic-self-nmi", "F", "handover"),), not_in_a_dump=_IN_DEVICES),
    # The end
    Fault("not-halted", "A CPU spins where it should halt.", (), (Expected("cpu-parked", "F", "handover"),)),
    Fault("parked-awake", "Every other CPU spins in its NMI handler itself instead of halting: at the handover it may "
          "be on its way into the halt loop still.",
          (), (Expected("cpu-parked", "O", "after-handover"),),
          not_in_a_dump="it shows where a CPU was at the handover"),
    Fault("halted-once", "Every other CPU halts outside of a loop: what wakes it lets it return from its NMI handler.",
          (), (Expected("cpu-parked", "O", "handover"),)),
    Fault("interrupts-on", "A CPU halts with interrupts on.", (), (Expected("cpu-parked", "F", "handover"),)),
    Fault("nmis-latched", "The crash starts in an NMI handler, and NMIs are not unblocked before the jump.",
          ("HARDENED",), (_NO_IRET,), cpus=1, not_in_a_dump=_IN_DEVICES),
    Fault("enable-nmis-skipped", "NMIs are not unblocked before the jump, in a crash outside any NMI handler.",
          ("HARDENED",), (_NO_IRET,), cpus=1,
          not_in_a_dump="they were unblocked already: only a trace sees that nothing unblocked them"),
    Fault("own-stop-skipped", "The crashing CPU does not stop itself once all others have answered, as during the "
          "development of 4.13 (6ff560f7f1 to f56813f347).",
          ("HOOKS_EXCEPTION_TABLE",), (Expected("online-cpus", "C", "crash-info"),), cpus=1),
    Fault("no-jump", "machine_kexec() never jumps to the crash image.",
          (), (_LOST,), cpus=1, not_in_a_dump=_ON_ITS_WAY),
    # What a generation does wrong by itself
    Fault("absent-cpus", "CPUs are possible but not present: 4.21.0's machine_kexec() uses their per-CPU pointers.",
          ("READS_ABSENT_IDTS",), _DIES, cpus=1, words="nr_cpu_ids=17", not_in_a_dump=_ON_ITS_WAY),
    Fault("firmware-x2apic", "The firmware booted in x2APIC mode: until 4.4 each CPU that is stopped switches its "
          "LAPIC from disabled straight to x2APIC mode, which raises #GP.",
          ("ALWAYS_REVERTS_LAPIC",),
          (Expected("fatal-trap", "O", "shootdown-done"),
           Expected("lapic-mode", "O", "shootdown-done", ("!HARDENED",)), *_DIES),
          nobody_signs_off=True,
          most_cpus=2, x2apic="x2apic=firmware", words="x2apic=firmware", not_in_a_dump=_ON_ITS_WAY),
    # Harmless, unless something comes at the wrong moment
    Fault("own-nmi-not-ignored", "The handler of the shootdown's NMI does not check whether it runs on the crashing "
          "CPU, whose gate also leads there.",
          ("!OWN_GATE_TRAP_NOP",), cpus=1, invisible=_IN_A_STORM, storm=Storm("injection", ("hang", "no-kernel"))),
    Fault("save-done-ignored", "A CPU that enters the handler again repeats everything, and signs off twice.",
          ("HARDENED", "WAITS_FOR_COUNTER", "SIGNS_OFF"), invisible=_IN_A_STORM,
          storm=Storm("injection", ("check", "notes-changed"))),
    Fault("ist-lost-update", "A CPU reads and writes half its #MC gate to clear the IST, as until 4.10: what the "
          "crashing CPU writes in between is lost.",
          ("SETS_IST_AS_BYTE",), invisible=_IN_A_STORM, storm=Storm("delay", ("check",))),
    Fault("trap-nop-stays", "trap_nop does not return.",
          ("HARDENED",), cpus=1, invisible=_IN_A_STORM,
          storm=Storm("injection", ("hang", "no-kernel", "check"))),
    Fault("nmis-unblocked-early", "A CPU unblocks NMIs for a moment when it is marked as saved, but has not saved yet.",
          ("HARDENED",), invisible=_IN_A_STORM, most_cpus=2, storm=Storm("injection", ("check",))),
    Fault("late-never-halts", "A CPU that signs off after the wait has ended waits for the crashing CPU to notice.",
          invisible=_IN_A_STORM, storm=Storm("delay", ("check", "not-parked"))),
)  # fmt: skip

BY_ID = {fault.id: fault for fault in FAULTS}


def command_line(
    fault: str | None = None,
    *,
    fault_cpu: int | None = None,
    crash_cpu: int = 0,
    by_itself: bool = False,
    in_nmi: bool = False,
    x2apic: bool = False,
    exits: bool = False,
) -> str:
    """What QEMU's -append says. A crash begins when 'C' is typed on the serial line, or by itself.

    The faulty CPU is by default the first that is not the crashing one; that one for a fault which needs no other.
    `in_nmi` crashes from an NMI handler, `x2apic`
    switches to x2APIC (QEMU 10), `exits` lets the crash image end QEMU (-device isa-debug-exit,iobase=0xf4).
    """
    chosen = BY_ID[fault] if fault is not None else None
    mode = chosen.x2apic if chosen is not None and chosen.x2apic else "x2apic" if x2apic else ""
    if fault_cpu is None and chosen is not None and chosen.cpus == 1 and chosen.words.startswith("fault="):
        fault_cpu = crash_cpu
    words = [
        chosen.words if chosen is not None and chosen.words != mode else "",
        f"fault_cpu={fault_cpu}" if fault_cpu is not None else "",
        f"crash_cpu={crash_cpu}" if crash_cpu else "",
        "crash=auto" if by_itself else "",
        "context=nmi" if in_nmi else "",
        mode,
        "exit" if exits else "",
    ]
    return " ".join(filter(None, words))


def listing() -> dict[str, Any]:
    """What `xencrash lab guests --format json` says."""
    return {
        "generations": [
            {"id": generation} | ({"finds": [found.check for found in wrong], "cpus": 2} if wrong else {})
            for generation in generations()
            for wrong in (clean(generation),)
        ],
        "faults": [
            {"id": fault.id, "does": fault.does, "generations": list(fault.generations), "visible": fault.visible,
             "cpus": fault.cpus, "lapic": "x2apic" if fault.x2apic else None, "gates": fault.gates}
            | ({"reason": fault.invisible} if fault.invisible else {})
            for fault in FAULTS
        ],
    }  # fmt: skip
