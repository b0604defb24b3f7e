"""What one experiment does to a crash: events at places of the crash path, written as a line that repeats it.

    nmi@0:kexec_crash+0x12          an NMI on CPU 0, before it executes that instruction
    mc>2@0:kexec_reloc+0x5          a machine check on CPU 2, when CPU 0 is there
    yield@1:do_nmi_crash+0x6a~2     CPU 1, when there for the second time, stops until all others are done
    stop@1:do_nmi_crash             CPU 1 stops there for good

Events are joined by commas. Those of one CPU at one place happen in the order in which they are written.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import TEXT, SymbolTable
from xencrash.lab.errors import LabError


class Action(enum.Enum):
    NMI = "nmi"
    MC = "mc"
    YIELD = "yield"
    STOP = "stop"

    @property
    def injects(self) -> bool:
        return self in (Action.NMI, Action.MC)


class Place(NamedTuple):
    """A moment: this CPU is about to execute the instruction at `pc` for the `hit`-th time."""

    cpu: int
    pc: int
    hit: int = 1


class Event(NamedTuple):
    action: Action
    place: Place
    target: int  # the CPU that it happens to


class Experiment(NamedTuple):
    """Events, in the order in which they are written; without any it is the undisturbed crash."""

    events: tuple[Event, ...] = ()
    kind: str = ""  # its kind: injection, delay, order, combination, random; does not affect what it does


def event(action: Action, place: Place, target: int | None = None) -> Event:
    return Event(action, place, place.cpu if target is None else target)


_EVENT = re.compile(r"(?P<action>\w+)(?:>(?P<target>\d+))?@(?P<cpu>\d+):(?P<at>[^~,]+)(?:~(?P<hit>\d+))?")
_ADDRESS = re.compile(r"(?P<name>.+?)(?:\+(?P<offset>0x[0-9a-f]+))?")


def describe_place(pc: int, symbols: SymbolTable) -> str:
    """The text from which `parse_place` finds the address: a name, with the symbol's file if needed, or a number."""
    found = symbols.lookup(pc)
    if found is not None:
        symbol, offset = found
        for name in (symbol.name, symbol.qualified):
            if symbols.has(name) and _address(name, symbols) == symbol.address:
                return f"{name}+{offset:#x}"
    return hex(pc)


def parse_place(text: str, symbols: SymbolTable) -> int:
    """Raises LabError for a name that this build does not have."""
    with_offset = _ADDRESS.fullmatch(text)
    assert with_offset is not None
    name, offset = with_offset["name"], int(with_offset["offset"] or "0", 16)
    if name.startswith("0x"):
        return int(name, 16) + offset
    address = _address(name, symbols)
    if address is None:
        raise LabError(f"storm: {name} is not a function of this build")
    return address + offset


def _address(name: str, symbols: SymbolTable) -> int | None:
    try:
        return symbols.get(name, TEXT)
    except Unreadable:
        return None


def describe(experiment: Experiment, symbols: SymbolTable) -> str:
    return ",".join(_describe_event(one, symbols) for one in experiment.events) or "none"


def _describe_event(one: Event, symbols: SymbolTable) -> str:
    cpu, pc, hit = one.place
    target = "" if one.target == cpu else f">{one.target}"
    again = "" if hit == 1 else f"~{hit}"
    return f"{one.action.value}{target}@{cpu}:{describe_place(pc, symbols)}{again}"


def parse(text: str, symbols: SymbolTable, cpus: int) -> Experiment:
    """The experiment that `describe` wrote. Raises LabError."""
    if text == "none":
        return Experiment()
    events = []
    for word in text.split(","):
        found = _EVENT.fullmatch(word.strip())
        if found is None or found["action"] not in {action.value for action in Action}:
            raise LabError(f"storm: {word!r} is not an event: write ACTION[>CPU]@CPU:FUNCTION+0xOFFSET[~HIT]")
        cpu, hit = int(found["cpu"]), int(found["hit"] or 1)
        target = int(found["target"] or cpu)
        if max(cpu, target) >= cpus:
            raise LabError(f"storm: {word!r}: the machine's CPUs are 0 to {cpus - 1}")
        if hit < 1:
            raise LabError(f"storm: {word!r}: the first time is ~1")
        events.append(Event(Action(found["action"]), Place(cpu, parse_place(found["at"], symbols), hit), target))
    return Experiment(tuple(events))


def fewer(experiment: Experiment) -> Iterator[Experiment]:
    """The same with some events left out, fewest events first."""
    for size in range(1, len(experiment.events)):
        for some in itertools.combinations(experiment.events, size):
            yield experiment._replace(events=some)


def shrink(experiment: Experiment, fails: Callable[[Experiment], bool]) -> Experiment:
    """The fewest of its events that fail as all of them do. There are only a few: each subset is tried."""
    return next((smaller for smaller in fewer(experiment) if fails(smaller)), experiment)


def distinct(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Each once, in order."""
    found: dict[tuple[Event, ...], Experiment] = {}
    for experiment in experiments:
        found.setdefault(experiment.events, experiment)
    return list(found.values())
