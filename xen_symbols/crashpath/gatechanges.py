"""What changed each CPU's NMI and #MC gate between the stops of a trace, and which changes Xen makes.

The changes are found by reading every gate again at each stop. Most of what could be wrong with a gate the checks of
each stage see; what they cannot see is a change that comes and goes where a gate may be on either side of a step, and
who makes one: that is known only where a watchpoint saw it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from xen_symbols.absence import Absent
from xen_symbols.crashpath import stages
from xen_symbols.crashpath.generations import Generation, Hook
from xen_symbols.crashpath.stages import CrashStep, OtherStep, Position
from xen_symbols.x86.gate import VECTOR_MC, VECTOR_NMI, Gate
from xen_symbols.xen.reads import Read
from xen_symbols.xen.state import State

Key = tuple[int, int]  # CPU (Xen's number), vector
Gates = Mapping[Key, Gate]

# -- What changed -----------------------------------------------------------------------------


class Moment(NamedTuple):
    """One stop: every NMI and #MC gate that could be read, and how far each CPU had come.

    `stop` is its index in the report's stages, None before the first. `guests` are the CPUs whose #DF gate has no IST:
    AMD CPUs that hold an HVM guest's state.
    """

    gates: Gates
    position: Position
    stop: int | None = None
    guests: frozenset[int] = frozenset()


def moment_of(state: State, position: Position, stop: int | None = None) -> Moment:
    """The gates as they were read at a stop."""
    guests = {cpu.cpu for cpu in state.cpus.values() if cpu.df_gate.present and not cpu.df_gate.value.ist}
    gates = {key: read.value for key, read in _read_gates(state).items()}
    return Moment(gates, position, stop, frozenset(guests))


def gate_addresses(state: State) -> dict[Key, int]:
    """Where each NMI and #MC gate lies that could be read."""
    return {key: read.address for key, read in _read_gates(state).items() if read.address is not None}


def _read_gates(state: State) -> dict[Key, Read]:
    return {
        (cpu.cpu, vector): read
        for cpu in state.cpus.values()
        for vector, read in ((VECTOR_NMI, cpu.nmi_gate), (VECTOR_MC, cpu.mc_gate))
        if read.present
    }


class Write(NamedTuple):
    """A write to a gate that a watchpoint caught: by which CPU, where it went on, and in which function it was; of one
    that gcc has split (NAME.cold, NAME.part.0) or copied (NAME.constprop.0), NAME."""

    cpu: int  # Xen's number
    pc: int  # of the instruction after the one that wrote
    function: str


class GateChange(NamedTuple):
    """One gate as it is now and as it was when it was read last. `writes` are those that were seen in between: a
    watchpoint misses some where several CPUs write at once."""

    cpu: int
    vector: int
    since: Moment
    now: Moment
    writes: tuple[Write, ...] = ()

    @property
    def before(self) -> Gate:
        return self.since.gates[self.cpu, self.vector]

    @property
    def after(self) -> Gate:
        return self.now.gates[self.cpu, self.vector]

    @property
    def last_stage(self) -> str:
        """The stage at which it was read last."""
        return self.since.position.stage.id

    @property
    def since_stage(self) -> str | None:
        """The stage at which it was read last; None before the first of a trace."""
        return None if self.since.stop is None else self.last_stage

    @property
    def stage(self) -> str:
        """The stage at which the change was seen."""
        return self.now.position.stage.id

    @property
    def stop(self) -> int:
        """The index of that stage in the report."""
        assert self.now.stop is not None
        return self.now.stop

    @property
    def changed(self) -> tuple[str, ...]:
        """Which properties differ, by their names in `Gate`."""
        return tuple(name for name in Gate._fields if getattr(self.before, name) != getattr(self.after, name))


