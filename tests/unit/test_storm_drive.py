"""How one experiment drives its CPUs, with a stub in place of QEMU's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xencrash.lab.storm.delivery import Delivery
from xencrash.lab.storm.drive import Driver
from xencrash.lab.storm.experiment import Action, Experiment, Place, event

HANDOVER, IMAGE = 0xFFFF82D040200000, 0x39FC9005


def driver(sign: bytes | None, console: bytes = b"") -> Driver:
    live: Any = SimpleNamespace(rsp=None, console=lambda: console)
    scene: Any = SimpleNamespace(
        crashing=0, others=[1], cpus=2, sent=1, handover=HANDOVER, ends={}, parks={}, kernel_sign=sign, kernel_at=IMAGE
    )
    found = Driver(live, scene, Experiment())
    found._sent = found._let_go = found._handed_over = True
    return found


def test_a_real_crash_image_has_started_where_its_recorded_path_ends() -> None:
    storm = driver(None)
    assert IMAGE in storm._places_of(0)
    assert not storm._kernel_has_begun()
    assert storm._gives_way(0, IMAGE)
    assert storm._kernel_has_begun()


def test_before_the_handover_the_same_address_says_nothing() -> None:
    storm = driver(None)
    storm._handed_over = False
    assert IMAGE not in storm._places_of(0)
    assert not storm._gives_way(0, IMAGE)


@pytest.mark.parametrize(("console", "begun"), [(b"", False), (b"x sign x", True)])
def test_the_guest_says_on_its_console_that_it_has_started(console: bytes, begun: bool) -> None:
    storm = driver(b"sign", console)
    assert IMAGE not in storm._places_of(0)
    assert not storm._gives_way(0, IMAGE)
    assert storm._kernel_has_begun() is begun


class Stepped:
    """A stub whose CPU goes to the next of these addresses at each step; machine checks are noted with where it was."""

    def __init__(self, *places: int) -> None:
        self.places, self.masked = list(places), None

    def registers(self, cpu: int) -> dict[str, int]:
        return {"rip": self.places[0], "rsp": 0x1000}

    def masking(self, flags: int) -> None:
        self.masked = flags

    def step(self, cpu: int, timeout: float) -> None:
        if len(self.places) > 1:
            self.places.pop(0)


IDLE, NMI, MC = 0x100, 0x200, 0x300


@pytest.mark.parametrize(
    ("pending", "blocked", "places", "injected_at"),
    [(True, False, (IDLE, NMI, MC), NMI), (False, False, (IDLE, MC), IDLE), (True, True, (IDLE, MC), IDLE)],
    ids=["pending", "none", "blocked"],
)
def test_a_machine_check_comes_after_a_pending_nmi_has_been_taken(
    monkeypatch: pytest.MonkeyPatch, pending: bool, blocked: bool, places: tuple[int, ...], injected_at: int
) -> None:
    storm, stub = driver(None), Stepped(*places)
    storm.rsp = stub  # type: ignore[assignment]
    storm.live.target = storm.live.qmp = None  # type: ignore[assignment]
    physical: Any = SimpleNamespace(nmi_pending=pending, nmi_blocked=blocked)
    monkeypatch.setattr(storm, "_physical", lambda: [physical] * 2)
    monkeypatch.setattr("xencrash.lab.storm.drive.foresee", lambda *_: Delivery(MC, 0x1000))
    at = []
    monkeypatch.setattr("xencrash.lab.storm.inject.machine_check", lambda *_: at.append(stub.places[0]) or "")
    storm._inject(event(Action.MC, Place(0, HANDOVER), 1))
    assert at == [injected_at]
    (seen,) = storm.course.injected
    assert (seen.pc, seen.taken) == (injected_at, True)


@pytest.mark.parametrize(
    ("action", "cpu", "done", "held"),
    [
        (Action.YIELD, 1, set(), {1}),
        (Action.STOP, 1, set(), {1}),
        (Action.YIELD, 1, {1}, set()),  # it is parked
        (Action.YIELD, 0, set(), set()),  # the crashing CPU, which nobody waits for
    ],
)
def test_another_cpu_that_is_not_done_is_held_by_an_event(
    action: Action, cpu: int, done: set[int], held: set[int]
) -> None:
    storm = driver(None)
    storm._done = done
    assert storm._happens(event(action, Place(cpu, IDLE)), cpu)
    assert storm._held == held


@pytest.mark.parametrize(("blocked", "stands"), [(True, True), (False, False)], ids=["blocked", "taken"])
def test_a_cpu_stays_at_its_place_with_a_blocked_nmi(
    monkeypatch: pytest.MonkeyPatch, blocked: bool, stands: bool
) -> None:
    """What else is to happen to it there does happen, instead of waiting for it to come there once more."""
    storm = driver(None)
    storm.rsp = Stepped(IDLE, NMI)  # type: ignore[assignment]
    storm.live.target = storm.live.qmp = None  # type: ignore[assignment]
    storm.scene.apic_ids = (0, 1)
    physical: Any = SimpleNamespace(nmi_pending=False, nmi_blocked=blocked)
    monkeypatch.setattr(storm, "_physical", lambda: [physical] * 2)
    monkeypatch.setattr("xencrash.lab.storm.drive.foresee", lambda *_: Delivery(NMI, 0x1000))
    monkeypatch.setattr("xencrash.lab.storm.inject.nmi", lambda *_: None)
    storm._stands[1] = True
    assert not storm._happens(event(Action.NMI, Place(1, IDLE)), 1)
    assert storm._stands[1] is stands


class Starved(Stepped):
    """Its CPU has no time while it runs, and goes on when it is stepped."""

    def __init__(self, *places: int) -> None:
        super().__init__(*places)
        self.steps = 0

    def run(self, cpus: list[int], timeout: float) -> None:
        pass

    def is_halted(self, cpu: int) -> bool:
        return False

    def step(self, cpu: int, timeout: float) -> bool:
        self.steps += 1
        self.places.append(self.places.pop(0))
        return True


def test_a_cpu_that_the_host_gives_no_time_does_not_go_in_circles() -> None:
    storm = driver(None)
    storm.rsp = Starved(*range(0x400, 0x41F), IDLE)  # type: ignore[assignment]
    storm._breakpoints = {IDLE}
    assert storm._runs(1)
    assert storm.rsp.registers(1)["rip"] == IDLE
    assert 1 not in storm.queue


def test_another_cpu_that_goes_in_circles_lets_others_run_and_comes_back_twice() -> None:
    storm = driver(None)
    storm.rsp = Starved(0x400, 0x402)  # type: ignore[assignment]
    came_back = []
    for _ in range(3):
        storm.queue.clear()
        assert not storm._runs(1)
        came_back.append(1 in storm.queue)
    assert came_back == [True, True, False]
