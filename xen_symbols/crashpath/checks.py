"""The checks: what the crash path promises at each step, one row per invariant.

A row's `judge` says which values are allowed, given how far each CPU has come, and what was observed. Where a CPU may
be on either side of a step, both values are allowed: a race window is no alarm.
"""

import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.crashpath.generations import GENERATIONS, Bookkeeping, Generation, Hook
from xen_symbols.crashpath.stages import ANYWHERE, CRASHED, CrashStep, OtherStep, Position, Span
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.symbols.table import TEXT
from xen_symbols.targets import Lapic, PhysicalCpu
from xen_symbols.text import ranges
from xen_symbols.x86 import apic
from xen_symbols.x86.gate import INTERRUPT_GATE, VECTOR_MC, VECTOR_NAMES, VECTOR_NMI, Gate
from xen_symbols.xen.console import read_console
from xen_symbols.xen.ist import IST_SSP_SIZE, ist_numbers
from xen_symbols.xen.lapic import BOOT_MODES
from xen_symbols.xen.memory import HYPERVISOR_CS, XenMemory, image_region
from xen_symbols.xen.reads import Read, absent, in_memory, mask
from xen_symbols.xen.state import CpuState, State

if TYPE_CHECKING:  # a trace alone needs it
    from xen_symbols.crashpath.gatechanges import GateChange, Key

RFLAGS_IF = 1 << 9
_CONSOLE_TAIL = 2048  # bytes


class Outcome(NamedTuple):
    """What a judge found. `allowed` and `observed` are JSON values."""

    verdict: Verdict
    allowed: Any
    observed: Any
    evidence: tuple[Evidence, ...] = ()
    reason: str | None = None
    # What explains this failure: any of these groups of checks, where all of a group fail for the same CPU. What fails
    # for the whole machine explains each CPU's failure, and what fails for the crashing CPU the machine's.
    because_of: tuple[tuple[str, ...], ...] = ()


@lru_cache
def skip(reason: str) -> Outcome:
    return Outcome(Verdict.SKIP, None, None, reason=reason)


def unknown(reason: str, allowed: Any = None, observed: Any = None) -> Outcome:
    return Outcome(Verdict.UNKNOWN, allowed, observed, reason=reason)


def _from_absence(absence: Absent, allowed: Any) -> Outcome:
    verdict = Verdict.SKIP if absence.kind in (Kind.NOT_HELD, Kind.NOT_APPLICABLE) else Verdict.UNKNOWN
    return Outcome(verdict, allowed, None, (), absence.reason)


def _expected_json(allowed: Sequence[Any]) -> Any:
    return allowed[0] if len(allowed) == 1 else {"one_of": list(allowed)}


def expect(
    read: Read,
    allowed: Sequence[Any],
    show: Callable[[Any], Any] | None = None,
    of: Callable[[Any], Any] | None = None,
) -> Outcome:
    """Pass when what was read, or what `of` takes out of it, is one of those allowed; `show` makes JSON of them."""
    if len(allowed) == 1:
        shown = allowed[0] if show is None else show(allowed[0])
    else:
        allowed = tuple(dict.fromkeys(allowed))
        shown = _expected_json(allowed if show is None else [show(value) for value in allowed])
    value, evidence = read
    if of is not None and not isinstance(value, Absent):
        value = of(value)
    if isinstance(value, Absent):
        return _from_absence(value, shown)
    if value not in allowed:
        return Outcome(Verdict.FAIL, shown, value if show is None else show(value), evidence)
    if show is not None:
        value = shown if len(allowed) == 1 else show(value)
    return Outcome(Verdict.PASS, shown, value, evidence)


def because(outcome: Outcome, *checks: str) -> Outcome:
    """The same outcome; if it is a failure, one of any of the checks explains it."""
    if outcome.verdict is not Verdict.FAIL:
        return outcome
    return outcome._replace(because_of=tuple((check,) for check in checks))


def timed(span: Span, step: int, before: Any, after: Any) -> tuple[Any, ...]:
    """What a value may be when it changes at `step`."""
    if span.before(step):
        return (before,)
    if span.reached(step):
        return (after,)
    return (before, after)


_IST_0_TOO = "IST of #DF is 0 too, as while an AMD CPU holds an HVM guest's state, but TR is Xen's own"
# A name that came (7888440625, 4.13.0) after the fix of XSA-244 (cc08c73c8c, 4.10.0 and backports): this Xen has it.
_SINCE_XSA_244 = "per_cpu__tss_page"


class EntryPoint(NamedTuple):
    """What a gate may lead to, by the names that Xen has had for it, newest first."""

    names: tuple[str, ...]
    source: str


ENTRY_POINTS = (
    EntryPoint(("entry_NMI", "nmi"), "renamed by abe93fc8aa (4.18.0)"),
    EntryPoint(("entry_MC", "machine_check"), "renamed by abe93fc8aa (4.18.0)"),
    EntryPoint(("trap_nop",), "77ad1faa6b (4.3.0)"),
)


def _idt_in_use(state: State) -> Absent | None:
    """None where the IDT delivers events; else why no gate is judged: FRED does, or that could not be read."""
    fred = state.system["fred"].value
    if isinstance(fred, Absent):
        return None if fred.kind is Kind.NO_SYMBOL else fred  # a build without it has no FRED
    return Absent("FRED delivers events: the IDT is not used", Kind.NOT_APPLICABLE) if fred == 1 else None


def _owed_by_online(state: State, online: frozenset[int]) -> State:
    """The state, where what a CPU that was online must have and has not is unread: a CPU that was not may be without
    an IDT, a buffer of notes, or a per-CPU area; of one that was, something is lost."""
    changed = {}
    for number in online:
        cpu = state.cpus[number]
        if cpu.exists and cpu.idt.present and cpu.notes.present:
            continue
        owed: tuple[str, ...] = ("idt", "nmi_gate", "mc_gate", "df_gate", "notes")
        if not cpu.exists:
            owed += ("crash_save_done", "tss", "physical")
        changed[number] = cpu._replace(**{name: _owed(getattr(cpu, name)) for name in owed})
    return state._replace(cpus={**state.cpus, **changed}) if changed else state


def _owed(value: Any) -> Any:
    """A Read or what it holds; where that does not apply, it is unread."""
    inside = value.value if isinstance(value, Read) else value
    if not isinstance(inside, Absent) or inside.kind is not Kind.NOT_APPLICABLE:
        return value
    unread = Absent(f"{inside.reason}, although it was online")
    return absent(unread) if isinstance(value, Read) else unread


