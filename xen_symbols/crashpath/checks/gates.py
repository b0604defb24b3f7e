"""The NMI and #MC gate of each CPU: what each property is at a stop, and what changed since the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xen_symbols.absence import Absent
from xen_symbols.crashpath.checks.model import (
    ByGeneration,
    Check,
    Judge,
    Need,
    Outcome,
    Shows,
    Subject,
    expect,
    from_absence,
    one_of,
    skip,
    unknown,
)
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.timeline import MC_HANDLER, MC_IST, NMI_HANDLER, NMI_IST, GateProperty
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.x86.gate import INTERRUPT_GATE, VECTOR_MC, VECTOR_NAMES, VECTOR_NMI, Gate
from xen_symbols.xen.memory import HYPERVISOR_CS
from xen_symbols.xen.reads import Read

# -- At a stop --------------------------------------------------------------------------------


def _read(context: Context, cpu: int, vector: int) -> Read:
    if context.no_idt:
        return Read(context.no_idt)
    state = context.state.of(cpu)
    return state.nmi_gate if vector == VECTOR_NMI else state.mc_gate


def _handler(written: GateProperty) -> Judge:
    def judge(context: Context, cpu: int) -> Outcome:
        allowed = context.allowed(written, cpu)
        return expect(_read(context, cpu, written.vector), allowed, context.show_code, lambda gate: gate.handler)

    return judge


_IN_GUEST = "TR is the HVM guest's there: the frame is written to where the guest's own TSS says"


def _ist_at_rest(context: Context, cpu: int, written: GateProperty) -> tuple[Any, ...] | Absent:
    """By the timeline; play_dead() writes the NMI gate as a whole, so its IST goes with its handler."""
    allowed = context.allowed(written, cpu)
    if written is not NMI_IST or isinstance(allowed, Absent) or len(allowed) == 1 or cpu in context.position.online:
        return allowed
    gate = context.state.of(cpu).nmi_gate
    dead = gate.present and gate.value.handler == context.trap_nop
    return tuple(ist for ist in allowed if (ist == 0) is dead)


def _ist(written: GateProperty) -> Judge:
    def judge(context: Context, cpu: int) -> Outcome:
        allowed = _ist_at_rest(context, cpu, written)
        read = _read(context, cpu, written.vector)
        if context.in_svm_guest(context.state.of(cpu)):
            outcome = expect(read, (0,), of=lambda gate: gate.ist)
            return outcome._replace(reason=_IN_GUEST) if outcome.verdict is Verdict.FAIL else outcome
        cleared = read.present and read.value.ist == 0
        if isinstance(allowed, Absent):  # e.g. every CPU holds a guest's state, so no #DF gate shows the numbers
            if cleared and context.guest_state_loaded(context.state.of(cpu)) is True:
                return expect(read, (0,), of=lambda gate: gate.ist)
            return from_absence(allowed)
        if cleared and 0 not in allowed:
            loaded = context.guest_state_loaded(context.state.of(cpu))
            if isinstance(loaded, Absent):
                return unknown(loaded.reason, one_of(allowed), 0)
            if loaded:
                allowed = (*allowed, 0)
        return expect(read, allowed, of=lambda gate: gate.ist)

    return judge


def _reserved(bits: tuple[int, int]) -> str:
    """A gate's reserved bits, in place among its 128."""
    return hex(bits[0] | bits[1] << 64)


def _constant(
    vector: int, of: Callable[[Gate], Any], allowed: Any, show: Callable[[Any], Any] | None = None
) -> Judge:
    """The path does not change it."""

    def judge(context: Context, cpu: int) -> Outcome:
        return expect(_read(context, cpu, vector), (allowed,), show, of)

    return judge


_CRASH_C = "xen/arch/x86/crash.c, nmi_shootdown_cpus and do_nmi_crash (77ad1faa6b)"
_KEXEC_C = "xen/arch/x86/machine_kexec.c, machine_kexec (77ad1faa6b)"
_GATE_HELPERS = "xen/arch/x86/traps.c and its _set_gate helpers; SDM vol. 3, 6.14.1"
# The effect of another handler than the expected one.
_INSTEAD_OF_HANDLER = {
    "nmi_crash": "the shootdown NMI runs the code observed on that CPU: unless that leads to do_nmi_crash, the CPU "
    "saves nothing and does not stop",
    **dict.fromkeys(("nmi", "entry_NMI"),
                    "an NMI on that CPU runs other code than Xen's handler: it is lost, or worse"),
    **dict.fromkeys(("machine_check", "entry_MC"),
                    "a machine check on that CPU runs other code than Xen's handler: the error is lost, or worse"),
}  # fmt: skip
_INSTEAD_OF_IST_0 = (
    "{event} there switches to an IST stack: if the handler of an earlier one is still on it, that one's frame is "
    "overwritten, and its IRET returns to garbage"
)


