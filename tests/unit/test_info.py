"""`xencrash info`: what it reports about a machine, and about what it cannot determine."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.texts import RecordedSession, answer
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.report.console import plain
from xen_symbols.xen.given import NOTHING_GIVEN, Given
from xencrash import gdbmi as sessions
from xencrash import live as live_machine
from xencrash.cli import main
from xencrash.commands.info import blocks


class LiveSession:
    """A gdb session whose plugin answers from a recorded machine; it records the questions."""

    def __init__(self) -> None:
        self.recorded = RecordedSession("4.17-handover")
        self.asked: list[str] = []

    def xen(self, name: str) -> Any:
        self.asked.append(name)
        try:
            return json.loads(json.dumps(answer(f"xen {name.replace('-', ' ')}", session=self.recorded)))
        except (Undecidable, Unreadable) as error:
            raise sessions.MiError(str(error)) from None

    def hide(self, name: str) -> None:
        """As if the symbols had no such name."""
        del self.recorded.symbols()._by_name[name]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> LiveSession:
    session = LiveSession()

    @contextlib.contextmanager
    def opened(target: str, symbols: str | None, qmp: str | None, given: Given, **more: Any) -> Iterator[LiveSession]:
        assert (target, symbols, qmp, given) == ("gdb:/s", None, None, NOTHING_GIVEN)
        yield session

    monkeypatch.setattr(live_machine, "open_session", opened)
    return session


WORDS = ["info", "gdb:/s", "--format", "json"]


def test_a_live_machine_is_described_and_not_judged(live: LiveSession, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(WORDS) == 0
    said = capsys.readouterr()
    assert (said.err, live.asked) == ("", ["symbols", "crash-status"])
    shown = json.loads(said.out)
    known, status = (answer(name, session=live.recorded) for name in ("xen symbols", "xen crash status"))
    assert shown == {
        "schema": 1,
        "target": known["target"],
        "symbols": known["symbols"],
        "missing": [],
        "generation": known["generation"],
        "stage": "handover",
        "crashing_cpu": 0,
        "online_at_crash": status["online_at_crash"],
    }  # fmt: skip
    assert status["online_at_crash"] == [0, 1, 2, 3] and shown["generation"]["releases"] == "4.17 - 4.20"
    assert main(WORDS[:2]) == 0
    assert re.search(r"^stage +handover; crashed: CPU 0; online then: CPUs 0-3$", capsys.readouterr().out, re.M)


def test_a_generation_that_cannot_be_determined(live: LiveSession, capsys: pytest.CaptureFixture[str]) -> None:
    live.hide("do_nmi_crash")
    assert main(WORDS) == 3
    said = capsys.readouterr()
    assert said.err.startswith("xencrash: no generation of the crash path fits")
    shown = json.loads(said.out)
    placed = {"stage": "handover", "crashing_cpu": 0, "online_at_crash": [0, 1, 2, 3]}
    assert shown.keys() == {"schema", "target", "symbols", "missing", "nearest", "undecided", *placed}
    assert placed.items() <= shown.items() and shown["nearest"][0]["id"] == "4.17.0"
    assert {"names": ["do_nmi_crash", "crash_nmi_callback"], "stage": "nmi-taken"} in shown["missing"]


def test_a_stage_that_cannot_be_determined(live: LiveSession, capsys: pytest.CaptureFixture[str]) -> None:
    live.hide("kexecing")
    assert main(WORDS) == 3
    said = capsys.readouterr()
    assert said.err == "xencrash: whether Xen has begun to crash could not be read: the symbols do not name kexecing\n"
    shown = json.loads(said.out)
    assert shown.keys() == {"schema", "target", "symbols", "missing", "generation", "undecided"}
    assert shown["missing"] == [{"names": ["kexecing"], "stage": None}]


def test_a_machine_between_two_stages(live: LiveSession, capsys: pytest.CaptureFixture[str]) -> None:
    cpus = live.recorded.example.physical_cpus
    inside = live.recorded.symbols().address("machine_kexec") + 4
    cpus[0] = cpus[0]._replace(registers={**cpus[0].registers, "rip": inside})
    assert main(WORDS) == 3
    said = capsys.readouterr()
    assert said.err == (
        "xencrash: gdb:/s: Xen is somewhere on the crash path, or stuck there: how far it got cannot be determined\n"
    )
    assert json.loads(said.out)["stage"] == "crashing"


@pytest.mark.parametrize(("crashed", "says"), [(None, "nobody; online now"), (2, "CPU 2; online then")])
def test_when_the_cpus_were_online(crashed: int | None, says: str) -> None:
    data = {"target": {"location": "x", "format": "y"}, "stage": "s", "crashing_cpu": crashed, "online_at_crash": [0]}
    assert plain(blocks(data)).splitlines()[-1] == f"{'stage':13}s; crashed: {says}: CPU 0"