class Context:
    """One moment, with what the checks need to know about it.

    `cpus` are the numbers of those that are judged: all that exist, and all that were online, whether found or not.
    """

    def __init__(
        self,
        memory: XenMemory,
        state: State,
        position: Position,
        generation: Generation,
        nmi_entries: dict[int, int] | None = None,
        gates_before: "Mapping[Key, GateChange] | None" = None,
    ) -> None:
        """`nmi_entries` and `gates_before` are what a trace alone knows; None for any other look at a machine."""
        self.state = _owed_by_online(state, position.online)
        self.cpus = [cpu.cpu for cpu in state.cpus.values() if cpu.exists or cpu.cpu in position.online]
        self.position = position
        self.crash = position.crash
        self.generation = generation
        self.symbols = state.symbols
        self.memory = memory
        self.nmi_entries = nmi_entries
        self.gates_before = gates_before
        self.nmi, self.mc, self.trap_nop = (self._entry(*entry.names) for entry in ENTRY_POINTS)
        self.ist = ist_numbers(state)
        self.no_idt = _idt_in_use(state)
        self._shown: dict[int, dict[str, Any]] = {}
        self._words: dict[tuple[str, int], Read] = {}
        self._hlts: dict[int, bool | Absent] = {}

    def _entry(self, *names: str) -> int | Absent:
        for name in names:
            try:
                address = self.symbols.get(name, TEXT)
            except Unreadable as error:
                return error.absent
            if address is not None:
                return address
        return Absent(f"the symbols name none of {', '.join(names)}", Kind.NO_SYMBOL)

    def address(self, name: str, kinds: str = TEXT) -> int | Absent:
        try:
            return self.symbols.address(name, kinds)
        except Unreadable as error:
            return error.absent

    # Where a CPU stands

    def is_crashing(self, cpu: int) -> bool:
        return cpu == self.position.crashing_cpu

    def is_other(self, cpu: int) -> bool:
        """Online when the crash began, and not the crashing CPU."""
        return cpu in self.position.online and not self.is_crashing(cpu)

    def other(self, cpu: int) -> Span:
        return self.position.others.get(cpu, ANYWHERE)

    def physical(self, cpu: int) -> PhysicalCpu | Absent:
        if self.is_crashing(cpu) and self.position.stage is CRASHED:
            return Absent("the crash kernel runs on it", Kind.NOT_APPLICABLE)
        return self.state.of(cpu).physical

    def lapic(self, cpu: int) -> Lapic | Absent:
        physical = self.physical(cpu)
        return physical if isinstance(physical, Absent) else physical.lapic

    def guest_state_loaded(self, cpu: CpuState) -> bool | Absent:
        """Whether an HVM guest's state is loaded there on AMD: svm_ctxt_switch_to clears IST of #DF, NMI and #MC
        together. Absent when that cannot be told from an AP that came up without (XSA-244).

        The guest's TR is loaded only when it is entered, and the CPU may do much else before (svm_vmenter_helper;
        seen in do_softirq). With TR Xen's own it is another guest's state where a PV guest runs, and with XSA-244.
        """
        if not cpu.df_gate.present or cpu.df_gate.value.ist:
            return False
        physical = cpu.physical
        if isinstance(physical, Absent) or isinstance(physical.tr_base, Absent) or isinstance(cpu.tss, Absent):
            return True
        if physical.tr_base not in (cpu.tss, cpu.tss + IST_SSP_SIZE):
            return True
        if "cs" not in physical.registers:
            return Absent(f"{_IST_0_TOO}: its CS, which tells a PV guest from that, could not be read")
        if physical.registers["cs"] & 3:
            return False
        if self.symbols.get(_SINCE_XSA_244) is not None:
            return True
        return Absent(f"{_IST_0_TOO}: the guest is about to be entered, or this Xen is without the fix of XSA-244 "
                      "(cc08c73c8c)")  # fmt: skip

    def in_svm_guest(self, cpu: CpuState) -> bool:
        """Whether it runs a guest on AMD: until it has left it and switched away, none of its gates has an IST
        (f9fc2e584d, svm_ctxt_switch_to). Intel CPUs, which keep them, have one for #DF too."""
        physical = cpu.physical
        inside = not isinstance(physical, Absent) and physical.guest_mode is True
        return inside and cpu.df_gate.present and not cpu.df_gate.value.ist

    @cached_property
    def boot_mode(self) -> str | Absent:
        """The LAPIC mode in which the firmware left the CPUs."""
        read = self.state.system["apic_boot_mode"]
        if isinstance(read.value, Absent):
            return read.value
        mode = BOOT_MODES.get(read.value)
        return Absent(f"apic_boot_mode is {read.value}: not recorded") if mode is None else mode.value

    @cached_property
    def running_mode(self) -> str | Absent:
        """The LAPIC mode that Xen runs in."""
        read = self.state.system["x2apic_enabled"]
        if isinstance(read.value, Absent):
            return read.value
        mode = apic.Mode.X2APIC if read.value else apic.Mode.XAPIC
        return str(mode.value)

    @cached_property
    def console_tail(self) -> str | Absent:
        """The last that Xen printed; the report of the shootdown is among it."""
        try:
            return read_console(self.memory, _CONSOLE_TAIL)
        except Unreadable as error:
            return error.absent

    def after_hlt(self, rip: int) -> bool | Absent:
        """Whether the instruction before is HLT (SDM vol. 2, F4): a halted CPU's RIP is behind it."""
        found = self._hlts.get(rip)
        if found is None:
            try:
                found = self.memory.read(rip - 1, 1) == b"\xf4"
            except Unreadable as error:
                found = error.absent
            self._hlts[rip] = found
        return found

    def show_code(self, address: int) -> dict[str, Any]:
        shown = self._shown.get(address)
        if shown is None:
            name = self.symbols.describe(address) if address else None
            shown = self._shown[address] = {"address": hex(address), "symbol": name}
        return shown

    def mask_word(self, mask: str, cpu: int) -> Read:
        """One of Xen's cpumask_t; its evidence is the 64-bit word that has the CPU's bit, not all of the mask."""
        word = cpu // 64
        read = self._words.get((mask, word))
        if read is None:
            read = self.state.system[mask]
            if read.address is not None and read.raw is not None:
                at = 8 * word
                read = in_memory(read.value, read.address + at, read.raw[at : at + 8], read.symbol)
            self._words[mask, word] = read
        return read


class Subject(enum.Enum):
    MACHINE = "the machine"
    TABLES = "each CPU that has an IDT"
    FOLLOWED = "each CPU that has an IDT, from stop to stop of a trace"
    ONLINE = "each CPU that was online"
    OTHERS = "each other CPU that was online"
    CPUS = "each CPU that exists, or was online"


