"""The end of a trace, without a machine: that NMIs were seen to be unblocked, and the looks after the handover."""

from __future__ import annotations

from typing import Any

import pytest

from tests.machines.changed import Machine
from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath import generations
from xen_symbols.crashpath.afterwards import INTERVALS
from xen_symbols.crashpath.breakpoints import SLOTS
from xen_symbols.crashpath.follow import Follower, StopResult
from xen_symbols.crashpath.identification import identify
from xen_symbols.crashpath.stages import CrashStep
from xen_symbols.crashpath.unblocking import Unblocking, unblocking
from xen_symbols.report.model import Verdict
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86.iret import holds_iretq, returns_to_next

KERNEL = 0x2A0001000  # where a crash kernel runs
AFTER_IRET = 0xFFFF82D040001234


class Trace:
    """A recorded machine at its handover, taken for one that is followed and has just come to machine_kexec()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Unblocking | None = None, **more: Any) -> None:
        self.machine = Machine("4.17-handover")
        memory = self.machine.memory
        monkeypatch.setattr(Follower, "_start", lambda self, gates: None)
        found = where or Unblocking(AFTER_IRET)
        monkeypatch.setattr("xen_symbols.crashpath.follow.unblocking", lambda memory, generation: found)
        self.now = 0.0
        self.follower = follower = Follower(memory, identify(memory), clock=lambda: self.now, **more)
        follower.begun = follower._entered = True
        follower._crashing, follower._online, follower._step = 0, frozenset(range(4)), CrashStep.INFO_SAVED
        follower._entries = dict.fromkeys((1, 2, 3), 1)
        self.awake = memory.symbols.address("do_nmi_crash") + 1
        self.at_rest: PhysicalCpu = self.machine.example.physical_cpus[2]

    def unblock(self) -> StopResult:
        return self.come_to(AFTER_IRET)

    def hand_over(self) -> StopResult:
        return self.come_to(self.machine.symbols.address("kexec_reloc"))

    def come_to(self, address: int) -> StopResult:
        self.registers(0, rip=address)
        return self.follower.stop(0, address)

    def leave(self) -> None:
        self.registers(0, rip=KERNEL)

    def registers(self, cpu: int, **registers: int) -> None:
        self.machine.physical(cpu, lambda p: p._replace(registers={**p.registers, **registers}))

    def wake(self) -> None:
        """CPU 2 is where the halt loop is, and not halted."""
        self.machine.physical(2, lambda p: p._replace(halted=False, registers={**p.registers, "rip": self.awake}))

    def rest(self) -> None:
        self.machine.example.physical_cpus[2] = self.at_rest

    def look(self) -> StopResult:
        wait = self.follower.wait()
        assert wait is not None and wait > 0
        self.now += wait
        return self.follower.stop(0, KERNEL, expired=True)


def of(result: StopResult, check: str, cpu: int | None) -> tuple[str, str | None]:
    (found,) = [f for f in result.findings if (f.check, f.cpu) == (check, cpu)]
    return str(found.verdict), found.reason


def wrong(result: StopResult) -> set[tuple[str, int | None, str]]:
    bad = (Verdict.FAIL, Verdict.UNKNOWN)
    return {(f.check, f.cpu, str(f.verdict)) for f in result.findings if f.verdict in bad}


# -- after the handover -----------------------------------------------------------------------


def test_it_looks_once_more_when_all_have_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    handover = trace.hand_over()
    assert not handover.finished and wrong(handover) == set()
    assert of(handover, "trace-complete", 0)[0] == "pass"
    assert trace.follower.wait() == INTERVALS[0]
    assert len(trace.follower.breakpoints) <= SLOTS  # another CPU may yet answer
    trace.leave()
    after = trace.look()
    assert after.finished and after.stage is not None and after.stage.stage == "after-handover"
    assert wrong(after) == set()
    for cpu in (1, 2, 3):
        for check in ("cpu-parked", "lapic-self-nmi", "nmi-pending", "nmi-latch", "lapic-enabled"):
            assert of(after, check, cpu)[0] == "pass", (check, cpu)
    for check in ("nmi-latch", "lapic-mode", "idtr"):  # of what the crash kernel runs on nothing is asked
        assert of(after, check, 0) == ("skip", "the crash kernel runs on it")


def test_a_cpu_that_never_halts_is_looked_at_again_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    trace.wake()
    handover = trace.hand_over()
    verdict, reason = of(handover, "cpu-parked", 2)
    assert verdict == "skip" and "it is looked at again later" in str(reason)
    trace.leave()
    begun = trace.now
    for _ in INTERVALS[:-1]:
        assert trace.look() == StopResult(None)
    after = trace.look()
    assert trace.now - begun == pytest.approx(sum(INTERVALS))
    assert after.finished and wrong(after) == {("cpu-parked", 2, "fail")}
    assert str(of(after, "cpu-parked", 2)[1]).startswith("it was looked at 5 times after the handover: it still runs")
    assert of(after, "lapic-self-nmi", 2)[0] == "pass"
    assert trace.follower.wait() is not None  # it is asked for once more


def test_the_looks_are_further_apart_where_a_stage_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    for stall, slower in ((240.0, 8.0), (30.0, 1.0), (3.0, 1.0)):
        trace = Trace(monkeypatch, stall=stall)
        trace.unblock()
        trace.hand_over()
        begun = trace.now
        for _ in INTERVALS:
            after = trace.look()
        assert after.finished and trace.now - begun == pytest.approx(sum(INTERVALS) * slower)


def test_a_cpu_that_comes_to_rest_meanwhile_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    trace.wake()
    trace.hand_over()
    trace.leave()
    assert trace.look() == StopResult(None)
    trace.rest()
    after = trace.look()
    assert after.finished and wrong(after) == set() and of(after, "cpu-parked", 2)[0] == "pass"


def test_a_failure_that_was_seen_before_needs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    trace.registers(2, rflags=0x202)  # halted with interrupts on
    assert wrong(trace.hand_over()) == {("cpu-parked", 2, "fail")}
    trace.leave()
    after = trace.look()
    assert after.finished and wrong(after) == {("cpu-parked", 2, "fail")}


def test_what_wakes_after_the_handover_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    assert wrong(trace.hand_over()) == set()
    trace.leave()
    trace.wake()
    while not (after := trace.look()).finished:
        pass
    assert wrong(after) == {("cpu-parked", 2, "fail")}


def test_a_cpu_that_answers_late_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops at a stage is on its way, also where it comes to the same one a second time."""
    trace = Trace(monkeypatch)
    trace.unblock()
    trace.wake()
    trace.hand_over()
    trace.leave()
    for _ in range(2):
        for name, stage in (("do_nmi_crash", "nmi-taken"), ("__stop_this_cpu", "cpu-stop")):
            at = trace.machine.symbols.address(name)
            trace.registers(2, rip=at)
            due = trace.follower.wait()
            late = trace.follower.stop(2, at)
            assert late.stage is not None and late.stage.stage == stage and not late.finished
            assert {check for check, cpu, _ in wrong(late) if cpu == 2} & {"cpu-parked", "nmi-pending"} == set()
            assert of(late, "idtr", 0) == ("skip", "the crash kernel runs on it")
            assert trace.follower.wait() == due  # it does not put off the look
    trace.rest()
    after = trace.look()
    assert after.finished and of(after, "cpu-parked", 2)[0] == "pass"