class Writes:
    """The writes that watchpoints have caught and nobody has asked for yet.

    QEMU tells one hit of those that come at the same time. It takes another one for news when that CPU stops next,
    wherever that is; gdb then finds a value that is not the one it knew. Nobody has just written there: the value was
    there when the gates were looked at before, or the CPU is at a breakpoint, which is a function's beginning. Nor is
    anybody named for a hit outside Xen's image: a guest may have something else at that address.
    """

    def __init__(self) -> None:
        self._caught: dict[Key, list[tuple[int, int]]] = {}
        self._contents: dict[Key, bytes] = {}

    def caught(self, key: Key, index: int, pc: int, contents: Mapping[Key, bytes]) -> None:
        """The target's CPU `index` wrote to a gate; `pc` is that of its next instruction, `contents` what each gate
        holds now."""
        if contents.get(key) != self._contents.get(key):
            self._caught.setdefault(key, []).append((index, pc))
        self._contents |= contents

    def look(self, state: State) -> None:
        """What the gates hold is known now, whoever wrote it."""
        self._contents |= {key: read.value.raw for key, read in _read_gates(state).items()}

    def take(self, state: State) -> dict[Key, list[Write]]:
        """Those caught since the last call, in order, by Xen's numbers of the CPUs."""
        self.look(state)
        numbers = {c.physical.index: c.cpu for c in state.cpus.values() if not isinstance(c.physical, Absent)}
        caught, self._caught = self._caught, {}
        taken: dict[Key, list[Write]] = {}
        for key, writes in caught.items():
            for index, pc in writes:
                symbol, offset = state.symbols.lookup(pc) or (None, 0)
                if index in numbers and symbol is not None and offset:
                    write = Write(numbers[index], pc, symbol.name.partition(".")[0])
                    taken.setdefault(key, []).append(write)
        return taken


class GateHistory:
    """When each gate was read last. A gate that cannot be read at a stop keeps what is known."""

    def __init__(self) -> None:
        self._last: dict[Key, Moment] = {}

    def see(self, now: Moment, writes: Mapping[Key, Sequence[Write]] | None = None) -> dict[Key, GateChange]:
        """Each gate that was read before, compared with what it is now, whether it changed or not; `writes` are those
        seen since the last moment."""
        known = {key: self._last[key] for key in sorted(now.gates) if key in self._last}
        self._last |= dict.fromkeys(now.gates, now)
        return {key: GateChange(*key, since, now, tuple((writes or {}).get(key, ()))) for key, since in known.items()}


# -- What Xen changes -------------------------------------------------------------------------


class Owner(enum.Enum):
    """Whose gate it is."""

    CRASHING = "the crashing CPU's"
    OTHER = "another's that was online"
    NOT_CRASHING = "every other's"
    EVERY = "every CPU's"
    OFFLINE = "that of a CPU going offline, or coming back"


NORMAL = "normal"  # the handler, or the IST, of a running Xen


class Writer(NamedTuple):
    """Who makes a change: code of one of these functions (gcc may have put one into the other), on the gate's own CPU
    or, not `itself`, on the crashing one. Of a helper that is a function of its own the caller is not seen."""

    source: str
    functions: tuple[str, ...]
    itself: bool = True