class Check(NamedTuple):
    """One invariant. `source` says where to look, `consequence` what its failure would do to a real crash; where that
    hangs on what should have been there, `instead_of` says it by the expected value, a handler's by its name."""

    id: str
    subject: Subject
    source: str
    consequence: str
    judge: Callable[[Context, int], Outcome]
    instead_of: Mapping[Any, str] = MappingProxyType({})

    def explain(self, outcome: Outcome) -> str:
        """What a failure would do to a real crash."""
        expected = outcome.allowed
        several = expected["one_of"] if isinstance(expected, dict) and "one_of" in expected else [expected]
        said = {self._instead_of(each) for each in several}
        return said.pop() if len(said) == 1 else self.consequence

    def _instead_of(self, expected: Any) -> str:
        if isinstance(expected, list):
            return self.consequence
        value = expected.get("symbol") if isinstance(expected, dict) else expected
        return self.instead_of.get(value, self.consequence)


MACHINE = -1  # the `cpu` that a judge of the whole machine is called with


# Gates

_Expected = tuple[Any, ...] | Absent


def _nmi_handler(context: Context, cpu: int) -> _Expected:
    generation = context.generation
    plain = context.nmi
    hooked = plain
    if context.is_crashing(cpu):
        hooked = context.trap_nop if generation.own_nmi_gate else plain
    elif generation.hook is Hook.GATE:
        hooked = context.address("nmi_crash")
    if isinstance(plain, Absent):
        return plain
    if isinstance(hooked, Absent):
        return hooked
    if cpu not in context.position.online and generation.dead_cpus_use_trap_nop:
        # play_dead() puts trap_nop into its own gate: 73cb1383bf (4.13.0)
        return (plain,) if isinstance(context.trap_nop, Absent) else (plain, context.trap_nop)
    return timed(context.crash, CrashStep.ARMED, plain, hooked)


def _mc_handler(context: Context, cpu: int) -> _Expected:
    if isinstance(context.mc, Absent):
        return context.mc
    if not context.generation.swaps_mc:
        return (context.mc,)
    if isinstance(context.trap_nop, Absent):
        return context.trap_nop
    return timed(context.crash, CrashStep.NEUTRALISED, context.mc, context.trap_nop)


def _nmi_ist(context: Context, cpu: int) -> _Expected:
    if isinstance(context.ist, Absent):
        return context.ist
    normal = context.ist.nmi
    generation = context.generation
    if cpu not in context.position.online:
        current = context.state.of(cpu).nmi_gate
        parked = current.present and current.value.handler == context.trap_nop
        return (0,) if parked else (normal,)
    cleared = generation.own_nmi_gate if context.is_crashing(cpu) else generation.clears_remote_ist
    return timed(context.crash, CrashStep.ARMED, normal, 0 if cleared else normal)


def _mc_ist(context: Context, cpu: int) -> _Expected:
    if isinstance(context.ist, Absent):
        return context.ist
    normal = context.ist.mc
    generation = context.generation
    if not generation.swaps_mc:
        return (normal,)
    if generation.clears_remote_ist:
        # nmi_shootdown_cpus clears it in every table; machine_kexec writes the whole gate anew, IST included.
        return timed(context.crash, CrashStep.ARMED, normal, 0)
    if context.is_crashing(cpu):
        return timed(context.crash, CrashStep.ARMED, normal, 0)
    if context.is_other(cpu):
        return timed(context.other(cpu), OtherStep.MC_IST_CLEARED, normal, 0)
    return (normal,)


_HANDLERS = {VECTOR_NMI: _nmi_handler, VECTOR_MC: _mc_handler}
_ISTS = {VECTOR_NMI: _nmi_ist, VECTOR_MC: _mc_ist}


def _gate_read(context: Context, cpu: int, vector: int) -> Read:
    if context.no_idt:
        return Read(context.no_idt)
    state = context.state.of(cpu)
    return state.nmi_gate if vector == VECTOR_NMI else state.mc_gate


def _judge_handler(vector: int) -> Callable[[Context, int], Outcome]:
    def judge(context: Context, cpu: int) -> Outcome:
        allowed = _HANDLERS[vector](context, cpu)
        if isinstance(allowed, Absent):
            return _from_absence(allowed, None)
        return expect(_gate_read(context, cpu, vector), allowed, context.show_code, lambda gate: gate.handler)

    return judge


_IN_GUEST = "TR is the HVM guest's there: the frame is written to where the guest's own TSS says"


def _judge_ist(vector: int) -> Callable[[Context, int], Outcome]:
    def judge(context: Context, cpu: int) -> Outcome:
        allowed = _ISTS[vector](context, cpu)
        read = _gate_read(context, cpu, vector)
        if context.in_svm_guest(context.state.of(cpu)):
            outcome = expect(read, (0,), of=lambda gate: gate.ist)
            return outcome._replace(reason=_IN_GUEST) if outcome.verdict is Verdict.FAIL else outcome
        cleared = read.present and read.value.ist == 0
        if isinstance(allowed, Absent):  # as when every CPU holds a guest's state: no #DF gate tells the numbers
            if cleared and context.guest_state_loaded(context.state.of(cpu)) is True:
                return expect(read, (0,), of=lambda gate: gate.ist)
            return _from_absence(allowed, None)
        if cleared and 0 not in allowed:
            loaded = context.guest_state_loaded(context.state.of(cpu))
            if isinstance(loaded, Absent):
                return unknown(loaded.reason, _expected_json(allowed), 0)
            if loaded:
                allowed = (*allowed, 0)
        return expect(read, allowed, of=lambda gate: gate.ist)

    return judge


def _reserved(bits: tuple[int, int]) -> str:
    """A gate's reserved bits, in place among its 128."""
    return hex(bits[0] | bits[1] << 64)


def _judge_bits(
    vector: int, of: Callable[[Gate], Any], allowed: Any, show: Callable[[Any], Any] | None = None
) -> Callable[[Context, int], Outcome]:
    def judge(context: Context, cpu: int) -> Outcome:
        return expect(_gate_read(context, cpu, vector), (allowed,), show, of)

    return judge


_CRASH_C = "xen/arch/x86/crash.c, nmi_shootdown_cpus and do_nmi_crash (77ad1faa6b)"
_KEXEC_C = "xen/arch/x86/machine_kexec.c, machine_kexec (77ad1faa6b)"
_GATE_HELPERS = "xen/arch/x86/traps.c and its _set_gate helpers; SDM vol. 3, 6.14.1"
# What another handler than the expected one does.
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
    "overwritten and its return goes wild"
)


