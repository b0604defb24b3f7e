"""How far another CPU can have come at a stop, by the breakpoints it has not hit and by its own registers."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.machines.changed import Machine
from xen_symbols.absence import Absent, Unreadable
from xen_symbols.crashpath import generations
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.engine import judge
from xen_symbols.crashpath.generations import Bookkeeping
from xen_symbols.crashpath.identification import identify
from xen_symbols.crashpath.position import at_stage
from xen_symbols.crashpath.stages import BY_ID, OtherStep, Span
from xen_symbols.crashpath.whereabouts import Whereabouts, whereabouts
from xen_symbols.report.model import Finding
from xen_symbols.xen.reads import Read
from xen_symbols.xen.state import State, read_state

AT = 0xFFFF82D040210000
SAVE, STOP, ELSEWHERE = AT + 0x5000, AT + 0x6000, AT + 0x7000
ALL = tuple(BY_ID[name] for name in ("nmi-taken", "cpu-save", "cpu-stop"))
STEPS = OtherStep


def code(*parts: bytes | int) -> bytes:
    """Instructions at AT; an int is a call of it."""
    made = b""
    for part in parts:
        if isinstance(part, int):
            part = b"\xe8" + (part - (AT + len(made) + 5)).to_bytes(4, "little", signed=True)
        made += part
    return made


class Text:
    """A Xen whose handler is this code."""

    source = "test"

    def __init__(self, code: bytes, names: dict[str, int], handler: str = "do_nmi_crash") -> None:
        self.symbols, self.code = self, code
        self.names = {handler: AT} | names

    def get(self, name: str, kinds: str) -> int | None:
        return self.names.get(name)

    def address(self, name: str, kinds: str = "") -> int:
        return self.names[name]

    def extent(self, name: str) -> tuple[int, int]:
        if name not in self.names:
            raise Unreadable(f"no {name}")
        return AT, AT + len(self.code)

    def read(self, address: int, size: int) -> bytes:
        return self.code[address - AT : address - AT + size]


NAMES = {"kexec_crash_save_cpu": SAVE, "__stop_this_cpu": STOP}
WHOLE = code(b"\x55", SAVE, STOP)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        (Text(WHOLE + b"\xc3", NAMES), ALL),
        (Text(code(SAVE), NAMES), ALL[:2]),  # the stop was put into the handler
        (Text(code(ELSEWHERE, STOP), NAMES), (ALL[0], ALL[2])),
        (Text(WHOLE, {"kexec_crash_save_cpu": SAVE}), ALL[:2]),  # a Xen without the other's symbol
        (Text(WHOLE + b"\xe8", NAMES), ALL),  # the end of the function in the middle of a call
        (Text(WHOLE, NAMES, handler="another"), ()),
    ],
)
def test_what_bounds_the_cpus_of_a_build(text: Any, stages: tuple[Any, ...]) -> None:
    assert whereabouts(text, generations.BY_ID["4.21.2"]) == Whereabouts(stages)


def test_code_that_cannot_be_read_bounds_nothing() -> None:
    machine = Machine("4.17-shootdown")  # of which the handler's code was not recorded
    assert whereabouts(machine.memory, identify(machine.memory).generation) == Whereabouts(())


@functools.cache
def recorded() -> tuple[Machine, State]:
    machine = Machine("4.17-handover")
    return machine, read_state(machine.memory)


def standing(rip: int | str | None) -> State:
    """The recorded machine, with CPU 2 at a place: an address, a name, or unknown."""
    machine, state = recorded()
    physical = state.of(2).physical
    assert not isinstance(physical, Absent)
    place = machine.symbols.address(rip) + 4 if isinstance(rip, str) else rip
    moved: Any = Absent("not read") if place is None else physical._replace(registers={"rip": place})
    return state._replace(cpus={**state.cpus, 2: state.of(2)._replace(physical=moved)})


@pytest.mark.parametrize(
    ("low", "missed", "rip", "high"),
    [
        # It was seen at none of them, and none was missed: it may have taken the NMI and be before the breakpoint.
        (STEPS.NOTHING, (), None, STEPS.NMI_TAKEN),
        (STEPS.NMI_TAKEN, (), None, STEPS.MC_IST_CLEARED),
        (STEPS.MC_IST_CLEARED, (), None, STEPS.NOTES_SAVED),
        (STEPS.NOTES_SAVED, (), None, STEPS.PARKED),  # nothing is ahead
        # A breakpoint that was not set all along says nothing; the next one does.
        (STEPS.NOTHING, ("nmi-taken",), None, STEPS.MC_IST_CLEARED),
        (STEPS.NMI_TAKEN, ("cpu-save",), None, STEPS.NOTES_SAVED),
        (STEPS.NMI_TAKEN, ("cpu-save", "cpu-stop"), None, STEPS.PARKED),
        # Its registers
        (STEPS.NOTES_SAVED, (), "__stop_this_cpu", STEPS.STOPPED),
        (STEPS.NOTES_SAVED, (), "kexec_crash", STEPS.PARKED),
        (STEPS.NOTES_SAVED, (), "do_nmi_crash", STEPS.PARKED),
        (STEPS.NMI_TAKEN, (), "__stop_this_cpu", STEPS.MC_IST_CLEARED),  # the narrower of both
    ],
)
def test_how_far_it_can_have_come(low: int, missed: tuple[str, ...], rip: str | None, high: int) -> None:
    spans = Whereabouts(ALL).bounded(standing(rip), {2: Span(low, STEPS.PARKED)}, missed)
    assert spans == {2: Span(low, high)}


def counted(count: int, others: dict[int, Span]) -> Finding:
    """The finding on waiting_for_crash_ipi where CPU 1 comes to cpu-save, as if this Xen had it."""
    machine, state = recorded()
    state = state._replace(system={**state.system, "waiting_count": Read(count)})
    generation = identify(machine.memory).generation._replace(bookkeeping=Bookkeeping.COUNT, announces=False)
    position = at_stage(BY_ID["cpu-save"], 1, 0, frozenset(range(4)), others)
    context = Context(machine.memory, state, position, generation)
    return next(f for f in judge(context) if f.check == "waiting-cpus" and f.cpu is None)


@pytest.mark.parametrize(
    ("second", "third", "right"),
    [
        (STEPS.NMI_TAKEN, STEPS.NMI_TAKEN, {3}),
        (STEPS.NMI_TAKEN, STEPS.STOPPED, {3}),
        (STEPS.STOPPED, STEPS.PARKED, {2, 3}),
        (STEPS.PARKED, STEPS.PARKED, {1, 2, 3}),
    ],
)
def test_the_count_allows_what_the_cpus_can_have_done_and_no_more(second: int, third: int, right: set[int]) -> None:
    spans = {2: Span(STEPS.NOTHING, second), 3: Span(STEPS.NOTHING, third)}
    verdicts = {count: str(counted(count, spans).verdict) for count in range(5)}
    assert {count for count, verdict in verdicts.items() if verdict == "pass"} == right
    assert set(verdicts.values()) == {"pass", "fail"}