def _checks_of(prefix: str, handler: GateProperty, ist: GateProperty, event: str, source: str) -> tuple[Check, ...]:
    vector = handler.vector
    instead_of_handler = {
        **_INSTEAD_OF_HANDLER,
        "trap_nop": f"{event} there runs the code observed, on a machine that is half torn down, instead of being "
        "ignored",
    }
    instead_of_ist = {0: _INSTEAD_OF_IST_0.format(event=event)}
    rows: tuple[tuple[str, str, str, Judge, Mapping[Any, str]], ...] = (
        ("present", _GATE_HELPERS, f"{event} on that CPU raises #NP instead of reaching any handler",
         _constant(vector, lambda g: g.present, True), {}),
        ("handler", source, f"{event} on that CPU runs the wrong code: the crash goes on without it, or ends",
         _handler(handler), instead_of_handler),
        ("selector", _GATE_HELPERS, f"{event} on that CPU loads a wrong CS: #GP, or code in the wrong mode",
         _constant(vector, lambda g: g.selector, HYPERVISOR_CS, hex), {}),
        ("type", _GATE_HELPERS, f"{event} on that CPU is entered with interrupts on (type 15, a trap gate), or "
         "raises #GP (any other)", _constant(vector, lambda g: g.type, INTERRUPT_GATE), {}),
        ("dpl", "xen/arch/x86/traps.c; SDM vol. 3, 6.12.1.1",
         f"a guest on that CPU can run this handler at will, by a software interrupt (int ${vector:#x})",
         _constant(vector, lambda g: g.dpl, 0), {}),
        ("ist", _CRASH_C, f"{event} on that CPU is taken on the stack that happens to be current, a guest's in the "
         "SYSCALL window, or on that of another exception, which may be in use", _ist(ist), instead_of_ist),
        ("reserved", _GATE_HELPERS, "the gate's reserved bits are not 0: something other than Xen's helpers wrote it, "
         "and what else it wrote is not known", _constant(vector, lambda g: g.reserved, (0, 0), _reserved), {}),
    )  # fmt: skip
    written = ("handler", "ist")  # the path leaves the others alone
    return tuple(
        Check(f"{prefix}-gate-{name}", Subject.TABLES, source, consequence, judge, instead_of,
              shows=Shows.KEPT if name in written else Shows.NOT_BROKEN,
              by_generation=ByGeneration.ONCE_BEGUN if name in written else ByGeneration.NEVER)
        for name, source, consequence, judge, instead_of in rows
    )  # fmt: skip


# -- Since the last stop ----------------------------------------------------------------------

_STRANGER = (
    "a gate was written by code, or by a CPU, that has no business there at this point of the crash path: what else it "
    "writes to, and when, is not known"
)
_WRITER_UNSEEN = "what changed is judged; the writer was not seen, and is not judged"
# A gate's properties as shown.
_SHOWN: Mapping[str, Callable[[Any], Any]] = {
    "selector": hex,
    "present": lambda present: "yes" if present else "no",
    "reserved": _reserved,
}


def _gate_change(context: Context, cpu: int) -> Outcome:
    def words(vector: int, name: str, *values: Any) -> str:
        if name == "handler":
            values = tuple(context.show_code(value)["symbol"] for value in values)
        shown = map(_SHOWN.get(name, str), values)
        what = f"{VECTOR_NAMES[vector]} {name.upper() if name in ('ist', 'dpl') else name}"
        return f"{what} {' -> '.join(shown)}"

    may: dict[str, None] = {}
    observed, undecided, wrong, unseen = [], [], [], False
    writers: list[str] = []
    evidence: tuple[Evidence, ...] = ()
    for vector, prefix in ((VECTOR_NMI, "nmi"), (VECTOR_MC, "mc")):
        read = _read(context, cpu, vector)
        if isinstance(read.value, Absent):
            return from_absence(read.value)
        change = context.followed and context.followed.gates_before.get((cpu, vector))
        if change is None:
            return skip("its gates were not read before")
        rows = change.allowed(context.generation)
        becomes = [(gate.property, context.resolve(gate, to)) for gate, to in rows]
        may |= dict.fromkeys(words(vector, *one) for one in becomes if not isinstance(one[1], Absent))
        for name in change.changed:
            after = getattr(change.after, name)
            observed.append(f"{words(vector, name, getattr(change.before, name), after)}, after {change.last_stage}")
            if (name, after) in becomes:
                continue
            absences = [value for what, value in becomes if what == name and isinstance(value, Absent)]
            undecided += absences
            wrong += [] if absences else [f"{prefix}-gate-{name}"]
        writers += [
            f"{VECTOR_NAMES[vector]} written by CPU {write.cpu} {context.symbols.describe(write.pc)}, "
            f"after {change.last_stage}"
            for write in change.unexpected_writes(context.generation)
        ]
        unseen |= bool(change.changed and not change.writes)
        evidence += read.evidence if change.changed else ()
    if writers:  # no other check judges them
        return Outcome(Verdict.FAIL, list(may), observed + writers, evidence, reason=_STRANGER)
    if undecided and not wrong:
        return from_absence(undecided[0], list(may))
    if wrong:
        return Outcome(Verdict.FAIL, list(may), observed, evidence, because_of=(tuple(wrong),))
    return Outcome(Verdict.PASS, list(may), observed, evidence, reason=_WRITER_UNSEEN if unseen else None)


CHANGE = Check(
    "gate-change", Subject.FOLLOWED, "xen/arch/x86/crash.c and machine_kexec.c (77ad1faa6b); docs/reference.md",
    "a gate was changed in a way, or at a time, that this crash path never does: an NMI or a machine check in between "
    "went elsewhere, whatever the gate is now", _gate_change, needs=Need.TRACE,
    shows=Shows.NOT_BROKEN,
)  # fmt: skip

CHECKS = (
    *_checks_of("nmi", NMI_HANDLER, NMI_IST, "an NMI", _CRASH_C),
    *_checks_of("mc", MC_HANDLER, MC_IST, "a machine check", _KEXEC_C),
    CHANGE,
)