def _gate_checks(prefix: str, vector: int, event: str, handler_source: str) -> tuple[Check, ...]:
    instead_of_handler = {
        **_INSTEAD_OF_HANDLER,
        "trap_nop": f"{event} there runs the code observed, on a machine that is half torn down, instead of being "
        "ignored",
    }
    instead_of_ist = {0: _INSTEAD_OF_IST_0.format(event=event)}
    rows: tuple[tuple[str, str, str, Callable[[Context, int], Outcome], Mapping[Any, str]], ...] = (
        ("present", _GATE_HELPERS, f"{event} on that CPU raises #NP instead of reaching any handler",
         _judge_bits(vector, lambda g: g.present, True), {}),
        ("handler", handler_source, f"{event} on that CPU runs the wrong code: the crash goes on without it, or ends",
         _judge_handler(vector), instead_of_handler),
        ("selector", _GATE_HELPERS, f"{event} on that CPU loads a wrong CS: #GP, or code in the wrong mode",
         _judge_bits(vector, lambda g: g.selector, HYPERVISOR_CS, hex), {}),
        ("type", _GATE_HELPERS, f"{event} on that CPU is entered with interrupts on (type 15, a trap gate), or "
         "raises #GP (any other)", _judge_bits(vector, lambda g: g.type, INTERRUPT_GATE), {}),
        ("dpl", "xen/arch/x86/traps.c; SDM vol. 3, 6.12.1.1",
         f"a guest on that CPU can run this handler at will, by a software interrupt (int ${vector:#x})",
         _judge_bits(vector, lambda g: g.dpl, 0), {}),
        ("ist", _CRASH_C, f"{event} on that CPU is taken on the stack that happens to be current, a guest's in the "
         "SYSCALL window, or on that of another exception, which may be in use", _judge_ist(vector), instead_of_ist),
        ("reserved", _GATE_HELPERS, "the gate's reserved bits are not 0: something other than Xen's helpers wrote it, "
         "and what else it wrote is not known", _judge_bits(vector, lambda g: g.reserved, (0, 0), _reserved), {}),
    )  # fmt: skip
    return tuple(
        Check(f"{prefix}-gate-{name}", Subject.TABLES, source, consequence, judge, instead_of)
        for name, source, consequence, judge, instead_of in rows
    )


def _gate_becomes(context: Context, vector: int, name: str, to: str | int) -> Any:
    """A gate's handler (its address) or IST, as the table of changes names it."""
    from xen_symbols.crashpath.gatechanges import NORMAL

    if name == "handler":
        return (context.nmi if vector == VECTOR_NMI else context.mc) if to == NORMAL else context.address(str(to))
    if to != NORMAL or isinstance(context.ist, Absent):
        return context.ist if to == NORMAL else to
    return context.ist.nmi if vector == VECTOR_NMI else context.ist.mc


_STRANGER = (
    "a gate was written by code, or by a CPU, that has no part in it at this point of the crash path: what else it "
    "writes to, and when, is not known"
)
_WRITER_UNSEEN = "what changed is judged; who changed it was not seen, so that is not"
# A gate's properties as people read them.
_SHOWN: Mapping[str, Callable[[Any], Any]] = {
    "selector": hex,
    "present": lambda present: "yes" if present else "no",
    "reserved": _reserved,
}


def _gate_change(context: Context, cpu: int) -> Outcome:
    from xen_symbols.crashpath.gatechanges import allowed, unexpected_writes

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
        read = _gate_read(context, cpu, vector)
        if isinstance(read.value, Absent):
            return _from_absence(read.value, None)
        change = (context.gates_before or {}).get((cpu, vector))
        if change is None:
            return skip("its gates were not read before")
        rows = allowed(change, context.generation)
        becomes = [(row.property, _gate_becomes(context, vector, row.property, row.to)) for row in rows]
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
            for write in unexpected_writes(change, context.generation)
        ]
        unseen |= bool(change.changed and not change.writes)
        evidence += read.evidence if change.changed else ()
    if writers:  # of whom no other check tells
        return Outcome(Verdict.FAIL, list(may), observed + writers, evidence, reason=_STRANGER)
    if undecided and not wrong:
        return _from_absence(undecided[0], list(may))
    if wrong:
        return Outcome(Verdict.FAIL, list(may), observed, evidence, because_of=(tuple(wrong),))
    return Outcome(Verdict.PASS, list(may), observed, evidence, reason=_WRITER_UNSEEN if unseen else None)


# The CPUs

_MASKS = ("online", "saved", "waiting_mask")
_STRAYS_MAX = 4  # CPUs that are named one by one
# Where Xen leaves a CPU that is no longer online: xen/arch/x86/domain.c, acpi/cpu_idle.c, smp.c.
_AT_REST = {"play_dead", "default_dead_idle", "acpi_dead_idle", "stop_this_cpu"}


def _cpus_found(context: Context, _cpu: int) -> Outcome:
    """Whether every CPU that Xen's masks, the machine or the dump's notes know of is one of those that are judged."""
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
            lost.append(f"{_named(numbers)} in {read.symbol}, and nr_cpu_ids is {len(state.cpus)}")
    known |= {cpu for name in _MASKS if (read := state.system[name]).present for cpu in read.value - online}
    if absentees := {cpu for cpu in known if cpu in state.cpus and not state.cpus[cpu].exists}:
        lost.append(f"{_named(absentees)} known to have been online, without a per-CPU area")
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
    found = {cpu for cpu in known if cpu in state.cpus and state.cpus[cpu].exists}
    if lost:
        return Outcome(Verdict.UNKNOWN, _named(known), _named(found), evidence, "; ".join(lost))
    reason = f"{len(unmatched)} of the machine's CPUs are none of Xen's, and run no Xen" if unmatched else None
    return Outcome(Verdict.PASS, _named(known), _named(found), evidence, reason)


def _at_work(context: Context, physical: PhysicalCpu) -> str | None:
    """How it is seen that a CPU is, or was, one of those that Xen runs on; None when it is not."""
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


def _named(cpus: Iterable[int]) -> str:
    """CPU numbers as Xen prints them: "CPU 1", "CPUs 0-3,5"."""
    listed = ",".join(ranges(cpus))
    return f"CPU{'s' * (not listed.isdecimal())} {listed}" if listed else "none"


# Bookkeeping


# What an NMI leads to before a crash: no callback, one of another part of Xen, or do_nmi itself.
_DISPATCHED_BEFORE = (
    None, "do_nmi",
    *dict.fromkeys(name.rpartition("#")[2] for generation in GENERATIONS for name in generation.idle_callbacks),
)  # fmt: skip


def _nmi_dispatch(context: Context, _cpu: int) -> Outcome:
    generation = context.generation
    if generation.hook is Hook.GATE:
        return skip("this generation hooks the NMI gates themselves")
    if generation.hook is Hook.EXCEPTION_TABLE:
        read = context.state.system["exception_table_nmi"]
        before: list[int | Absent] = [context.address("do_nmi")]
        after = context.address("do_nmi_crash")
    else:
        read = context.state.system["nmi_callback"]
        before = [0] if generation.hook is Hook.CALLBACK else []
        before += [address for name in generation.idle_callbacks if isinstance(address := context.address(name), int)]
        name = "do_nmi_crash" if generation.hook is Hook.CALLBACK else "crash_nmi_callback"
        after = context.address(name)
    if isinstance(after, Absent) or isinstance(before[0] if before else 0, Absent):
        return _from_absence(
            after if isinstance(after, Absent) else Absent("do_nmi is not named", Kind.NO_SYMBOL), None
        )
    allowed: list[int] = []
    if not context.crash.reached(CrashStep.ARMED):
        allowed += [value for value in before if isinstance(value, int)]
    if not context.crash.before(CrashStep.ARMED):
        allowed.append(after)
    return expect(read, allowed, context.show_code)


