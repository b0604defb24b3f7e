"""One moment of one machine, with what the checks need to know about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.crashpath import timeline
from xen_symbols.crashpath.generations import GENERATIONS, Generation, Hook
from xen_symbols.crashpath.stages import ANYWHERE, NORMAL, CrashStep, OtherStep, Position, Span
from xen_symbols.crashpath.timeline import Code, GateProperty, Object, Value, Whose, Window, Write
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import TEXT
from xen_symbols.targets import Lapic, PhysicalCpu
from xen_symbols.x86 import apic
from xen_symbols.x86.gate import VECTOR_NMI
from xen_symbols.x86.paging import CR0_PG
from xen_symbols.xen.console import read_console
from xen_symbols.xen.cpuinfo import IST_SSP_SIZE
from xen_symbols.xen.idt import ENTRY_POINTS
from xen_symbols.xen.ist import ist_numbers
from xen_symbols.xen.lapic import BOOT_MODES
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.owned import Owned
from xen_symbols.xen.reads import Read, in_memory
from xen_symbols.xen.state import CpuState, State, owed_by_online

if TYPE_CHECKING:  # a trace alone needs them, or a machine that did not hand over
    from xen_symbols.crashpath.death import Death
    from xen_symbols.crashpath.gatechanges import GateChange, Key
    from xen_symbols.crashpath.halts import Halts

MACHINE = -1  # the `cpu` that a check of the whole machine is asked about

_CONSOLE_TAIL = 2048  # bytes
_CRASH_KERNELS = Absent("the crash kernel runs on it", Kind.NOT_APPLICABLE)
_IST_0_TOO = "IST of #DF is 0 too, as while an AMD CPU holds an HVM guest's state, but TR is Xen's own"
# A name that came (7888440625, 4.13.0) after the fix of XSA-244 (cc08c73c8c, 4.10.0 and backports): this Xen has it.
_SINCE_XSA_244 = "per_cpu__tss_page"


class Followed(NamedTuple):
    """What only a trace knows about a moment.

    `nmi_entries`: into the crash path's NMI handler, by CPU; None where they are not counted. `gates_before`: each gate
    and what it was at the last stop. `unblocked`: how NMIs were unblocked on the crashing CPU. `looks`: how often the
    machine was looked at since the handover; None where it is not looked at again.
    """

    nmi_entries: Mapping[int, int] | None = None
    gates_before: Mapping[Key, GateChange] = MappingProxyType({})
    unblocked: str | Absent = Absent("it was not looked for")
    looks: int | None = None


def _idt_in_use(state: State) -> Absent | None:
    """None where the IDT delivers events; else why no gate is judged: FRED does, or that could not be read."""
    fred = state.system["fred"].value
    if isinstance(fred, Absent):
        return None if fred.kind is Kind.NO_SYMBOL else fred  # a build without it has no FRED
    return Absent("FRED delivers events: the IDT is not used", Kind.NOT_APPLICABLE) if fred == 1 else None


class _Standing:
    """A CPU's position on the path, which thousands share, and what the table says about each object there."""

    def __init__(self, role: Whose, span: Span) -> None:
        self.role, self.span = role, span
        self._writes: dict[Object, list[Write]] = {}
        self.values: dict[Object, tuple[Any, ...]] = {}
        self.allowed: dict[Object, tuple[Any, ...] | Absent] = {}

    def writes(self, to: Object, generation: Generation | None) -> list[Write]:
        writes = self._writes.get(to)
        if writes is None:
            writes = self._writes[to] = timeline.at_stops(to, generation, self.role)
        return writes


