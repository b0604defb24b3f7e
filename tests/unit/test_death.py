"""What killed a CPU on the crash path: real machines that died there (tests/recorded/died), and stacks made up here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.machines.changed import Machine
from tests.machines.recorded import load
from xen_symbols.crashpath import death
from xen_symbols.crashpath.death import deaths, panic_lines
from xen_symbols.crashpath.follow import Follower
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.crashpath.identification import identify
from xen_symbols.crashpath.position import infer
from xen_symbols.crashpath.stages import Position
from xen_symbols.report.model import Finding, Verdict
from xen_symbols.xen.backtrace import Backtrace, Call, Step
from xen_symbols.xen.console import read_console
from xen_symbols.xen.frames import Frame
from xen_symbols.xen.locate import locate
from xen_symbols.xen.state import State, read_state

FAULT, DOUBLE, OTHERS = "died/4.17-machine_kexec", "died/4.17-kexec_crash_save_cpu", "died/4.20-__stop_this_cpu"
LINES = ("FATAL PAGE FAULT", "[error_code=0000]", "Faulting linear address: ffff87f000000000")
LOST = "no crash kernel starts, and the dump is lost"
GP = 13


def fatal(findings: Any) -> dict[int | None, Finding]:
    return {finding.cpu: finding for finding in findings if finding.check == "fatal-trap"}


# -- real machines ----------------------------------------------------------------------------


def test_a_dump_of_a_machine_that_died_names_what_killed_it() -> None:
    report = Machine(FAULT).report()
    assert [stage.stage for stage in report.stages] == ["crashing"]
    assert (report.verdict, report.undecided) == (Verdict.FAIL, None)  # what became of it is known
    (failure,) = [finding for finding in report.findings if finding.verdict > Verdict.UNKNOWN]
    assert (failure.check, failure.cpu, failure.expected) == ("fatal-trap", 0, "none")
    assert failure.observed == "#PF at machine_kexec"
    assert failure.reason == f"Xen said: {'; '.join(LINES)}; {LOST}"
    frame, ring = failure.evidence
    assert (frame.source, frame.symbol, ring.source) == ("memory", "struct cpu_user_regs", "Xen's console ring")
    machine = Machine(FAULT)
    assert frame.address is not None
    assert machine.memory.read_uint(frame.address + 128) == machine.symbols.address("machine_kexec")  # its rip


def test_a_double_fault_whose_stack_is_lost() -> None:
    """RSP is in no stack, and the function is one that other CPUs run, too: the path is known to be this CPU's."""
    report = Machine(DOUBLE).report()
    failure = fatal(report.findings)[0]
    assert failure.observed == "#DF at kexec_crash_save_cpu+0xa"
    assert failure.reason == f"Xen said: DOUBLE FAULT -- system shutdown; {LOST}"


def test_other_cpus_that_died() -> None:
    report = Machine(OTHERS).report()
    failures = fatal(report.findings)
    assert sorted(failures, key=str) == [1, 2, 3]
    assert {failure.observed for failure in failures.values()} == {"#PF at __stop_this_cpu"}
    assert {failure.reason for failure in failures.values()} == {
        f"Xen said: {'; '.join(LINES)}; it never signs off: the crashing CPU waits for it in vain, and it is not "
        "stopped for the crash kernel"
    }
    assert report.undecided and "how far it got cannot be determined" in report.undecided  # CPU 0 still waits


def test_what_they_did_not_do_follows_from_that() -> None:
    """The same machine, as if its crashing CPU had gone on without them."""
    machine = Machine(OTHERS)
    place = machine.symbols.address("machine_kexec")
    machine.physical(0, lambda cpu: cpu._replace(registers={**cpu.registers, "rip": place}))
    report = machine.report()
    assert report.stages[0].stage == "exec-entry"
    of_others = [f for f in report.findings if f.verdict is Verdict.FAIL and f.cpu in (1, 2, 3)]
    assert {f.check for f in of_others if f.follows is None} == {"fatal-trap"}
    assert {"waiting-cpus", "online-cpus", "crash-save-done"} <= {f.check for f in of_others}
    assert {f.follows for f in of_others if f.check != "fatal-trap"} == {"fatal-trap"}


def test_without_the_console_the_exception_is_named() -> None:
    machine = Machine(FAULT)
    machine.variable("conring_size", bytes(4))
    failure = fatal(machine.report().findings)[0]
    assert (failure.observed, failure.reason) == ("#PF at machine_kexec", LOST)
    assert [item.source for item in failure.evidence] == ["memory"]


def test_who_is_on_its_way_did_not_die() -> None:
    """No panic: the exception is still being handled, or was another's."""
    machine = Machine(FAULT)
    wait = machine.symbols.address("machine_kexec") + 8
    machine.physical(0, lambda cpu: cpu._replace(registers={**cpu.registers, "rip": wait, "rsp": cpu.registers["rsp"]}))
    frame = fatal(machine.report().findings)[0].evidence[0].address
    assert frame is not None
    machine.physical(0, lambda cpu: cpu._replace(registers={**cpu.registers, "rsp": frame}))
    report = machine.report()
    assert not fatal(report.findings) and report.undecided