def _expect_member(context: Context, mask: str, cpu: int, allowed: Sequence[bool]) -> Outcome:
    cpus, evidence = context.mask_word(mask, cpu)
    return expect(Read(cpus if isinstance(cpus, Absent) else cpu in cpus, evidence), allowed)


def _waiting(context: Context, cpu: int) -> Outcome:
    generation = context.generation
    if generation.bookkeeping is Bookkeeping.COUNT:
        return skip("this generation counts the CPUs that it waits for") if cpu != MACHINE else _waiting_count(context)
    if cpu == MACHINE:
        return skip("this generation keeps a mask, judged per CPU")
    allowed: tuple[bool, ...] = (False,)
    if context.is_other(cpu) and not context.crash.before(CrashStep.ARMED):
        allowed = timed(context.other(cpu), OtherStep.SIGNED_OFF, True, False)
        if not context.crash.reached(CrashStep.ARMED):
            allowed = (False, *allowed)
    outcome = _expect_member(context, "waiting_mask", cpu, allowed)
    # Done is set just before a CPU signs off: without it, it did not come so far.
    return because(outcome, "crash-save-done") if outcome.observed is True else outcome


def _waiting_count(context: Context) -> Outcome:
    read = context.state.system["waiting_count"]
    if context.crash.before(CrashStep.ARMED):
        return expect(read, (0,))
    others = [context.other(cpu) for cpu in context.position.online if context.is_other(cpu)]
    most = sum(not span.reached(OtherStep.SIGNED_OFF) for span in others)
    least = sum(span.before(OtherStep.SIGNED_OFF) for span in others)
    allowed = tuple(range(least, most + 1))
    return expect(read, allowed if context.crash.reached(CrashStep.ARMED) else (0, *allowed))


def _saved(context: Context, cpu: int) -> Outcome:
    return _expect_member(context, "saved", cpu, _by_role(context, cpu, CrashStep.SAVED,
                          OtherStep.NOTES_SAVED, before=False, after=True, offline=False))  # fmt: skip


def _online(context: Context, cpu: int) -> Outcome:
    return _expect_member(context, "online", cpu, _by_role(context, cpu, CrashStep.STOPPED,
                          OtherStep.STOPPED, before=True, after=False, offline=False))  # fmt: skip


def _by_role(
    context: Context, cpu: int, crash: CrashStep, other: OtherStep, *, before: Any, after: Any, offline: Any
) -> tuple[Any, ...]:
    if context.is_crashing(cpu):
        return timed(context.crash, crash, before, after)
    if context.is_other(cpu):
        return timed(context.other(cpu), other, before, after)
    return (offline,)


def _crash_save_done(context: Context, cpu: int) -> Outcome:
    if not context.generation.has_save_done:
        return skip("this generation has no crash_save_done")
    read = context.state.of(cpu).crash_save_done
    if read.present is False and read.value.kind is Kind.NOT_APPLICABLE:
        read = absent("the symbols do not name per_cpu__crash_save_done", Kind.NO_SYMBOL)
    if not context.is_other(cpu):
        return expect(read, (False,))
    outcome = expect(read, timed(context.other(cpu), OtherStep.DONE, False, True))
    return because(outcome, "online-cpus") if outcome.observed is False else outcome  # the stop comes first


def _crash_notes(context: Context, cpu: int) -> Outcome:
    read = context.state.of(cpu).notes
    allowed = _by_role(context, cpu, CrashStep.SAVED, OtherStep.NOTES_SAVED, before="empty", after="saved",
                       offline="empty")  # fmt: skip
    if isinstance(read.value, Absent):
        return expect(read, allowed)
    notes = read.value
    observed = notes.progress
    if observed == "saved" and not _plausible(context, notes.registers, notes.control):
        observed = "not Xen's registers"
    if len(allowed) > 1:  # it may be writing them right now
        allowed = (*allowed, "half written", "not Xen's registers")
    outcome = expect(Read(observed, read.evidence), allowed)
    return because(outcome, "saved-cpus") if observed == "empty" else outcome


def _plausible(context: Context, registers: dict[str, int], control: dict[str, int]) -> bool:
    """Xen's own registers inside kexec_crash_save_cpu: code of Xen's, its code segment, and page tables."""
    found = context.symbols.lookup(registers["rip"])
    in_text = found is not None and found[0].kind in TEXT
    return in_text and registers["cs"] == HYPERVISOR_CS and control["cr3"] != 0


_AS_SAVED = "what Xen's memory holds"


def _few(words: Sequence[str]) -> str:
    shown, more = words[:4], len(words) - 4
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _dump_notes(context: Context, cpu: int) -> Outcome:
    state = context.state.of(cpu)
    physical = state.physical
    if isinstance(physical, Absent):
        return _from_absence(physical, None)
    if physical.current:
        return skip("its registers are not of the notes that Xen saved")
    notes = state.notes.value
    if isinstance(notes, Absent):
        return _from_absence(notes, _AS_SAVED)
    if notes.damaged:
        return unknown(f"in Xen's memory {notes.registers}", _AS_SAVED)
    held = notes.saved
    theirs = physical.registers
    observed = _AS_SAVED
    if theirs != held:
        lost = [f"no {name}" for name in held if name not in theirs]
        other = [f"other {name}" for name in theirs if theirs[name] != held.get(name)]
        observed = _few([*other, *lost]) if theirs else "empty"
    return expect(Read(observed, state.notes.evidence), (_AS_SAVED,))


def _crash_info_note(context: Context, _cpu: int) -> Outcome:
    read = context.state.of(0).notes
    allowed = timed(context.crash, CrashStep.INFO_SAVED, None, context.memory.xen_phys_start)
    if isinstance(read.value, Absent):  # it has one on every Xen that has crash notes
        return unknown(read.value.reason)
    info = read.value.info
    if read.value.damaged:
        return unknown(info.reason)
    if isinstance(info, Absent) and info.kind is Kind.NOT_APPLICABLE:
        return unknown("CPU 0's buffer of crash notes holds no CRASH_INFO")
    value = None if isinstance(info, Absent) else info.xen_phys_start
    return expect(
        Read(value, read.evidence),
        allowed,
        lambda start: "empty" if start is None else {"xen_phys_start": hex(start)},
    )