class Change(NamedTuple):
    """One change that Xen makes to a gate.

    `property` of gate `vector` becomes `to`: a handler's name, an IST, or NORMAL. `by` makes it, while the crashing CPU
    is on its way to one of the steps `first` to `last`; `until` is the step from which on the gate's own CPU does it
    no more. `with_guest`: only where an HVM guest's state is loaded, or was.
    """

    whose: Owner
    vector: int
    property: str
    to: str | int
    first: CrashStep
    last: CrashStep
    by: Writer
    made_in: Callable[[Generation], bool]
    until: OtherStep | None = None
    with_guest: bool = False

    def makes(self, write: Write, change: GateChange) -> bool:
        """Whether a write may be this change."""
        writer = change.cpu if self.by.itself else change.now.position.crashing_cpu
        return write.cpu == writer and write.function in self.by.functions

    def allows(self, change: GateChange, generation: Generation) -> bool:
        """Whether a gate may have been changed so between two moments, whatever it became."""
        loaded = change.cpu in change.since.guests | change.now.guests
        return self.happens(change, generation) and (loaded or not self.with_guest)

    def happens(self, change: GateChange, generation: Generation) -> bool:
        """Whether it may have been made between two moments, and perhaps undone."""
        before, after = change.since.position, change.now.position
        own = before.others.get(change.cpu)
        return (
            change.vector == self.vector
            and self.made_in(generation)
            and self._is_whose(change)
            and not after.crash.before(self.first)
            and not before.crash.reached(self.last)
            and not (self.until is not None and own is not None and own.reached(self.until))
        )

    def _is_whose(self, change: GateChange) -> bool:
        position = change.now.position
        online = change.cpu in position.online and change.cpu in change.since.position.online
        return {
            Owner.CRASHING: change.cpu == position.crashing_cpu,
            Owner.OTHER: change.cpu != position.crashing_cpu and change.cpu in position.online,
            Owner.NOT_CRASHING: change.cpu != position.crashing_cpu,
            Owner.EVERY: True,
            Owner.OFFLINE: not online,
        }[self.whose]


_RFC = "RFC of 2012-12-04"
# Inline functions, mostly; set_intr_gate and _set_gate are the RFC's.
HELPERS = (
    "set_ist", "_write_gate_lower", "_set_gate_lower", "_update_gate_addr_lower", "enable_each_ist", "disable_each_ist",
    "_set_gate", "set_intr_gate", "__set_intr_gate",
)  # fmt: skip


def _shootdown(source: str) -> Writer:
    return Writer(source, ("nmi_shootdown_cpus", "machine_crash_shutdown", *HELPERS), itself=False)


def _handover(source: str) -> Writer:
    return Writer(source, ("machine_kexec", *HELPERS), itself=False)


_NMI_SHOOTDOWN = "77ad1faa6b, nmi_shootdown_cpus"
_OWN_NMI_GATE = _shootdown(f"{_NMI_SHOOTDOWN} (until ad9c7d86c9)")
_OWN_MC_GATE = _shootdown(_NMI_SHOOTDOWN)
_HOOK = _shootdown(f"{_NMI_SHOOTDOWN} (until cbeeaa7da0)")
_REMOTE_IST = _shootdown(f"{_RFC}, nmi_shootdown_cpus")
_ANSWER = Writer("77ad1faa6b, do_nmi_crash", ("do_nmi_crash", *HELPERS))
_SWAP = _handover("77ad1faa6b, machine_kexec")
_REWRITE = _handover(f"{_RFC}, machine_kexec")
_OVERTAKE = _handover("77ad1faa6b, machine_kexec: it may overtake do_nmi_crash")
# 4.2 to 4.10 bit by bit; enable_each_ist and disable_each_ist since.
_SVM = Writer(
    "f9fc2e584d, svm_ctxt_switch_to and svm_ctxt_switch_from", ("svm_ctxt_switch_to", "svm_ctxt_switch_from", *HELPERS)
)
# Both are for a CPU that is not online, of which writers are not judged.
_PLAY_DEAD = Writer("73cb1383bf, play_dead", ("play_dead", "idle_loop", *HELPERS))
_COPIED = Writer(
    "cc08c73c8c, cpu_smpboot_alloc: a CPU that comes online starts with a copy of the table",
    ("cpu_smpboot_alloc", "cpu_smpboot_callback", "memcpy"),
    itself=False,
)

_ARMED = (CrashStep.ARMED, CrashStep.ARMED)
_ANSWERING = (CrashStep.WAITED, CrashStep.NEUTRALISED)  # one that answers late does it as late as it answers
_LEAVING = (CrashStep.NEUTRALISED, CrashStep.NEUTRALISED)
_RUNNING = (CrashStep.NOTHING, CrashStep.ARMED)
_EVER = (CrashStep.NOTHING, CrashStep.NEUTRALISED)


