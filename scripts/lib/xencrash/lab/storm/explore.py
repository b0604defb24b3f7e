"""Which experiments there are, from the recording of the undisturbed crash."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from xencrash.lab.storm.begin import Scenery
from xencrash.lab.storm.experiment import Action, Event, Experiment, Place, distinct, event
from xencrash.lab.storm.record import Recording, Step, shared_places
from xencrash.lab.storm.scene import Scene

KINDS = ("injection", "delay", "order", "combination", "random")
DEFAULT_KINDS = KINDS[:-1]
_RANDOM = 200  # experiments, if nothing else limits them
_INJECTIONS = (Action.NMI, Action.MC)
_MOST_EVENTS = 3  # of a random experiment


def plan(
    scenery: Scenery, kinds: Sequence[str], switches: int, seed: int, bounded: bool
) -> tuple[Iterable[Experiment], int | None]:
    """The experiments in an order determined by the seed, and their number; random ones come last, without end (None)
    if something else limits the run."""
    known = every_kind(scenery.recording, scenery.scene, kinds, switches)
    random.Random(seed).shuffle(known)
    if "random" not in kinds:
        return known, len(known)
    more = at_random(scenery.recording, scenery.scene, seed)
    if bounded:
        return itertools.chain(known, more), None
    return [*known, *itertools.islice(more, _RANDOM)], len(known) + _RANDOM


def every_kind(recording: Recording, scene: Scene, kinds: Sequence[str], switches: int) -> list[Experiment]:
    """All but the random ones, each once. `switches`: the most forced switches between CPUs in one."""
    made: dict[str, Iterable[Experiment]] = {
        "injection": injections(recording, scene),
        "delay": delays(recording, scene),
        "order": orders(recording, scene, switches),
        "combination": combinations(recording, scene),
    }
    return distinct([one for kind, found in made.items() if kind in kinds for one in found])


def injections(recording: Recording, scene: Scene) -> Iterator[Experiment]:
    """Before each instruction of the crashing CPU and of one other; on others, where the crashing CPU accesses shared
    memory, and from the handover on."""
    other = _an_other(recording, scene)
    for action in _INJECTIONS:
        for cpu in filter(lambda cpu: cpu is not None, (scene.crashing, other)):
            assert cpu is not None
            for step in recording.first_hits(cpu):
                yield Experiment((event(action, step.place),), "injection")
        if other is not None:
            for place in _cross_places(recording, scene):
                yield Experiment((event(action, place, other),), "injection")


def _cross_places(recording: Recording, scene: Scene) -> list[Place]:
    shared = shared_places(recording).get(scene.crashing, [])
    after = [step.place for step in recording.first_hits(scene.crashing) if step.after]
    return list(dict.fromkeys((*shared, *after)))


def _an_other(recording: Recording, scene: Scene) -> int | None:
    """The first of the others that did something."""
    return next((cpu for cpu in scene.others if recording.of(cpu)), None)


def _places_to_hold(recording: Recording, scene: Scene) -> dict[int, list[Place]]:
    """Where it matters which CPU comes first: before each access to a shared word; for the crashing CPU only after it
    has sent the NMIs, because before that no other CPU is on the path."""
    found = shared_places(recording)
    sent = _index_of_sent(recording.of(scene.crashing), scene)
    since = {step.place for step in recording.of(scene.crashing)[sent:] if not step.after}
    found[scene.crashing] = [place for place in found.get(scene.crashing, []) if place in since]
    return found


def _index_of_sent(steps: Sequence[Step], scene: Scene) -> int:
    return next((number for number, step in enumerate(steps) if step.place.pc == scene.sent), 0)


def delays(recording: Recording, scene: Scene) -> Iterator[Experiment]:
    """Another CPU held until the handover, and for good, before its first instruction and before each access to a
    shared word."""
    other = _an_other(recording, scene)
    if other is None:
        return
    places = [recording.of(other)[0].place, *_places_to_hold(recording, scene).get(other, [])]
    for action in (Action.YIELD, Action.STOP):
        for place in places:
            yield Experiment((event(action, place),), "delay")


def orders(recording: Recording, scene: Scene, switches: int) -> Iterator[Experiment]:
    """Each set of at most this many forced switches, before accesses to shared words. A CPU's places are in the order
    in which it reaches them."""
    places = [place for found in _places_to_hold(recording, scene).values() for place in found]
    for count in range(1, switches + 1):
        for chosen in itertools.combinations(places, count):
            yield Experiment(tuple(event(Action.YIELD, place) for place in chosen), "order")


def combinations(recording: Recording, scene: Scene) -> Iterator[Experiment]:
    """An NMI that is pending while a machine check arrives, whose handler's IRET unblocks it: on a late CPU, when
    machine checks already lead to trap_nop; and on the crashing CPU, in either order."""
    other = _an_other(recording, scene)
    if other is not None:
        for step in recording.first_hits(other):
            held = event(Action.YIELD, step.place)
            both = tuple(event(action, step.place) for action in _INJECTIONS)
            yield Experiment((held, *both), "combination")
    for step in recording.first_hits(scene.crashing):
        if step.waiting or step.after:
            yield Experiment(tuple(event(action, step.place) for action in reversed(_INJECTIONS)), "combination")


def at_random(recording: Recording, scene: Scene, seed: int) -> Iterator[Experiment]:
    """Without end: up to three events of any kind, anywhere, determined by the seed."""
    chance = random.Random(seed)
    held = [place for found in _places_to_hold(recording, scene).values() for place in found]
    steps = [step.place for step in recording.steps if step.place.hit <= 2]
    while True:
        count = chance.randint(2, _MOST_EVENTS)
        yield Experiment(tuple(_any_event(chance, held, steps, scene) for _ in range(count)), "random")


def _any_event(chance: random.Random, held: Sequence[Place], steps: Sequence[Place], scene: Scene) -> Event:
    if held and chance.random() < 0.6:
        return event(Action.YIELD, chance.choice(held))
    place = chance.choice(steps)
    target = place.cpu if chance.random() < 0.7 else chance.randrange(scene.cpus)
    return event(Action.NMI if chance.random() < 0.7 else Action.MC, place, target)