def _crash_owner(context: Context, _cpu: int) -> Outcome:
    read = context.state.system["crash_owner"]
    nameless = isinstance(read.value, Absent) and read.value.kind is Kind.NO_SYMBOL
    if nameless and context.generation.bookkeeping is Bookkeeping.COUNT:
        return skip("this generation may have no owner variable (470f58c159)")
    owner = -1 if context.position.crashing_cpu is None else context.position.crashing_cpu
    return expect(read, timed(context.crash, CrashStep.SAVED, -1, owner))


def _kexecing(context: Context, _cpu: int) -> Outcome:
    return expect(context.state.system["kexecing"], timed(context.crash, CrashStep.SAVED, False, True))


def _shootdown_report(context: Context, _cpu: int) -> Outcome:
    if not context.generation.announces:
        return skip("this generation does not report the shootdown")
    if not context.crash.reached(CrashStep.WAITED):
        return skip("the wait is not over")
    tail = context.console_tail
    if isinstance(tail, Absent):
        return _from_absence(tail, "Shot down all CPUs")
    lines = [line for line in tail.splitlines() if "hot down all CPUs" in line or "o shoot down CPUs" in line]
    others = [cpu for cpu in sorted(context.position.online) if context.is_other(cpu)]
    missing = [cpu for cpu in others if context.other(cpu).before(OtherStep.SIGNED_OFF)]
    expected = f"Failed to shoot down CPUs {{{','.join(map(str, missing))}}}" if missing else "Shot down all CPUs"
    if not lines:
        return unknown("the end of Xen's console ring does not hold the report", expected)
    verdict = Verdict.PASS if _reports(lines[-1], missing) else Verdict.FAIL
    return Outcome(verdict, expected, lines[-1].strip(), (Evidence("Xen's console ring"),))


def _reports(line: str, missing: Sequence[int]) -> bool:
    """Whether Xen's report names just these CPUs, as a list of ranges: `{1,4-6}`."""
    if "Shot down all CPUs" in line:
        return not missing
    named = re.search(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}", line)
    if named is None:
        return False
    bounds = [[int(number) for number in one.split("-")] for one in named[1].split(",")]
    size = sum(one[-1] - one[0] + 1 for one in bounds)
    return size == len(missing) and all(any(one[0] <= cpu <= one[-1] for one in bounds) for cpu in missing)


def _nmi_answered(context: Context, cpu: int) -> Outcome:
    if not context.crash.reached(CrashStep.WAITED):
        return skip("the wait is not over")
    signs = [(context.mask_word("saved", cpu), True), (context.mask_word("online", cpu), False)]
    if context.generation.has_save_done:
        signs.append((context.state.of(cpu).crash_save_done, True))
    if context.generation.bookkeeping is Bookkeeping.MASK:
        signs.append((context.mask_word("waiting_mask", cpu), False))
    answered, unread = False, None
    evidence: tuple[Evidence, ...] = ()
    for (value, where), sign in signs:  # `sign` is what it is once the CPU has answered
        if isinstance(value, Absent):
            unread = unread or value
        else:
            answered |= (cpu in value if isinstance(value, frozenset) else value) is sign
            evidence += where
    if unread is not None and not answered:
        return unknown(unread.reason, "answered")
    verdict = Verdict.PASS if answered else Verdict.FAIL
    outcome = Outcome(verdict, "answered", "answered" if answered else "did not answer", evidence)
    return because(outcome, "nmi-dispatch", "nmi-gate-present", "nmi-gate-handler", "nmi-gate-selector", "idtr")


def _nmi_entries(context: Context, cpu: int) -> Outcome:
    if context.nmi_entries is None:
        return skip("only a trace counts entries")
    if not context.crash.reached(CrashStep.WAITED):
        return skip("the wait is not over")
    entries = context.nmi_entries.get(cpu, 0)
    allowed = timed(context.other(cpu), OtherStep.NMI_TAKEN, 0, 1)
    return expect(Read(entries, (Evidence("breakpoint at the NMI handler of the crash path"),)), allowed)


# The local APIC and the CPU itself

@lru_cache
def _said_by(source: str) -> tuple[Evidence, ...]:
    return (Evidence(source),) if source else ()


def _lapic_read(lapic: Lapic | Absent, of: Callable[[Lapic], Any]) -> Read:
    value = lapic if isinstance(lapic, Absent) else of(lapic)
    return Read(value) if isinstance(lapic, Absent) else Read(value, _said_by(lapic.source))


def _lapic_mode(context: Context, cpu: int) -> Outcome:
    boot, running = context.boot_mode, context.running_mode
    allowed = _by_role(context, cpu, CrashStep.STOPPED, OtherStep.STOPPED, before=running, after=boot, offline=running)
    late = context.is_other(cpu) and not context.other(cpu).reached(OtherStep.STOPPED)
    if late and not context.crash.before(CrashStep.STOPPED):
        # x2apic_enabled may be the crashing CPU's alone by now: it does not tell the mode in which this one ran.
        allowed = (*allowed, apic.Mode.XAPIC.value, apic.Mode.X2APIC.value)
    if len(allowed) > 1:  # from x2APIC back to xAPIC the way is through disabled (SDM vol. 3, 11.12.5)
        allowed = (*allowed, apic.Mode.DISABLED.value)
    missing = next((value for value in allowed if isinstance(value, Absent)), None)
    if missing is not None:
        return _from_absence(missing, None)

    def mode(lapic: Lapic) -> Any:
        return lapic.apic_base if isinstance(lapic.apic_base, Absent) else apic.mode(lapic.apic_base).value

    return expect(_lapic_read(context.lapic(cpu), mode), allowed)


def _lapic_enabled(context: Context, cpu: int) -> Outcome:
    def enabled(lapic: Lapic) -> bool | Absent:
        return lapic.spiv if isinstance(lapic.spiv, Absent) else bool(lapic.spiv & apic.SPIV_SOFTWARE_ENABLE)

    read = _lapic_read(context.lapic(cpu), enabled)
    if context.is_crashing(cpu):
        # Disabling the IO-APIC leaves the crashing CPU's in virtual-wire mode, software-enabled.
        return expect(read, (True,))
    return expect(read, timed(context.other(cpu), OtherStep.STOPPED, True, False))


def _lapic_lvt(context: Context, cpu: int) -> Outcome:
    if context.is_crashing(cpu) or not context.other(cpu).reached(OtherStep.STOPPED):
        return skip("it is not stopped" if not context.is_crashing(cpu) else "it ends in virtual-wire mode")

    def unmasked(lapic: Lapic) -> tuple[str, ...] | Absent:
        if isinstance(lapic.lvt, Absent):
            return lapic.lvt
        entries = zip(apic.LVT_NAMES, lapic.lvt, strict=True)
        return tuple(name for name, entry in entries if not entry & apic.LVT_MASKED)

    return because(expect(_lapic_read(context.lapic(cpu), unmasked), ((),), list), "lapic-enabled")