class Context:
    """One moment, with what the checks need to know about it.

    `cpus` are the numbers of those that are judged: all that exist, and all that were online, whether found or not.
    """

    def __init__(
        self,
        memory: XenMemory,
        state: State,
        position: Position,
        generation: Generation | None,
        followed: Followed | None = None,
    ) -> None:
        """`generation` is None where none fits, `followed`, what a trace alone knows, for any other look at a machine.
        """
        self.state = owed_by_online(state, position.online)
        self.cpus = [cpu.cpu for cpu in state.cpus.values() if cpu.exists or cpu.cpu in position.online]
        self.position = position
        self.crash = position.crash
        self.identified = generation is not None
        self._generation = generation
        self.symbols = state.symbols
        self.memory = memory
        self.followed = followed
        self.nmi, self.mc, self.trap_nop = (self._entry(*entry.names) for entry in ENTRY_POINTS)
        self.ist = ist_numbers(state)
        self.no_idt = _idt_in_use(state)
        self._shown: dict[int, dict[str, Any]] = {}
        self._words: dict[tuple[str, int], Read] = {}
        self._makes: dict[Object, bool] = {}
        self._shared: dict[tuple[Whose, int], _Standing] = {}
        self._standings: dict[int, _Standing] = {}

    @property
    def generation(self) -> Generation:
        """Only for what it decides: see ByGeneration."""
        assert self._generation is not None
        return self._generation

    @property
    def on_unknown_path(self) -> bool:
        """Whether Xen is on a crash path that no generation fits."""
        return not self.identified and self.position.stage is not NORMAL

    @cached_property
    def rips_saved(self) -> Mapping[str | None, Sequence[int]]:
        """By function, the rip that most CPUs have there in Xen's crash notes; two of them where as many have another.
        """
        notes = [cpu.notes.value for cpu in self.state.cpus.values() if cpu.notes.present]
        counts = Counter(each.registers["rip"] for each in notes if not isinstance(each.registers, Absent))
        most: dict[str | None, list[int]] = {}
        for rip, count in counts.most_common():
            of_function = most.setdefault(self.symbols.function_at(rip), [])
            if len(of_function) < 2 and (not of_function or count == counts[of_function[0]]):
                of_function.append(rip)
        return most

    def assuming(self, spans: Mapping[int, Span]) -> Context:
        """The same moment, with other positions of some other CPUs."""
        position = self.position._replace(others={**self.position.others, **spans})
        return Context(self.memory, self.state, position, self._generation, self.followed)

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

    @property
    def others(self) -> list[int]:
        return sorted(cpu for cpu in self.position.online if not self.is_crashing(cpu))

    def other(self, cpu: int) -> Span:
        return self.position.others.get(cpu, ANYWHERE)

    def _standing(self, cpu: int) -> _Standing:
        standing = self._standings.get(cpu)
        if standing is None:
            span = self.other(cpu)
            if cpu == MACHINE:
                role = Whose.MACHINE
            elif self.is_crashing(cpu):
                role = Whose.CRASHING
            else:
                role = Whose.OTHER if cpu in self.position.online else Whose.OFFLINE
            standing = self._shared.setdefault((role, id(span)), _Standing(role, span))
            self._standings[cpu] = standing
        return standing

    # What the timeline says of an object there

    def makes(self, written: Object) -> bool:
        """Whether this generation's path writes it at all."""
        makes = self._makes.get(written)
        if makes is None:
            makes = self._makes[written] = timeline.makes(written, self.generation)
        return makes

    def written(self, written: Object, cpu: int) -> bool | None:
        """Whether the path's last write to it has been made; None where that is not sure, False where it makes none."""
        standing = self._standing(cpu)
        writes = standing.writes(written, self._generation)
        return writes[-1].made(self.crash, standing.span) if writes else False

    def values(self, written: Object, cpu: int) -> tuple[Any, ...]:
        """What it may be, in the table's values."""
        standing = self._standing(cpu)
        values = standing.values.get(written)
        if values is None:
            writes = standing.writes(written, self._generation)
            values = timeline.values(written, writes, standing.role, self.crash, standing.span)
            standing.values[written] = values
        return values

    def allowed(self, written: Object, cpu: int) -> tuple[Any, ...] | Absent:
        """What it may be on this machine. Absent where any value that it takes on the path is not known here."""
        standing = self._standing(cpu)
        if standing.role is Whose.OFFLINE and self._masks_unread:
            return self._masks_unread
        allowed = standing.allowed.get(written)
        if allowed is None:
            steps = [w.to for w in standing.writes(written, self._generation) if not isinstance(w.when, Window)]
            allowed = self._known(written, (written.before, *steps), self.values(written, cpu))
            standing.allowed[written] = allowed
        return allowed

    @cached_property
    def _masks_unread(self) -> Absent | None:
        """Why it is not known that a CPU which no mask shows was not online when the crash began."""
        for read in (self.state.system[name] for name in ("online", "saved", "waiting_mask")):
            if isinstance(read.value, Absent) and read.value.kind is Kind.UNREAD:
                return Absent(f"whether it was online could not be read: {read.value}")
        return None

    def _known(self, written: Object, path: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...] | Absent:
        known = {value: self.resolve(written, value) for value in (*path, *values)}
        for value in path:
            if isinstance(missing := known[value], Absent):
                return missing
        allowed: list[Any] = []
        for value in values:
            found = known[value]
            if not isinstance(found, Absent):  # as what is not a step may be
                allowed += found if isinstance(found, tuple) else (found,)
        return tuple(dict.fromkeys(allowed))

    def resolve(self, written: Object, value: Any) -> Any:
        """A value of the table as this machine has it: an address, a number or a word; a tuple for several."""
        if isinstance(value, Code):
            return self.trap_nop if value == "trap_nop" else self.address(value)
        if not isinstance(value, Value):
            return value
        if isinstance(written, GateProperty):
            return self._normal(written)
        if value is Value.IDLE_CALLBACK:
            return self._idle_callbacks
        if value is Value.IS_BOOT_MODE:
            return self.boot_mode if isinstance(self.boot_mode, Absent) else self.boot_mode == apic.Mode.X2APIC.value
        return {
            Value.CRASHING_CPU: -1 if self.position.crashing_cpu is None else self.position.crashing_cpu,
            Value.RUNNING_MODE: self.running_mode,
            Value.BOOT_MODE: self.boot_mode,
            Value.XEN_PHYS_START: self.memory.xen_phys_start,
        }[value]

    def _normal(self, gate: GateProperty) -> int | Absent:
        nmi = gate.vector == VECTOR_NMI
        if gate.property == "handler":
            return self.nmi if nmi else self.mc
        return self.ist if isinstance(self.ist, Absent) else self.ist.nmi if nmi else self.ist.mc

    @cached_property
    def _idle_callbacks(self) -> tuple[int, ...]:
        """nmi_callback may be any of these before the crash; NULL since e7f147bf4a (4.17.0)."""
        possible = GENERATIONS if self._generation is None else (self._generation,)
        none = (0,) if any(generation.hook is Hook.CALLBACK for generation in possible) else ()
        named = (self.address(name) for generation in possible for name in generation.idle_callbacks)
        return (*none, *(address for address in named if isinstance(address, int)))

    # What is known about a CPU

    def physical(self, cpu: int) -> PhysicalCpu | Absent:
        physical = self.state.of(cpu).physical
        if not self.crash.reached(CrashStep.LEFT):
            return physical
        if self.is_crashing(cpu):
            return _CRASH_KERNELS
        if isinstance(physical, Absent) or not physical.current or physical.registers.get("cr0", CR0_PG) & CR0_PG:
            return physical
        at_rest = self.other(cpu).reached(OtherStep.PARKED)  # it was seen so before
        return Absent("the crash kernel has reset it", Kind.NOT_APPLICABLE if at_rest else Kind.UNREAD)

    def lapic(self, cpu: int) -> Lapic | Absent:
        physical = self.physical(cpu)
        return physical if isinstance(physical, Absent) else physical.lapic

    def guest_state_loaded(self, cpu: CpuState) -> bool | Absent:
        """Whether an HVM guest's state is loaded there on AMD: svm_ctxt_switch_to clears IST of #DF, NMI and #MC
        together. Absent when that cannot be distinguished from an AP that came up without (XSA-244).

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
            return Absent(f"{_IST_0_TOO}: its CS, which would show a PV guest, could not be read")
        if physical.registers["cs"] & 3:
            return False
        if self.symbols.get(_SINCE_XSA_244) is not None:
            return True
        return Absent(f"{_IST_0_TOO}: the guest is about to be entered, or this Xen lacks the fix of XSA-244 "
                      "(cc08c73c8c)")  # fmt: skip

    def in_svm_guest(self, cpu: CpuState) -> bool:
        """Whether it runs a guest on AMD: until it has left it and switched away, none of its gates has an IST
        (f9fc2e584d, svm_ctxt_switch_to). Intel CPUs, which keep them, have one for #DF too."""
        physical = cpu.physical
        inside = not isinstance(physical, Absent) and physical.guest_mode is True
        return inside and cpu.df_gate.present and not cpu.df_gate.value.ist

    # What is known about the machine

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
    def owned(self) -> Owned:
        """What belongs to each CPU that was online, to hold its registers against."""
        return Owned(self.memory, self.state, sorted(self.position.online))

    @cached_property
    def deaths(self) -> dict[int, Death]:
        """What killed each CPU that died on the crash path."""
        if self.position.crashing_cpu is None or self.state.by_crash_kernel:
            return {}
        # Not for a vmcore, which has no registers to begin with: importing is most of what judging it costs.
        from xen_symbols.crashpath.death import deaths

        return deaths(self.memory, self.state, self.position, self._generation)

    @cached_property
    def console_tail(self) -> str | Absent:
        """The last that Xen printed; the report of the shootdown is among it."""
        try:
            return read_console(self.memory, _CONSOLE_TAIL)
        except Unreadable as error:
            return error.absent

    @cached_property
    def halts(self) -> Halts:
        from xen_symbols.crashpath.halts import Halts  # of CPUs as they are now, which a dump by Xen does not have

        return Halts(self.memory)

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