def test_a_stop_that_is_reported_again_does_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look comes while gdb lets a CPU step off its breakpoint."""
    trace = Trace(monkeypatch)
    trace.hand_over()
    trace.leave()
    trace.follower._entries.pop(2)
    at = trace.machine.symbols.address("do_nmi_crash")
    trace.registers(2, rip=at)
    assert trace.follower.stop(2, at).stage is not None
    assert trace.follower.stop(2, at) == StopResult(None)
    assert trace.follower._entries[2] == 1


@pytest.mark.parametrize(("awake", "verdict"), [(False, "skip"), (True, "unknown")])
def test_a_cpu_that_the_crash_kernel_resets(awake: bool, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    if awake:
        trace.wake()
    trace.hand_over()
    trace.leave()
    trace.registers(2, cr0=0x60000010, rip=0xFFF0)
    after = trace.look()
    assert after.finished
    assert of(after, "cpu-parked", 2) == (verdict, "the crash kernel has reset it")
    assert {cpu for _, cpu, _ in wrong(after)} == ({2} if awake else set())


def test_a_machine_that_was_reset_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.hand_over()
    for cpu in range(4):
        trace.registers(cpu, cr0=0x60000010, rip=0xFFF0)
    with pytest.raises(Undecidable, match="^the guest was reset while its crash was followed"):
        trace.look()


def test_a_crashing_cpu_that_does_not_come_out_of_xen(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.unblock()
    trace.hand_over()
    for _ in INTERVALS[:-1]:
        assert trace.look() == StopResult(None)
    after = trace.look()
    assert after.finished and after.stage is None and wrong(after) == {("trace-complete", 0, "unknown")}
    (finding,) = after.findings
    assert finding.stage == "after-handover" and "has not come out of Xen" in str(finding.reason)
    assert "CPU 0 is in kexec_reloc" in str(finding.reason)


def test_one_that_stays_at_the_handover_is_over_there(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch, stay=True)
    trace.unblock()
    assert trace.hand_over().finished
    trace = Trace(monkeypatch, stay=True)
    trace.unblock()
    trace.wake()
    handover = trace.hand_over()  # nobody looks again
    assert handover.finished
    assert wrong(handover) == {(check, 2, "unknown") for check in ("cpu-parked", "lapic-self-nmi", "nmi-pending")}


# -- that NMIs are unblocked ------------------------------------------------------------------


def test_an_iret_that_was_executed_is_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    symbols = trace.machine.symbols
    assert trace.follower.breakpoints == (AFTER_IRET, *map(symbols.address, ("kexec_reloc", "do_nmi_crash",
                                                                             "__stop_this_cpu")))  # fmt: skip
    seen = trace.unblock()
    assert seen.stage is not None and (seen.stage.stage, seen.stage.cpu) == ("nmis-unblocked", 0)
    assert wrong(seen) == set() and of(seen, "enable-nmis", None)[0] == "skip"
    assert trace.unblock().stage is None  # it is reached once
    assert of(trace.hand_over(), "enable-nmis", None)[0] == "pass"


def test_on_another_cpu_it_is_not_that_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    assert trace.follower.stop(1, AFTER_IRET).stage is None
    assert of(trace.hand_over(), "enable-nmis", None)[0] == "fail"


@pytest.mark.parametrize(
    ("where", "verdict", "observed"),
    [
        (Unblocking(AFTER_IRET), "fail", "not executed"),
        (Unblocking(), "fail", "no IRET in machine_kexec"),
        (Unblocking(absence=Absent("it lies in a hole")), "unknown", None),
    ],
)
def test_one_that_was_not_seen(
    where: Unblocking, verdict: str, observed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(monkeypatch, where)
    handover = trace.hand_over()
    assert wrong(handover) == {("enable-nmis", None, verdict)}
    (finding,) = [f for f in handover.findings if f.check == "enable-nmis"]
    assert (finding.expected, finding.observed) == ("executed", observed)


def test_nmis_that_are_blocked_follow_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    trace.machine.physical(0, lambda p: p._replace(nmi_blocked=True))
    failures = {(f.check, f.follows) for f in trace.hand_over().findings if f.verdict is Verdict.FAIL}
    assert failures == {("enable-nmis", None), ("nmi-latch", "enable-nmis")}


def test_without_a_breakpoint_for_it_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch, settable=lambda addresses: 1)
    assert trace.follower.breakpoints == (trace.machine.symbols.address("kexec_reloc"),)
    verdict, reason = of(trace.hand_over(), "enable-nmis", None)
    assert verdict == "unknown" and str(reason).startswith("only 1 hardware breakpoint can be set")


AT = 0xFFFF82D04030D800
IRET = bytes.fromhex("488d1506000000" "6a00" "50" "52" "48cf" "90")  # lea 6(%rip),%rdx; push ...; iretq; nop


@pytest.mark.parametrize(
    ("code", "after", "any_"),
    [
        (IRET, 13, True),
        (b"\x90\x48\xcf" + IRET, 16, True),  # another one before it
        (bytes.fromhex("4c8d0d06000000") + IRET[7:], 13, True),  # into %r9
        (bytes.fromhex("488d1507000000") + IRET[7:], None, True),  # which leads past the next instruction
        (bytes.fromhex("488d5506") + IRET[4:], None, True),  # not relative to RIP
        (IRET[7:], None, True),
        (IRET[:11] + b"\x90\x90\x90", None, False),
        (b"", None, False),
    ],
)
def test_an_iret_to_the_next_instruction(code: bytes, after: int | None, any_: bool) -> None:
    assert returns_to_next(code, AT) == (None if after is None else AT + after)
    assert holds_iretq(code) is any_


class Text:
    """A Xen whose machine_kexec(), the part that gcc split off, and enable_nmis() if it has one, are this code."""

    def __init__(self, code: bytes, cold: bytes = b"", function: bytes | None = None, readable: bool = True) -> None:
        self.symbols, self.readable = self, readable
        self.code = {"machine_kexec": (AT, code), "machine_kexec.cold": (AT + 0x1000, cold)}
        if function is not None:
            self.code["enable_nmis"] = (AT + 0x2000, function)

    def complete(self, prefix: str) -> list[str]:
        return [name for name in self.code if name.startswith(prefix)]

    def get(self, name: str, kinds: str) -> int | None:
        return self.code[name][0] if name in self.code else None

    def extent(self, name: str) -> tuple[int, int]:
        at, code = self.code[name]
        return at, at + len(code)

    def read(self, address: int, size: int) -> bytes:
        if not self.readable:
            raise Unreadable("it lies in a hole")
        return next(code for at, code in self.code.values() if at == address)


@pytest.mark.parametrize(
    ("text", "address", "why"),
    [
        (Text(IRET), AT + 13, None),
        (Text(IRET, function=IRET), AT + 13, None),  # a copy for others is not what runs
        (Text(b"\x90", cold=IRET), AT + 0x1000 + 13, None),
        (Text(b"\x90", function=IRET), AT + 0x2000 + 13, None),
        (Text(b"\x90", function=b"\x48\xcf"), AT + 0x2000, None),  # the function itself
        (Text(b"\x90\x48\xcf"), None, "may hold an IRET"),
        (Text(IRET, readable=False), None, "it lies in a hole"),
        (Text(b"\x90"), None, None),  # there is none
    ],
)
def test_where_nmis_are_unblocked(text: Any, address: int | None, why: str | None) -> None:
    found = unblocking(text, generations.BY_ID["4.17.0"])
    assert found.address == address
    assert (found.absence is None) if why is None else why in str(found.absence)
    assert unblocking(text, generations.BY_ID["4.2.0"]) == Unblocking()