def _on_its_way(context: Context, cpu: int) -> Outcome | None:
    """What the last steps of another CPU leave can be judged once Xen hands over; None means judge it now."""
    if not context.crash.reached(CrashStep.NEUTRALISED):
        return skip("Xen has not handed over")
    if context.other(cpu).before(OtherStep.SELF_NMI):
        return skip("it has not come so far")
    physical = context.physical(cpu)
    if isinstance(physical, Absent) or not physical.current or context.other(cpu).reached(OtherStep.PARKED):
        return None
    if physical.halted is True:
        return None
    inside = _in_function(context, physical, context.generation.parks_in)
    if isinstance(inside, Absent):
        return _from_absence(inside, None)
    if not inside or _stands(context, physical) != _AWAKE:
        return None
    if context.position.stage is CRASHED:
        return unknown("it is awake where it should halt: look again, it may have been on its way into the halt loop")
    return skip("it has signed off and is still on its way into the halt loop: nobody waits for that")


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
    after = context.after_hlt(physical.registers["rip"])
    if isinstance(after, Absent):
        return after
    return _AFTER_HLT if after else _AWAKE


def _lapic_self_nmi(context: Context, cpu: int) -> Outcome:
    if not context.generation.has_save_done:
        return skip("this generation queues no NMI to itself")
    early = _on_its_way(context, cpu)
    if early:
        return early

    def target(lapic: Lapic) -> str | Absent:
        for part in (lapic.apic_base, lapic.icr_low, lapic.icr_high, lapic.apic_id):
            if isinstance(part, Absent):
                return part
        assert isinstance(lapic.icr_low, int) and isinstance(lapic.icr_high, int) and isinstance(lapic.apic_base, int)
        low = lapic.icr_low
        if low & apic.ICR_DELIVERY_MODE != apic.ICR_DELIVERY_NMI:
            return f"no NMI (ICR {low:#x})"
        if low & (apic.ICR_SHORTHAND | apic.ICR_DESTINATION_LOGICAL):
            return f"an NMI by shorthand or logical destination (ICR {low:#x})"
        destination = apic.icr_destination(lapic.icr_high, apic.mode(lapic.apic_base))
        return "an NMI to itself" if destination == lapic.apic_id else f"an NMI to APIC id {destination}"

    return expect(_lapic_read(context.lapic(cpu), target), ("an NMI to itself",))


def _physical_read(context: Context, cpu: int, of: Callable[[PhysicalCpu], Any]) -> Read:
    physical = context.physical(cpu)
    value = physical if isinstance(physical, Absent) else of(physical)
    return Read(value) if isinstance(physical, Absent) else Read(value, _said_by(physical.source))


def _nmi_latch(context: Context, cpu: int) -> Outcome:
    read = _physical_read(context, cpu, lambda physical: physical.nmi_blocked)
    if context.is_crashing(cpu):
        if not context.generation.swaps_mc or not context.crash.reached(CrashStep.NEUTRALISED):
            return skip("NMIs are opened in machine_kexec")
        return expect(read, ("open",), of=_latch)
    if not context.other(cpu).reached(OtherStep.NMI_TAKEN):
        return skip("it has not surely taken the NMI")
    return expect(read, ("blocked",), of=_latch)


def _latch(blocked: bool) -> str:
    return "blocked" if blocked else "open"


def _nmi_pending(context: Context, cpu: int) -> Outcome:
    if not context.generation.has_save_done:
        return skip("this generation queues no NMI to itself")
    early = _on_its_way(context, cpu)
    pending = expect(_physical_read(context, cpu, lambda physical: physical.nmi_pending), (True,))
    return early or because(pending, "lapic-self-nmi")


def _cpu_parked(context: Context, cpu: int) -> Outcome:
    early = _on_its_way(context, cpu)
    if early:
        return early
    function = context.generation.parks_in
    known = context.physical(cpu)
    told = isinstance(known, Absent) or not isinstance(known.halted, Absent)
    parked = f"{_HALTED if told else _AFTER_HLT} {function}, interrupts off"

    def where(physical: PhysicalCpu) -> str | Absent:
        if not physical.current:
            return Absent("the registers are those saved in the notes", Kind.NOT_HELD)
        if "rip" not in physical.registers or "rflags" not in physical.registers:
            return Absent("its registers could not be read")
        interrupts = "on" if physical.registers["rflags"] & RFLAGS_IF else "off"
        inside = _in_function(context, physical, function)
        if isinstance(inside, Absent):
            return inside
        stands = _stands(context, physical) if inside or told else ""
        if isinstance(stands, Absent):
            return stands
        if inside and stands != _AWAKE and interrupts == "off":
            return parked
        at = context.symbols.describe(physical.registers["rip"])
        return f"{stands} {at}, interrupts {interrupts}".lstrip()

    return expect(_physical_read(context, cpu, where), (parked,))


def _outside_xen(context: Context, physical: PhysicalCpu) -> bool:
    rip = physical.registers.get("rip")
    return rip is not None and image_region(rip) != image_region(context.symbols.address("idle_pg_table"))


def _idtr(context: Context, cpu: int) -> Outcome:
    state = context.state.of(cpu)
    if context.no_idt:
        return _from_absence(context.no_idt, None)

    def table(physical: PhysicalCpu) -> tuple[int, int] | Absent:
        if physical.guest_mode is True:
            return Absent("it is in a guest: IDTR is the guest's", Kind.NOT_APPLICABLE)
        if not physical.current or not isinstance(physical.guest_mode, Absent) or not _outside_xen(context, physical):
            return physical.idtr
        if physical.idtr == (state.idt.value, 0xFFF):
            return physical.idtr
        if context.guest_state_loaded(state) is True:
            return Absent("it runs outside Xen with an HVM guest's state: IDTR is the guest's", Kind.NOT_APPLICABLE)
        return Absent(f"it runs outside Xen, in an HVM guest perhaps, whose IDTR this is: {physical.guest_mode.reason}")

    if not state.idt.present:
        return _from_absence(state.idt.value, None)
    return expect(
        _physical_read(context, cpu, table),
        ((state.idt.value, 0xFFF),),
        lambda value: {"base": hex(value[0]), "limit": value[1]},
    )


def _x2apic_enabled(context: Context, _cpu: int) -> Outcome:
    if not context.crash.reached(CrashStep.STOPPED):
        return skip("re-evaluated by the crashing CPU after its own stop")
    boot = context.boot_mode
    if isinstance(boot, Absent):
        return _from_absence(boot, None)
    return because(expect(context.state.system["x2apic_enabled"], (boot == apic.Mode.X2APIC.value,)), "lapic-mode")


