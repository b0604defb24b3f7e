"""A storm's experiments as lines of text, and how a failing one is reduced to what it needs."""

from __future__ import annotations

import pytest

from tests.machines.changed import Machine
from xencrash.lab.errors import LabError
from xencrash.lab.storm.experiment import (
    Action,
    Event,
    Experiment,
    Place,
    describe,
    describe_place,
    distinct,
    event,
    fewer,
    parse,
    shrink,
)

SYMBOLS = Machine("4.17-handover").symbols
CRASH = SYMBOLS.address("kexec_crash", "tT")
NMI_CRASH = SYMBOLS.address("do_nmi_crash", "tT")


def line(text: str) -> Experiment:
    return parse(text, SYMBOLS, 4)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("none", ()),
        ("nmi@0:kexec_crash+0x12", (Event(Action.NMI, Place(0, CRASH + 0x12), 0),)),
        ("mc>2@0:kexec_crash+0x0", (Event(Action.MC, Place(0, CRASH), 2),)),
        (
            "yield@1:do_nmi_crash+0x6a~2,stop@3:0x2000010",
            (Event(Action.YIELD, Place(1, NMI_CRASH + 0x6A, 2), 1), Event(Action.STOP, Place(3, 0x2000010), 3)),
        ),
    ],
)
def test_a_line_is_the_experiment(text: str, events: tuple[Event, ...]) -> None:
    assert line(text).events == events
    assert describe(Experiment(events), SYMBOLS) == text


def test_the_offset_may_be_left_out() -> None:
    assert line("nmi@0:kexec_crash").events[0].place.pc == CRASH


def test_a_name_that_several_functions_have_is_written_with_its_file() -> None:
    """nmi_callback is a function in the profiler, and a variable elsewhere."""
    symbols = [s for s in SYMBOLS.candidates("nmi_callback") if s.kind in "tT"]
    for symbol in symbols:
        written = describe_place(symbol.address + 3, SYMBOLS)
        assert written.endswith("nmi_callback+0x3")
        assert parse(f"nmi@0:{written}", SYMBOLS, 1).events[0].place.pc == symbol.address + 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nmi@4:kexec_crash", "0 to 3"),
        ("nmi>4@0:kexec_crash", "0 to 3"),
        ("nmi@0:kexec_crash~0", "the first time"),
        ("fire@0:kexec_crash", "not an event"),
        ("nmi@kexec_crash", "not an event"),
        ("", "not an event"),
        ("nmi@0:no_such_function+0x1", "no_such_function is not a function"),
    ],
)
def test_what_is_wrong_with_a_line_is_reported(text: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        line(text)


def places(count: int) -> list[Event]:
    return [event(Action.NMI, Place(0, number)) for number in range(count)]


def test_fewer_events_first() -> None:
    sizes = [len(one.events) for one in fewer(Experiment(tuple(places(3))))]
    assert sizes == [1, 1, 1, 2, 2, 2]


def test_a_failure_is_shrunk_to_what_it_needs() -> None:
    events = places(3)
    shrunk = shrink(Experiment(tuple(events)), lambda one: {events[0], events[2]} <= set(one.events))
    assert shrunk.events == (events[0], events[2])


def test_a_failure_that_needs_every_event_is_kept_whole() -> None:
    whole = Experiment(tuple(places(3)))
    assert shrink(whole, lambda one: False) == whole


def test_each_experiment_once_in_the_order_in_which_it_came() -> None:
    one, two = (Experiment((each,), "order") for each in places(2))
    assert distinct([one, two, one._replace(kind="delay")]) == [one, two]
