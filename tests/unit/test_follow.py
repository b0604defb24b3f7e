"""The trace's waiting policy, without a machine: how long to wait, and what it means if nothing happens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from tests.machines.recorded import load
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.follow import LOOK_SECONDS, Follower
from xen_symbols.crashpath.identification import identify
from xen_symbols.report.model import Verdict
from xen_symbols.xen.locate import locate

NOWHERE = 0xFFFF82D0_40000000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def follower(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, renamed: Mapping[str, str] = MappingProxyType({}), **more: Any
) -> Follower:
    """A recorded machine that stands for a running one; that it has crashed does not matter here."""
    example, symbols = load("4.17-handover", renamed)
    memory = locate(example, symbols)
    monkeypatch.setattr(Follower, "_start", lambda self, gates: None)
    follow = Follower(memory, identify(memory), clock=clock, **more)
    follow.begun, follow.crash_kernel_loaded = False, True
    return follow


def test_a_crash_is_waited_for_as_long_as_was_asked(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(clock, monkeypatch, timeout=20)
    assert follow.wait() == 20
    clock.now = 15
    assert follow.stop(0, NOWHERE).stage is None  # some other breakpoint: this is not progress
    assert follow.wait() == 5
    assert not follow.stop(0, NOWHERE, expired=True).finished  # it was not over yet
    clock.now = 20.5
    assert follow.wait() == 0
    with pytest.raises(Undecidable, match="^Xen did not crash within 20 s$"):
        follow.stop(0, NOWHERE, expired=True)
    follow.crash_kernel_loaded = False
    with pytest.raises(Undecidable, match="within 20 s; no crash kernel was loaded: load one with kexec -p in dom0$"):
        follow.stop(0, NOWHERE, expired=True)


def test_a_crash_is_waited_for_for_ever(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(clock, monkeypatch)
    assert follow.wait() is None
    clock.now = 1e6
    assert follow.wait() is None


def test_a_stage_is_waited_for_and_the_machine_looked_at(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(clock, monkeypatch, stall=7)
    follow.begun = True
    for now, wait in ((0, LOOK_SECONDS), (2, LOOK_SECONDS), (4, LOOK_SECONDS), (6, 1)):
        clock.now = now
        assert follow.wait() == wait
        assert follow.stop(0, NOWHERE, expired=True) == (None, (), False)
    clock.now = 7
    result = follow.stop(0, NOWHERE, expired=True)
    assert result.finished and result.stage is None
    (finding,) = result.findings
    assert (finding.check, finding.verdict) == ("trace-complete", Verdict.FAIL)
    assert finding.reason and finding.reason.startswith("no further stage was reached in 7 s: no crash kernel starts")


def test_an_unknown_path_that_is_seen_no_more_may_have_gone_elsewhere(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = follower(clock, monkeypatch, {"do_nmi_crash": "my_nmi_crash"}, stall=7)
    follow.begun = True
    assert follow.generation is None and follow.report.undecided is None
    clock.now = 7
    result = follow.stop(0, NOWHERE, expired=True)
    assert result.finished and [finding.verdict for finding in result.findings] == [Verdict.UNKNOWN]
    assert str(follow.end().undecided).startswith("no generation of the crash path fits 4.17-handover.txt")


def test_a_machine_whose_cpus_have_paging_off_was_reset(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(clock, monkeypatch, timeout=20)
    cpus = follow.memory.target.physical_cpus  # type: ignore[attr-defined]
    for index, cpu in enumerate(cpus):
        cpus[index] = cpu._replace(registers={**cpu.registers, "cr0": 0x60000010})
    with pytest.raises(Undecidable, match="^the machine was reset before a crash began$"):
        follow.stop(0, 0xFFF0, expired=True)
    follow.begun = True
    with pytest.raises(Undecidable, match="^the guest was reset while its crash was followed: the dump is lost"):
        follow.stop(0, 0xFFF0, expired=True)


def test_a_stop_by_something_else(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(clock, monkeypatch, timeout=20)
    with pytest.raises(Undecidable, match=r"^the machine was stopped by something else \(SIGINT\) while it was"):
        follow.stop(0, NOWHERE, signal="SIGINT")


def test_the_entry_of_a_crash_is_a_stage_once_for_each_time_that_a_cpu_enters(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy host's machine can be stopped by the look at it, before the CPU has left."""
    follow = follower(clock, monkeypatch, timeout=20)
    entry = follow.memory.symbols.address("kexec_crash")
    cpus = follow.memory.target.physical_cpus  # type: ignore[attr-defined]

    def stage_at(**registers: int) -> str | None:
        cpus[1] = cpus[1]._replace(registers={**cpus[1].registers, "rip": entry, **registers})
        seen = follow.stop(1, entry, expired=bool(follow.begun)).stage
        return None if seen is None else seen.stage

    seen = [stage_at(), stage_at(), stage_at(rsp=0x1000), stage_at(rsp=0x1000)]
    assert seen == ["crash-entry", None, "crash-entry", None]