CHECKS: tuple[Check, ...] = (
    Check("cpus-found", Subject.MACHINE, "xen/arch/x86/percpu.c and smpboot.c (7cfb005362)",
          "it does not fail: a CPU that was online and was not found among Xen's is unknown, and so is the verdict",
          _cpus_found),
    *_gate_checks("nmi", VECTOR_NMI, "an NMI", _CRASH_C),
    *_gate_checks("mc", VECTOR_MC, "a machine check", _KEXEC_C),
    Check("gate-change", Subject.FOLLOWED, "xen/arch/x86/crash.c and machine_kexec.c (77ad1faa6b); docs/reference.md",
          "something changed a gate as, or when, this crash path never does: an NMI or a machine check that came in "
          "between went elsewhere, whatever the gate is now", _gate_change),
    Check("nmi-dispatch", Subject.MACHINE, "xen/arch/x86/crash.c, nmi_shootdown_cpus (cbeeaa7da0, e7f147bf4a)",
          "the shootdown NMI runs the normal handler: no other CPU saves its state or stops", _nmi_dispatch,
          dict.fromkeys(_DISPATCHED_BEFORE, "an ordinary NMI stops a CPU of a machine that has not crashed")),
    Check("waiting-cpus", Subject.MACHINE, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b, and its author's review)",
          "the crashing CPU waits a full second for CPUs that have already answered, or does not wait for those that "
          "have not", _waiting,
          {0: "the crashing CPU waits a full second for CPUs that have already answered"}),
    Check("waiting-cpus", Subject.CPUS, "xen/arch/x86/crash.c, do_nmi_crash (f12c1f0b09)",
          "the crashing CPU waits a full second for it although it answered, or leaves while it still runs", _waiting,
          {False: "the crashing CPU waits a full second for it, and says that it could not shoot it down",
           True: "the crashing CPU does not wait for it: it leaves while this CPU still runs"}),
    Check("nmi-answered", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
          "when the wait was over this CPU had done nothing of what the shootdown NMI makes it do: unless it does so "
          "yet, it runs on under the crash kernel, and its registers are lost",
          _nmi_answered),
    Check("nmi-entries", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
          "it did not enter the handler just once: more means that an iret opened NMIs there and a second one came in, "
          "none that the NMI never reached it",
          _nmi_entries),
    Check("saved-cpus", Subject.CPUS, "xen/common/kexec.c, kexec_crash_save_cpu",
          "its registers are missing from the dump, or would be saved twice", _saved,
          {False: "its notes count as saved although they are not: its registers are missing from the dump",
           True: "its registers are missing from the dump"}),
    Check("online-cpus", Subject.CPUS, "xen/arch/x86/smp.c, __stop_this_cpu",
          "Xen still counts it as running: later steps are sent to a CPU that is halted, or skip one that is not",
          _online,
          {False: "Xen still counts it as running: later steps are sent to a CPU that is halted",
           True: "Xen does not count it as running: later steps of the crash leave it out"}),
    Check("crash-save-done", Subject.CPUS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
          "a second NMI stops it twice, or its first one saves nothing", _crash_save_done,
          {False: "it counts as done already: a shootdown NMI that finds it so saves nothing and stops no LAPIC",
           True: "a second NMI, such as the one it queued to itself, stops it and signs it off again: a count then "
           "leaves out a CPU that has not answered"}),
    Check("crash-notes", Subject.CPUS, "xen/common/kexec.c, kexec_crash_save_cpu",
          "its registers are missing from the dump, or are not its own", _crash_notes,
          {"empty": "the dump shows registers of this CPU that this crash did not save"}),
    Check("dump-notes", Subject.ONLINE, "xen/common/kexec.c, kexec_crash_save_cpu; the dump's own ELF notes",
          "the registers that gdb or crash(8) show for this CPU are not those that Xen saved", _dump_notes),
    Check("crash-info-note", Subject.MACHINE, "xen/common/kexec.c, kexec_crash_save_info",
          "tools cannot tell where Xen lies in the dump", _crash_info_note),
    Check("crash-owner", Subject.MACHINE, "xen/common/kexec.c, one_cpu_only (470f58c159)",
          "one_cpu_only() let in another CPU than it recorded: two may walk the crash path at once", _crash_owner),
    Check("kexecing", Subject.MACHINE, "xen/common/kexec.c, kexec_crash; read by disable_local_APIC",
          "the local APICs are not returned to the mode in which the firmware left them, as the crash kernel expects",
          _kexecing, {False: "Xen behaves as on its way into a crash kernel, and it is not"}),
    Check("shootdown-report", Subject.MACHINE, "xen/arch/x86/crash.c, nmi_shootdown_cpus (f12c1f0b09)",
          "Xen itself said that it could not shoot down these CPUs: they were still waited for after a second",
          _shootdown_report),
    Check("x2apic-enabled", Subject.MACHINE, "xen/arch/x86/crash.c, nmi_shootdown_cpus",
          "Xen goes on to use the crashing CPU's LAPIC in the wrong mode: #GP, or writes that go nowhere",
          _x2apic_enabled),
    Check("lapic-mode", Subject.ONLINE, "xen/arch/x86/apic.c, disable_local_APIC",
          "the crash kernel finds the LAPIC in a mode that it does not expect and hangs or faults", _lapic_mode),
    Check("lapic-enabled", Subject.ONLINE, "xen/arch/x86/apic.c, disable_local_APIC",
          "a stopped CPU still takes interrupts, or a running one none", _lapic_enabled,
          {False: "this stopped CPU still takes interrupts", True: "this CPU takes no interrupts, and should"}),
    Check("lapic-lvt", Subject.OTHERS, "xen/arch/x86/apic.c, clear_local_APIC",
          "a local interrupt may wake the parked CPU: the entries of its local vector table that are named here are "
          "not masked", _lapic_lvt),
    Check("lapic-self-nmi", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
          "nothing is queued behind the NMI latch: a later iret on this CPU (from a machine check) would let it "
          "run on", _lapic_self_nmi),
    Check("nmi-latch", Subject.ONLINE, "xen/arch/x86/machine_kexec.c, enable_nmis (77ad1faa6b)",
          "the crash kernel starts with NMIs blocked and its watchdog is dead, or a parked CPU can be woken",
          _nmi_latch,
          {"open": "the crash kernel starts with NMIs blocked: its watchdog and its own crash NMIs are dead",
           "blocked": "NMIs are open on this CPU while it runs its NMI handler, or is parked in it: the next one "
           "starts it again"}),
    Check("nmi-pending", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
          "nothing waits behind the NMI latch of the parked CPU: an iret there (from a machine check) lets it run on",
          _nmi_pending),
    Check("cpu-parked", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash's halt loop (77ad1faa6b)",
          "it still runs, or can be woken, while the crash kernel takes the machine over", _cpu_parked),
    Check("idtr", Subject.ONLINE, "xen/arch/x86/cpu/common.c, load_system_tables",
          "the CPU does not use the IDT that Xen writes to: whatever the gates say, it takes other handlers", _idtr),
)  # fmt: skip