def _by_itself(generation: Generation) -> bool:
    return generation.swaps_mc and not generation.clears_remote_ist


def _any(_generation: Generation) -> bool:
    return True


CHANGES: tuple[Change, ...] = (
    Change(Owner.CRASHING, VECTOR_NMI, "handler", "trap_nop", *_ARMED, _OWN_NMI_GATE, lambda g: g.own_nmi_gate),
    Change(Owner.CRASHING, VECTOR_NMI, "ist", 0, *_ARMED, _OWN_NMI_GATE, lambda g: g.own_nmi_gate),
    Change(Owner.CRASHING, VECTOR_MC, "ist", 0, *_ARMED, _OWN_MC_GATE, lambda g: g.swaps_mc),
    Change(Owner.NOT_CRASHING, VECTOR_NMI, "handler", "nmi_crash", *_ARMED, _HOOK, lambda g: g.hook is Hook.GATE),
    *(Change(Owner.NOT_CRASHING, vector, "ist", 0, *_ARMED, _REMOTE_IST,
             lambda g: g.clears_remote_ist) for vector in (VECTOR_NMI, VECTOR_MC)),
    Change(Owner.OTHER, VECTOR_MC, "ist", 0, *_ANSWERING, _ANSWER, _by_itself),
    Change(Owner.EVERY, VECTOR_MC, "handler", "trap_nop", *_LEAVING, _SWAP, lambda g: g.swaps_mc),
    Change(Owner.EVERY, VECTOR_MC, "ist", 0, *_LEAVING, _REWRITE, lambda g: g.clears_remote_ist),
    # The word in which the handler is replaced also holds the IST, which a late CPU may take away at that instant.
    Change(Owner.OTHER, VECTOR_MC, "ist", NORMAL, *_LEAVING, _OVERTAKE, _by_itself),
    Change(Owner.OFFLINE, VECTOR_NMI, "handler", "trap_nop", *_EVER, _PLAY_DEAD, lambda g: g.dead_cpus_use_trap_nop),
    Change(Owner.OFFLINE, VECTOR_NMI, "ist", 0, *_EVER, _PLAY_DEAD, lambda g: g.dead_cpus_use_trap_nop),
    *(Change(Owner.OFFLINE, vector, name, to, *_RUNNING, _COPIED, _any)
      for vector in (VECTOR_NMI, VECTOR_MC) for name, to in (("handler", NORMAL), ("ist", 0), ("ist", NORMAL))),
    # A CPU that has taken the NMI switches no more; the crashing one has its interrupts off by then.
    *(Change(whose, vector, "ist", to, *steps, _SVM, _any, OtherStep.NMI_TAKEN, with_guest=True)
      for whose, steps in ((Owner.CRASHING, _RUNNING), (Owner.NOT_CRASHING, _EVER))
      for vector in (VECTOR_NMI, VECTOR_MC) for to in (0, NORMAL)),
)  # fmt: skip


def allowed(change: GateChange, generation: Generation) -> list[Change]:
    """Every change that Xen may have made to this gate between the two moments."""
    return [row for row in CHANGES if row.allows(change, generation)]


def unexpected_writes(change: GateChange, generation: Generation) -> list[Write]:
    """The writes to a gate that none of Xen's changes between the two moments is made by.

    Before the crash they are not judged, nor on a CPU that was not online: such a CPU's table may be given back
    (cpu_smpboot_free), and what writes to its memory then is no writer of gates.
    """
    before, after = change.since.position, change.now.position
    if before.stage is stages.NORMAL or change.cpu not in before.online & after.online:
        return []
    rows = [row for row in CHANGES if row.happens(change, generation)]
    return [write for write in change.writes if not any(row.makes(write, change) for row in rows)]