def test_a_path_that_no_generation_fits() -> None:
    report = Machine(FAULT, do_nmi_crash="my_nmi_crash").report()
    assert report.generation is None and report.undecided
    assert fatal(report.findings)[0].observed == "#PF at machine_kexec"


def test_no_registers_no_death() -> None:
    machine = Machine(FAULT)
    machine.example.physical_cpus.clear()
    assert not fatal(machine.report().findings)


# -- a trace ----------------------------------------------------------------------------------


def following(name: str, monkeypatch: pytest.MonkeyPatch) -> Follower:
    """A trace whose machine was last seen on its way, and is now as recorded."""
    example, symbols = load(name)
    memory = locate(example, symbols)
    monkeypatch.setattr(Follower, "_start", lambda self, gates: None)
    follow = Follower(memory, identify(memory), clock=lambda: 0.0)
    follow.begun = True
    return follow


def test_a_trace_whose_machine_died_ends_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = following(FAULT, monkeypatch)
    result = follow.stop(0, 0, expired=True)
    assert result.finished and result.stage is not None and result.stage.stage == "crashing"
    complete = next(finding for finding in result.findings if finding.check == "trace-complete")
    assert (complete.verdict, complete.follows, complete.cpu) == (Verdict.FAIL, "fatal-trap", 0)
    assert complete.reason == (
        f"it died: {LOST}; CPU 0 is in machine_halt+0x29; "
        "Xen's console ends: (XEN) Reentered the crash path.  Something is very broken"
    )
    assert fatal(result.findings)[0].observed == "#PF at machine_kexec"
    assert follow.report.findings == list(result.findings) and follow.report.verdict is Verdict.FAIL


def test_xen_may_say_all_that_it_has_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the panic's lines one more look is waited for; where nothing has changed by then, it is over."""
    follow = following(FAULT, monkeypatch)
    follow.memory.target.write(  # type: ignore[attr-defined]
        follow.memory.physical(follow.memory.symbols.address("conring_size")), bytes(4)
    )
    assert not follow.stop(0, 0, expired=True).finished
    result = follow.stop(0, 0, expired=True)
    assert result.finished and fatal(result.findings)[0].reason == LOST


def test_other_cpus_deaths_do_not_end_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = following(OTHERS, monkeypatch)
    assert not follow.stop(0, 0, expired=True).finished
    assert not follow.stop(0, 0, expired=True).finished


# -- known defects ----------------------------------------------------------------------------


def with_vector(name: str, cpu: int, vector: int) -> tuple[Machine, State, Position]:
    """The machine, its death by another exception."""
    machine = Machine(name)
    frame = fatal(machine.report().findings)[cpu].evidence[0].address
    assert frame is not None
    machine.poke(frame + 124, vector.to_bytes(4, "little"))  # entry_vector
    state = read_state(machine.memory)
    return machine, state, infer(state, identify(machine.memory).generation)


def test_the_idt_of_a_cpu_that_is_not_present() -> None:
    machine, state, position = with_vector(FAULT, 0, GP)
    absent = state.cpus[3]._replace(cpu=4, exists=False)
    more = state._replace(cpus={**state.cpus, 4: absent})

    def known(state: State, generation: str) -> str | None:
        found = deaths(machine.memory, state, position, BY_ID[generation])[0]
        assert (found.event, found.at) == ("#GP", "machine_kexec")
        return found.defect.source if found.defect else None

    assert known(more, "4.21.0") == "2c9829a261 (4.21.2, 4.22.0)"
    assert known(state, "4.21.0") is None  # all are present
    assert known(more, "4.17.0") is None
    _, page_fault, _ = with_vector(FAULT, 0, 14)
    fault = page_fault._replace(cpus={**page_fault.cpus, 4: absent})
    assert deaths(Machine(FAULT).memory, fault, position, BY_ID["4.21.0"])[0].defect is None


def test_a_return_to_x2apic_that_is_not_allowed() -> None:
    machine, state, position = with_vector(OTHERS, 1, GP)

    def known(mode: int, generation: str) -> str | None:
        system = {**state.system, "apic_boot_mode": state.system["apic_boot_mode"]._replace(value=mode)}
        found = deaths(machine.memory, state._replace(system=system), position, BY_ID[generation])[1]
        assert (found.event, found.at) == ("#GP", "__stop_this_cpu")
        return found.defect.source if found.defect else None

    assert known(3, "4.3.2") == "77ffa26374 (4.5.0)"
    assert known(2, "4.3.2") is None  # the firmware left xAPIC mode
    assert known(3, "4.17.0") is None


def test_a_known_defect_is_in_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    always = death.DEFECTS[0]._replace(vector=14, holds=lambda state, generation: True)
    monkeypatch.setattr(death, "DEFECTS", (always,))
    reason = fatal(Machine(FAULT).report().findings)[0].reason
    assert reason == (
        f"Xen said: {'; '.join(LINES)}; machine_kexec() reads the IDT of each possible CPU, of those that are not "
        f"present, too: fixed by 2c9829a261 (4.21.2, 4.22.0); {LOST}"
    )


