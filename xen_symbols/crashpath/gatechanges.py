"""What changed each CPU's NMI and #MC gate between the stops of a trace, and which changes the timeline allows.

The changes are found by reading every gate again at each stop. Most of what could be wrong with a gate the checks of
each stage see; what they cannot see is a change that comes and goes where a gate may be on either side of a step, and
who makes one: that is known only where a watchpoint saw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xen_symbols.absence import Absent
from xen_symbols.crashpath import stages
from xen_symbols.crashpath.generations import Generation
from xen_symbols.crashpath.stages import Position
from xen_symbols.crashpath.timeline import BESIDE, PATH, GateProperty, Whose, Write
from xen_symbols.records import NamedTuple
from xen_symbols.x86.gate import VECTOR_MC, VECTOR_NMI, Gate
from xen_symbols.xen.reads import Read
from xen_symbols.xen.state import State

Key = tuple[int, int]  # CPU (Xen's number), vector
Gates = Mapping[Key, Gate]

GATE_WRITES = [(row.object, row) for row in (*PATH, *BESIDE) if isinstance(row.object, GateProperty)]

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


class CaughtWrite(NamedTuple):
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
    writes: tuple[CaughtWrite, ...] = ()

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

    def allowed(self, generation: Generation) -> list[tuple[GateProperty, Any]]:
        """Each property that Xen may have changed between the two moments, and what it became: as the timeline says,
        and whatever the gate is now."""
        loaded = self.cpu in self.since.guests | self.now.guests
        made = self._made(generation)
        return [(gate, row.to) for gate, row in made if loaded or not row.window.with_guest]

    def unexpected_writes(self, generation: Generation) -> list[CaughtWrite]:
        """The writes that none of the rows is made by which may have been made, and perhaps undone.

        Before the crash they are not judged, nor on a CPU that was not online: such a CPU's table may be given back
        (cpu_smpboot_free), and what writes to that memory later does not write gates.
        """
        before, after = self.since.position, self.now.position
        if before.stage is stages.NORMAL or self.cpu not in before.online & after.online:
            return []
        rows = [row for _, row in self._made(generation)]
        return [write for write in self.writes if not any(self._is_by(row, write) for row in rows)]

    def _made(self, generation: Generation) -> list[tuple[GateProperty, Write]]:
        """The rows of this gate that may have been made between the two moments."""
        return [
            (gate, row)
            for gate, row in GATE_WRITES
            if gate.vector == self.vector and row.made_in(generation) and self._concerns(row) and self._between(row)
        ]

    def _concerns(self, row: Write) -> bool:
        position = self.now.position
        stayed = self.cpu in position.online and self.cpu in self.since.position.online
        if row.whose is Whose.OFFLINE:  # it may go or come back between the two moments
            return not stayed
        if self.cpu == position.crashing_cpu:
            return row.concerns(Whose.CRASHING)
        return row.concerns(Whose.OTHER if self.cpu in position.online else Whose.OFFLINE)

    def _between(self, row: Write) -> bool:
        before, after, window = self.since.position, self.now.position, row.window
        own = before.others.get(self.cpu)
        over = window.until is not None and own is not None and own.reached(window.until)
        return not (after.crash.before(window.first) or before.crash.reached(window.last) or over)

    def _is_by(self, row: Write, write: CaughtWrite) -> bool:
        """Whether a write that was seen may be the row's."""
        writer = self.cpu if row.by.itself else self.now.position.crashing_cpu
        return write.cpu == writer and write.function in row.by.functions


class Writes:
    """The writes that watchpoints have caught and nobody has asked for yet.

    QEMU reports one of several simultaneous hits. It reports another one when that CPU stops next,
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
        """What the gates hold is known now, whatever wrote it."""
        self._contents |= {key: read.value.raw for key, read in _read_gates(state).items()}

    def take(self, state: State) -> dict[Key, list[CaughtWrite]]:
        """Those caught since the last call, in order, by Xen's numbers of the CPUs."""
        self.look(state)
        numbers = {c.physical.index: c.cpu for c in state.cpus.values() if not isinstance(c.physical, Absent)}
        caught, self._caught = self._caught, {}
        taken: dict[Key, list[CaughtWrite]] = {}
        for key, writes in caught.items():
            for index, pc in writes:
                symbol, offset = state.symbols.lookup(pc) or (None, 0)
                if index in numbers and symbol is not None and offset:
                    write = CaughtWrite(numbers[index], pc, symbol.name.partition(".")[0])
                    taken.setdefault(key, []).append(write)
        return taken


class GateHistory:
    """When each gate was read last. A gate that cannot be read at a stop keeps what is known."""

    def __init__(self) -> None:
        self._last: dict[Key, Moment] = {}

    def see(self, now: Moment, writes: Mapping[Key, Sequence[CaughtWrite]] | None = None) -> dict[Key, GateChange]:
        """Each gate that was read before, compared with what it is now, whether it changed or not; `writes` are those
        seen since the last moment."""
        known = {key: self._last[key] for key in sorted(now.gates) if key in self._last}
        self._last |= dict.fromkeys(now.gates, now)
        return {key: GateChange(*key, since, now, tuple((writes or {}).get(key, ()))) for key, since in known.items()}
