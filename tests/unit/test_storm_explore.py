"""Which experiments follow from a recording of three CPUs that share a word."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from xencrash.lab.storm.begin import Scenery
from xencrash.lab.storm.experiment import Action, Event, Place
from xencrash.lab.storm.explore import (
    DEFAULT_KINDS,
    KINDS,
    at_random,
    combinations,
    delays,
    every_kind,
    injections,
    orders,
    plan,
)
from xencrash.lab.storm.record import Recording, Step, Touch, last_of_image, shared_places, shared_words, words_of
from xencrash.lab.storm.scene import Scene

BEFORE, SENT, WAITS, LATER, AFTER = 0x100, 0x110, 0x120, 0x130, 0x200
TAKEN, READS, WRITES, HALTS = 0x300, 0x310, 0x320, 0x330
SHARED, PRIVATE, READ_ONLY = 0x8000, 0x8008, 0x8010


def scene() -> Scene:
    none = {"begins": BEFORE, "send": 0x105, "handover": AFTER, "ends": {}, "own_handlers": {}, "notes": {}}
    return Scene(
        symbols=None, memory_root=0, found_by="", build_id=b"", identification=None, crashing=0, apic_ids=(0, 1, 2),
        kernel_sign=b"", sent=SENT, **none,
    )  # type: ignore[arg-type] # fmt: skip


def recording() -> Recording:
    found = Recording()
    for pc, waiting, after in (
        (BEFORE, False, False), (SENT, True, False), (WAITS, True, False), (LATER, False, False), (AFTER, False, True),
    ):  # fmt: skip
        found.steps.append(Step(Place(0, pc), waiting, after))
    found.steps += [Step(Place(cpu, pc)) for cpu in (1, 2) for pc in (TAKEN, READS, WRITES, HALTS)]
    found.steps.append(Step(Place(1, HALTS, 2)))
    found.touches += [Touch(Place(0, pc), SHARED, pc == BEFORE) for pc in (BEFORE, WAITS, LATER)]
    for cpu in (1, 2):
        found.touches += [
            Touch(Place(cpu, READS), SHARED, False),
            Touch(Place(cpu, WRITES), SHARED, True),
            Touch(Place(cpu, TAKEN), PRIVATE + 0x100 * cpu, True),
            Touch(Place(cpu, TAKEN), READ_ONLY, False),
        ]
    return found


def only(events: tuple[Event, ...]) -> tuple[str, int, int, int]:
    (one,) = events
    return one.action.value, one.place.cpu, one.place.pc, one.target


def test_a_word_is_shared_that_several_touch_and_one_writes() -> None:
    assert shared_words(recording().touches) == {SHARED}
    assert shared_places(recording()) == {
        0: [Place(0, BEFORE), Place(0, WAITS), Place(0, LATER)],
        1: [Place(1, READS), Place(1, WRITES)],
        2: [Place(2, READS), Place(2, WRITES)],
    }


@pytest.mark.parametrize(("address", "size", "words"), [(0x1000, 8, 1), (0x1004, 8, 2), (0x1000, 17, 3)])
def test_the_words_of_an_access(address: int, size: int, words: int) -> None:
    assert len(words_of(address, size)) == words
    assert words_of(address, size)[0] == 0x1000


def test_injections_come_before_each_instruction_of_both_roles() -> None:
    found = [only(one.events) for one in injections(recording(), scene())]
    own = {(action, cpu, pc, cpu) for action in ("nmi", "mc") for cpu, pcs in (
        (0, (BEFORE, SENT, WAITS, LATER, AFTER)), (1, (TAKEN, READS, WRITES, HALTS))) for pc in pcs}  # fmt: skip
    crossing = {(action, 0, pc, 1) for action in ("nmi", "mc") for pc in (BEFORE, WAITS, LATER, AFTER)}
    assert set(found) == own | crossing
    assert len(found) == len(set(found))


def test_another_cpu_is_late_or_never_comes() -> None:
    found = {only(one.events) for one in delays(recording(), scene())}
    assert found == {(action, 1, pc, 1) for action in ("yield", "stop") for pc in (TAKEN, READS, WRITES)}


def test_switches_are_forced_where_cpus_share_once_the_nmis_are_sent() -> None:
    one = {only(each.events)[1:3] for each in orders(recording(), scene(), 1)}
    assert one == {(0, WAITS), (0, LATER), (1, READS), (1, WRITES), (2, READS), (2, WRITES)}
    two = [each for each in orders(recording(), scene(), 2) if len(each.events) == 2]
    assert len(two) == 15


def test_a_pending_nmi_and_a_machine_check_meet_on_a_cpu_that_is_late() -> None:
    late = [one.events for one in combinations(recording(), scene()) if one.events[0].place.cpu == 1]
    assert [[event.action for event in events] for events in late] == [[Action.YIELD, Action.NMI, Action.MC]] * 4
    assert [events[0].place.pc for events in late] == [TAKEN, READS, WRITES, HALTS]
    assert all(len({event.place for event in events}) == 1 for events in late)


def test_random_ones_follow_from_the_seed() -> None:
    def some(seed: int) -> list[tuple[Event, ...]]:
        return [one.events for one in itertools.islice(at_random(recording(), scene(), seed), 50)]

    assert some(1) == some(1)
    assert some(1) != some(2)
    assert {len(events) for events in some(1)} == {2, 3}


def test_kinds_are_chosen_and_nothing_is_made_twice() -> None:
    every = every_kind(recording(), scene(), KINDS, 1)
    assert len({one.events for one in every}) == len(every)
    assert {one.kind for one in every} == {"injection", "delay", "order", "combination"}
    assert {one.kind for one in every_kind(recording(), scene(), ["delay"], 1)} == {"delay"}


def test_the_plan_follows_from_the_seed_and_random_ones_come_last() -> None:
    scenery = Scenery(None, scene(), recording())  # type: ignore[arg-type]

    def planned(seed: int, kinds: Sequence[str] = DEFAULT_KINDS) -> list[tuple[Event, ...]]:
        return [one.events for one in plan(scenery, kinds, 1, seed, False)[0]]

    assert planned(1) == planned(1)
    assert planned(1) != planned(2)
    assert sorted(planned(1), key=str) == sorted(planned(2), key=str)
    endless, count = plan(scenery, KINDS, 1, 1, True)
    assert count is None
    assert [one.kind for one in itertools.islice(endless, len(planned(1)) + 5)][-5:] == ["random"] * 5
    assert len(planned(1, KINDS)) == plan(scenery, KINDS, 1, 1, False)[1]


def test_the_crash_image_runs_at_the_last_new_instruction_outside_of_xen() -> None:
    found, where = recording(), scene()
    where.handover = 0xFFFF82D040200000
    image = [0x39FC9000, 0x39FC9005, 0x39FC9000]
    found.steps += [Step(Place(0, pc, 1 + (n > 1)), after=True) for n, pc in enumerate(image)]
    assert last_of_image(found, where) == 0x39FC9005
    found.steps = [step for step in found.steps if not step.after]
    assert last_of_image(found, where) is None