# -- stacks made up here ----------------------------------------------------------------------

PATH = {"kexec_crash", "machine_kexec", "do_nmi_crash"}


def step(*names: str, vector: int | None = None) -> Step:
    """A step in the first function, called by the others."""
    frame = None if vector is None else Frame(0x1000, vector, 0, 0xE008, 2, 0, 0)
    return Step(0, 0, 0xE008, names[0], None, "", frame, [Call(0, 0, f"{name}+0x10/0x20") for name in names[1:]])


def killed(*steps: Step, owner: bool = True, lost: bool = False) -> int | None:
    """The vector of what killed it."""
    found = death.cause(Backtrace(0, "", steps=list(steps), lost=lost), PATH, owner)
    return None if found is None or found.frame is None else found.frame.vector


HALTED = step("machine_halt+0x29", "panic", "do_page_fault")


def test_the_oldest_exception_on_the_path_is_the_cause() -> None:
    way_in = step("do_sysctl", "hypercall", vector=6)
    path = step("machine_kexec+0x4b", "kexec_crash", "panic", "do_invalid_op", vector=13)
    later = step("show_stack", "panic", "do_general_protection", vector=14)
    assert killed(HALTED, later, path, way_in) == 13
    assert killed(HALTED, path, way_in) == 13


def test_an_exception_that_led_to_the_path_is_not() -> None:
    way_in = step("do_sysctl", "hypercall", vector=6)
    assert killed(step("udelay", "machine_crash_shutdown", "kexec_crash", "panic", "do_invalid_op"), way_in) is None
    other = step("one_cpu_only+0x31", "kexec_crash", "panic", "do_invalid_op")
    assert killed(other, step("idle_loop", vector=6), owner=False) is None  # it came too late to crash


def test_an_exception_that_was_handled_is_not() -> None:
    assert killed(step("do_nmi"), step("machine_kexec", "kexec_crash", vector=2)) is None


def test_parts_of_functions_count_as_the_functions() -> None:
    dead = step("machine_halt", "panic.cold", "do_page_fault")
    assert killed(dead, step("machine_kexec.part.0+0x4", vector=14)) == 14


def test_a_lost_way_back_shows_the_path_for_its_owner_only() -> None:
    lost = step("memcpy", vector=8)
    assert killed(HALTED, lost, lost=True) == 8
    assert killed(HALTED, lost) is None
    assert killed(HALTED, lost, lost=True, owner=False) is None
    entered = step("udelay", "kexec_crash", "panic", "do_double_fault")  # by a double fault
    assert killed(entered, lost, lost=True) is None


def test_a_panic_without_an_exception() -> None:
    def called(*names: str) -> str | None:
        return death.panicked(Backtrace(0, "", steps=[step(*names)]), PATH)

    assert called("machine_halt", "panic", "machine_kexec", "kexec_crash") == "machine_kexec+0x10/0x20"
    assert called("machine_halt", "panic", "do_reboot") is None  # not on the path
    assert called("udelay", "kexec_crash", "panic", "do_page_fault") is None  # the way in
    assert called("vprintk", "panic", "machine_kexec", "kexec_crash") is None  # not over yet
    assert death.panicked(Backtrace(0, ""), PATH) is None


# -- what Xen said ----------------------------------------------------------------------------

SAID = """\
(d1) Panic on CPU 0:
(XEN) RIP:    e008:[<ffff82d040200010>] first+0/0x10
(XEN) Panic on CPU 1:
(XEN) AN EARLIER ONE
(XEN) ****************************************
(XEN) [2026-11-29 10:38:01.123] RIP:    e008:[<ffff82d04030d7c0>] machine_kexec+0/0x190
(XEN) [2026-11-29 10:38:01.124] Panic on CPU 1:
(XEN) [2026-11-29 10:38:01.125] FATAL PAGE FAULT
(XEN) [2026-11-29 10:38:01.126] [error_code=0000]
(XEN) [2026-11-29 10:38:01.127] ****************************************
(XEN) Panic on CPU 2:
(XEN) not compl"""


def test_the_lines_of_a_panic() -> None:
    assert panic_lines(SAID, 1, 0xFFFF82D04030D7C0) == ("FATAL PAGE FAULT", "[error_code=0000]")
    assert panic_lines(SAID, 1) == ("AN EARLIER ONE",)
    assert panic_lines(SAID, 1, 0xFFFF82D04030D7C8) == ()  # another's registers
    assert panic_lines(SAID, 0) == ()  # a domain's words
    assert panic_lines(SAID, 2) == ()  # it is still being said


def test_the_lines_of_a_real_one() -> None:
    machine = Machine(FAULT)
    console = read_console(machine.memory, 8192)
    assert panic_lines(console, 0, machine.symbols.address("machine_kexec")) == LINES
