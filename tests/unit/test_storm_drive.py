"""When the crash kernel counts as started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xencrash.lab.storm.drive import Driver
from xencrash.lab.storm.experiment import Experiment

HANDOVER, IMAGE = 0xFFFF82D040200000, 0x39FC9005


def driver(sign: bytes | None, console: bytes = b"") -> Driver:
    live: Any = SimpleNamespace(rsp=None, console=lambda: console)
    scene: Any = SimpleNamespace(
        crashing=0, cpus=2, sent=1, handover=HANDOVER, ends={}, parks={}, kernel_sign=sign, kernel_at=IMAGE
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
