"""An experiment's outcome, from what was observed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.machines.changed import Machine
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.crashpath.identification import identify
from xen_symbols.report.model import Finding
from xen_symbols.report.model import Verdict as Judged
from xencrash.lab.storm.course import Course, End, Injected
from xencrash.lab.storm.delivery import Delivery
from xencrash.lab.storm.experiment import Action, Event, Place
from xencrash.lab.storm.judge import Verdict, judge
from xencrash.lab.storm.scene import Scene

SYMBOLS = Machine("4.17-handover").symbols
CRASH, OWN_MC, NOP = (SYMBOLS.address(name, "tT") for name in ("kexec_crash", "machine_check", "trap_nop"))
SCENE = Scene(
    symbols=SYMBOLS, memory_root=0, found_by="", build_id=b"", identification=None, crashing=0, apic_ids=(0, 1, 2),
    begins=CRASH, send=0, handover=SYMBOLS.address("kexec_reloc", "tT"), ends={}, own_handlers={"nmi": 1, "mc": OWN_MC},
    notes={}, kernel_sign=b"",
)  # type: ignore[arg-type] # fmt: skip
HANDED = {"end": End.HANDOVER, "kernel": True}


def injected(action: Action = Action.NMI, cpu: int = 0, handler: int = NOP, **seen: Any) -> Injected:
    foreseen = Delivery(handler, 0x1000, 0, seen.pop("obstacle", None))
    given = {"nmi_blocked": False, "after_handover": False, "taken": True, "frame": 0x1000, "returned": True} | seen
    return Injected(Event(action, Place(cpu, CRASH), cpu), CRASH, foreseen, **given)


def finding(check: str, cpu: int | None = None, follows: str | None = None) -> Finding:
    return Finding(check, "handover", cpu, Judged.FAIL, 0, 1, "", follows=follows)


def outcome(**course: Any) -> tuple[Verdict, str]:
    found = judge(Course(**course), SCENE)
    return found.verdict, found.what


def test_a_crash_that_is_handed_over_passes() -> None:
    assert outcome(**HANDED) == (Verdict.PASS, "handed-over")
    assert outcome(**HANDED, injected=[injected()]) == (Verdict.PASS, "handed-over")


@pytest.mark.parametrize(
    ("course", "what"),
    [
        ({"end": End.HANG, "where": {0: "halted in do_nmi_crash+0x1"}}, "hang"),
        ({"end": End.PANIC, "how": "Xen panics"}, "panic"),
        ({"end": End.RESET, "how": "the machine was reset (guest-reset)"}, "reset"),
        ({"end": End.RESET, "how": "QEMU ended with status -6: assertion failed"}, "qemu-died"),
        (HANDED | {"kernel": False}, "no-kernel"),
        (HANDED | {"at_handover": (finding("crash-notes", 1),)}, "check"),
        (HANDED | {"at_end": (finding("mc-gate-handler", 1),)}, "check"),
        (HANDED | {"notes_changed": frozenset((1,))}, "notes-changed"),
        (HANDED | {"running": {1: "it runs"}, "where": {1: "idle_loop"}}, "not-parked"),
        (HANDED | {"injected": [injected(taken=False)]}, "not-taken"),
        (HANDED | {"injected": [injected(frame=0x2000)]}, "wrong-stack"),
        (HANDED | {"injected": [injected(returned=False)]}, "no-return"),
    ],
)
def test_what_fails(course: dict[str, Any], what: str) -> None:
    assert outcome(**course) == (Verdict.FAIL, what)


def test_a_blocked_nmi_need_not_be_taken() -> None:
    assert outcome(**HANDED, injected=[injected(taken=False, nmi_blocked=True)])[0] is Verdict.PASS
    check = injected(Action.MC, taken=False, nmi_blocked=True)
    assert outcome(**HANDED, injected=[check]) == (Verdict.FAIL, "not-taken")


def test_another_cpu_need_not_come_back_from_its_nmi() -> None:
    assert outcome(**HANDED, injected=[injected(cpu=1, returned=False)])[0] is Verdict.PASS


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        ({"obstacle": "its page tables do not map its IDT", "taken": False}, "unreachable"),
        ({"action": Action.MC, "handler": OWN_MC}, "own-mc-handler"),
        ({"action": Action.MC, "handler": 0x2000100}, "kernel-mc-handler"),
        ({"action": Action.MC, "said": "triple fault", "taken": False}, "ends-machine"),
    ],
)
def test_windows_are_not_failures(seen: dict[str, Any], what: str) -> None:
    assert outcome(end=End.RESET, how="the machine was reset", injected=[injected(**seen)]) == (Verdict.WINDOW, what)


def test_a_window_in_which_the_machine_lives_on_passes() -> None:
    assert outcome(**HANDED, injected=[injected(Action.MC, handler=OWN_MC)])[0] is Verdict.PASS


def test_what_is_wrong_after_a_machine_check_that_was_survived_is_no_window() -> None:
    """4.17 ignores machine checks: the IRET of its handler unblocks a pending NMI, and notes stay half written."""
    seen, found = injected(Action.MC, cpu=1, handler=OWN_MC), (finding("crash-notes", 1),)
    assert outcome(**HANDED, injected=[seen], at_end=found) == (Verdict.FAIL, "check")
    stuck = {"running": {1: "it spins"}, "where": {1: "panic"}}
    assert outcome(**HANDED, injected=[seen], at_end=found, **stuck) == (Verdict.WINDOW, "own-mc-handler")
    assert outcome(end=End.HANG, injected=[seen]) == (Verdict.WINDOW, "own-mc-handler")
    both = [injected(Action.MC, cpu=cpu, handler=OWN_MC) for cpu in (1, 2)]
    assert outcome(**HANDED, injected=both, at_end=found, running={2: "it spins"})[0] is Verdict.WINDOW


def test_a_gate_that_is_not_present_is_a_failure() -> None:
    seen = injected(taken=False, obstacle="gate 2 is not present")
    assert outcome(end=End.RESET, how="the machine was reset", injected=[seen]) == (Verdict.FAIL, "reset")


def test_what_a_held_cpu_explains_is_excused_at_the_handover_and_not_at_the_end() -> None:
    found = (finding("nmi-answered", 1), finding("waiting-cpus"), finding("mc-gate-ist", 1))
    assert outcome(**HANDED, late=frozenset((1,)), at_handover=found)[0] is Verdict.PASS
    assert outcome(**HANDED, late=frozenset((2,)), at_handover=found)[0] is Verdict.FAIL
    assert outcome(**HANDED, late=frozenset((1,)), at_end=found[2:])[0] is Verdict.FAIL
    assert outcome(**HANDED, late=frozenset((1,)), stopped=frozenset((1,)), at_end=found)[0] is Verdict.PASS


def test_what_xen_said_of_a_held_cpu_when_its_wait_ended_is_excused_though_the_cpu_was_done_at_the_handover() -> None:
    found = (finding("shootdown-report"),)
    assert outcome(**HANDED, at_handover=found) == (Verdict.FAIL, "check")
    assert outcome(**HANDED, held=frozenset((1,)), at_handover=found)[0] is Verdict.PASS
    assert outcome(**HANDED, held=frozenset((1,)), at_end=found)[0] is Verdict.PASS
    counts = (finding("waiting-cpus"),)
    assert outcome(**HANDED, held=frozenset((1,)), at_handover=counts) == (Verdict.FAIL, "check")


def test_what_follows_from_another_finding_is_not_repeated() -> None:
    found = (finding("crash-notes", 1), finding("saved-cpus", 1, follows="crash-notes"))
    assert judge(Course(**HANDED, at_handover=found), SCENE).says == "crash-notes of CPU 1: 1, not 0"


def test_the_crashing_cpu_is_known_where_the_evidence_for_it_is_divided() -> None:
    machine = Machine("4.17-handover")
    machine.variable("kexec.c#crashing_cpu", bytes((1, 0, 0, 0)))
    machine.per_cpu("crash_save_done", 0, b"\1")
    machine.per_cpu("crash_save_done", 1, b"\0")
    machine.memory.forget()
    with pytest.raises(Undecidable, match="contradictory"):
        evaluate(machine.memory)
    memory = machine.memory
    scene = replace(SCENE, memory_root=memory.root, identification=identify(memory))
    found = {(one.check, one.cpu) for one in scene.failures(machine.target)}
    assert found == {("crash-owner", None), ("crash-save-done", 0), ("crash-save-done", 1)}
