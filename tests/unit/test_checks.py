"""Each check on a recorded real Xen: it passes as recorded; one change makes it fail, on its CPU, and nothing else.

More than 400 lines: what one change makes of every check is read in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.machines.changed import (
    BEYOND_MEMORY,
    CHANGES,
    LOST,
    MC,
    NMI,
    OF_ITS_OWN,
    Machine,
    bad,
    handler,
    memory_alone,
    needing,
    no_area,
    no_buffer,
    no_idt,
    no_offset,
    silent,
    unhalted,
    unhooked,
)
from tests.machines.recorded import crashed, names
from xen_symbols.absence import Absent, Kind, Undecidable, Unreadable
from xen_symbols.crashpath import identification
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import Need, Outcome, Shows
from xen_symbols.crashpath.context import Context, Followed
from xen_symbols.crashpath.engine import judge
from xen_symbols.crashpath.generations import Bookkeeping, Generation
from xen_symbols.crashpath.identification import identify
from xen_symbols.crashpath.position import at_stage, crashing_cpu, infer, online_at_crash
from xen_symbols.crashpath.stages import BY_ID
from xen_symbols.report.model import Finding, Verdict
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.reads import Read, absent
from xen_symbols.xen.state import State, read_state


def unknowns(lost: dict[int | None, set[str]]) -> set[tuple[str, int | None, str]]:
    return {(check, cpu, "unknown") for cpu, found in lost.items() for check in found}


@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize("name", [name for name in names() if crashed(name) == 0 and not name.endswith("-shootdown")])
def test_what_is_lost_of_an_online_cpu_is_unknown(name: str, what: str) -> None:
    change, lost = LOST[what]
    machine = Machine(name)
    change(machine)
    report = machine.report()
    if name.endswith("-vmcore"):  # whose notes cannot be compared without it
        also = {"crash-notes": "dump-notes", "crash-info-note": "dump-crash-info"}
        lost = {cpu: found | {also[check] for check in found & also.keys()} for cpu, found in lost.items()}
    assert bad(report) == unknowns(lost)
    assert report.verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("what", LOST)
def test_with_memory_alone_what_is_lost_is_unknown(what: str) -> None:
    machine = memory_alone("4.17-handover")
    LOST[what][0](machine)
    report = machine.report()
    assert bad(report) == unknowns(LOST[what][1])
    assert report.verdict is Verdict.UNKNOWN


def cpus_found(machine: Machine) -> Finding:
    return next(f for f in machine.report().findings if f.check == "cpus-found")


def test_a_cpu_that_is_not_one_of_xens_is_named() -> None:
    machine = Machine()
    found = cpus_found(machine)
    assert (found.expected, found.observed, found.reason) == ("CPUs 0-3", "CPUs 0-3", None)
    assert [item.symbol for item in found.evidence] == ["cpu_online_map", "crash_saved_cpus", "waiting_to_crash"]
    no_area(machine, 2)
    found = cpus_found(machine)
    assert (found.expected, found.observed) == ("CPUs 0-3", "CPUs 0-1,3")
    assert found.reason == (
        "online, but without a per-CPU area: CPU 2; QEMU device state: its CPU 2 runs Xen "
        "(do_nmi_crash+0x51), and is none of the CPUs found in Xen's memory"
    )
    machine = Machine("4.17-crashed-vmcore")
    machine.variable("nr_cpu_ids", b"\2\0\0\0", None)
    found = cpus_found(machine)
    assert (found.expected, found.observed) == ("CPUs 0-3", "CPUs 0-1")
    assert found.reason == "; ".join([
        "CPUs 2-3 in crash_saved_cpus, and nr_cpu_ids is 2",
        *(f"Xen's crash notes: its CPU {cpu} saved its registers, and is none of the CPUs found in Xen's memory"
          for cpu in (2, 3)),
    ])  # fmt: skip


def test_a_cpu_in_no_mask_is_identified_by_what_it_runs() -> None:
    machine = Machine("4.17-shootdown")
    offline(machine, 3)
    assert bad(machine.report()) == {("cpus-found", None, "unknown")}
    assert cpus_found(machine).reason == (
        "QEMU device state: its CPU 3 runs Xen (default_idle+0xc6), and is CPU 3, which is not online"
    )
    machine.physical(3, lambda p: p._replace(registers={}))
    assert "its CPU 3 may run Xen: its registers could not be read" in str(cpus_found(machine).reason)


def test_what_two_cpus_share_is_not_known_to_be_each_ones_own() -> None:
    """In a dump no IDTR shows whose the gates are."""
    machine = memory_alone("4.17-handover")
    pointers = machine.symbols.address("idt_tables")
    machine.poke(pointers + 8, machine.memory.read(pointers + 16, 8))
    assert bad(machine.report()) == {("cpus-found", None, "unknown")}
    assert cpus_found(machine).reason == "CPUs 1-2 have one IDT"
    machine = memory_alone("4.17-handover")
    offsets = machine.symbols.address("__per_cpu_offset")
    machine.poke(offsets + 8, machine.memory.read(offsets + 16, 8))
    assert ("cpus-found", None, "unknown") in bad(machine.report())
    assert cpus_found(machine).reason == "CPUs 1-2 have one per-CPU area"


@pytest.mark.parametrize("lose", [no_idt, no_buffer, no_area, no_offset])
def test_a_cpu_that_was_not_online_may_be_missing(
    lose: Callable[[Machine, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # This one halts elsewhere, as parked ones do.
    monkeypatch.setattr("xen_symbols.crashpath.checks.cpus._AT_REST", {"default_idle"})
    machine = Machine("4.17-shootdown")
    offline(machine, 3)
    lose(machine, 3)
    report = machine.report()
    assert (report.verdict, bad(report)) == (Verdict.PASS, set())


def test_unmatched_cpus_outside_xen_are_not_a_failure() -> None:
    machine = Machine()
    for cpu in (1, 2):
        machine.physical(cpu, lambda p: p._replace(apic_id=p.apic_id + 16, registers={"rip": 0xFFFFFFFF81000000}))
    found = cpus_found(machine)
    assert (found.verdict, found.expected, found.observed) == (Verdict.PASS, "CPUs 0-3", "CPUs 0-3")
    assert found.reason == "2 of the machine's CPUs are not used by Xen"
    assert {check for check, cpu, verdict in bad(machine.report())} == OF_ITS_OWN - {"crash-save-done", "crash-notes"}


def test_of_many_unmatched_cpus_four_are_named() -> None:
    machine = Machine()
    parked = machine.example.physical_cpus[1]
    machine.example.physical_cpus += [parked._replace(index=cpu, apic_id=cpu) for cpu in range(4, 10)]
    found = cpus_found(machine)
    assert bad(machine.report()) == {("cpus-found", None, "unknown")}
    assert [words.split("its ")[-1][:5] for words in str(found.reason).split("; ")] == [
        "CPU 4", "CPU 5", "CPU 6", "CPU 7", "2 mor",
    ]  # fmt: skip
    assert str(found.reason).endswith("; 2 more like these")


def test_a_running_xen_without_a_cpu_online_is_unknown() -> None:
    machine = Machine("4.17-shootdown")
    for name in ("cpu_online_map", "crash_saved_cpus", "waiting_to_crash", "kexecing"):
        machine.variable(name, b"\0")
    found = cpus_found(machine)
    assert (found.stage, found.verdict, found.expected, found.observed) == ("normal", Verdict.UNKNOWN, "none", "none")
    assert str(found.reason).endswith("its CPU 3 runs Xen (default_idle+0xc6), and is CPU 3, which is not online; "
                                      "no CPU is online")  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_as_recorded_everything_passes(name: str) -> None:
    report = Machine(name).report()
    assert bad(report) == set()
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("name", names())
def test_stage_and_crashing_cpu_follow_from_state_alone(name: str) -> None:
    report = Machine(name).report()
    assert f"-{report.stages[0].stage}" in name and len(report.stages) == 1
    # The crash key is handled on the CPU that took the console's interrupt.
    assert report.crashing_cpu == crashed(name)


@pytest.mark.parametrize("what", CHANGES)
def test_one_change_fails_one_check(what: str) -> None:
    change, check, cpu = CHANGES[what]
    machine = Machine()
    change(machine)
    report = machine.report()
    assert bad(report) == {(check, cpu, "fail")}
    assert report.verdict is Verdict.FAIL
    failure = next(f for f in report.findings if f.verdict is Verdict.FAIL)
    assert failure.reason and failure.source and failure.observed != failure.expected
    assert failure.stage == "handover"


def test_every_check_has_a_change_that_fails_it() -> None:
    shown = {check for _, check, _ in CHANGES.values()}
    # Below, in test_gate_changes.py, test_afterwards.py and test_death.py, and in the live tests.
    elsewhere = {"dump-notes", "kexecing", "fatal-trap", "nmi-answered", "nmi-entries", "shootdown-report",
                 "gate-change", "enable-nmis", "dump-crash-info", "dump-vmcoreinfo"}  # fmt: skip
    assert {check.id for check in CHECKS} == shown | elsewhere | {"cpus-found"}  # which is unknown instead


def test_a_pass_shows_what_its_row_says() -> None:
    """A Xen that runs, taken for one that hands over: nothing was done for any promise; what passes was not kept."""
    machine = Machine("4.17-normal")
    state = read_state(machine.memory)
    generation = identify(machine.memory).generation
    position = at_stage(BY_ID["handover"], 0, 0, online_at_crash(state, generation, None))
    followed = Followed(nmi_entries={}, unblocked="not executed", looks=0)
    found: dict[str, set[Verdict]] = {}
    for finding in judge(Context(machine.memory, state, position, generation, followed)):
        found.setdefault(finding.check, set()).add(finding.verdict)
    claims = {check.id: check.shows for check in CHECKS}
    passed = {check for check, verdicts in found.items() if Verdict.PASS in verdicts and Verdict.FAIL not in verdicts}
    failed = {check for check, verdicts in found.items() if Verdict.FAIL in verdicts}
    assert not {check for check in passed if claims[check] is Shows.KEPT}
    assert not {check for check in failed if claims[check] is Shows.NOT_BROKEN}
    assert {check for check in failed if claims[check] is Shows.SO_ALREADY} == {
        "nmi-latch", "crashing-cpu-interrupts",
    }  # of other CPUs; in the idle loop


def test_a_cpu_that_never_answered_explains_what_follows() -> None:
    machine = Machine()
    machine.variable("waiting_to_crash", b"\x04")
    machine.variable("crash_saved_cpus", b"\x0b")
    machine.variable("cpu_online_map", b"\x04")
    machine.per_cpu("crash_save_done", 2, b"\0")
    machine.gate(2, MC, 4, b"\x01")
    machine.poke(machine.notes(2) + 20, bytes(336))
    machine.poke(machine.notes(2) + 372, bytes(32))
    failures = [f for f in machine.report().findings if f.verdict is Verdict.FAIL]
    assert {f.cpu for f in failures} == {2}
    assert [f.check for f in failures if f.follows is None] == ["nmi-answered"]
    assert {f.check for f in failures if f.follows == "nmi-answered"} == {
        "waiting-cpus", "saved-cpus", "online-cpus", "crash-save-done", "mc-gate-ist", "crash-notes",
    }  # fmt: skip


def said(machine: Machine, text: str) -> None:
    """The last line of Xen's console."""
    line = f"(XEN) {text}\n".encode()
    ring, producer = machine.memory.variable("conring"), machine.memory.variable("conringp", 4)
    machine.poke(ring + producer - len(line), line)


def failures(machine: Machine) -> dict[tuple[str, int | None], str | None]:
    """Each failure, and what it follows from."""
    return {(f.check, f.cpu): f.follows for f in machine.report().findings if f.verdict is Verdict.FAIL}


def of_the_count(machine: Machine, count: int) -> Finding:
    """The finding on waiting_for_crash_ipi, as if this Xen had it."""
    state = read_state(machine.memory)
    counted = state._replace(system={**state.system, "waiting_count": Read(count)})
    generation = identify(machine.memory).generation._replace(bookkeeping=Bookkeeping.COUNT, announces=False)
    context = Context(machine.memory, counted, infer(state, generation), generation)
    found = judge(context)
    first, later = (
        next(f for f in findings if f.check == "waiting-cpus" and f.cpu is None)
        for findings in (found, judge(context, 1, found))
    )
    assert later._replace(stop=0) == first  # the same finding at later stages
    return first


@pytest.mark.parametrize(
    "cpus, count, follows",
    [((2,), 1, "nmi-answered"), ((2,), 3, None), ((2,), 2, None), ((1, 2, 3), 3, "nmi-answered"), ((), 3, None)],
)
def test_silent_cpus_explain_a_count_only_up_to_their_number(
    cpus: tuple[int, ...], count: int, follows: str | None
) -> None:
    machine = Machine()
    silent(machine, *cpus)
    finding = of_the_count(machine, count)
    assert (finding.verdict, finding.expected, finding.observed, finding.follows) == (Verdict.FAIL, 0, count, follows)
    assert ("nmi-answered of CPU 2 would account for 1 only" in str(finding.reason)) is (cpus == (2,) and count > 1)


def test_cpus_stopped_midway_explain_a_count() -> None:
    def machine(*cpus: int) -> Machine:
        stuck = Machine()
        for cpu in cpus:
            stuck.per_cpu("crash_save_done", cpu, b"\0")
        return stuck

    assert of_the_count(machine(2, 3), 2).follows == "crash-save-done"
    assert of_the_count(machine(2, 3), 3).follows is None


@pytest.mark.parametrize(
    "text, waiting, follows",
    [
        ("Failed to shoot down CPUs {2}", (2,), "waiting-cpus"),
        ("Failed to shoot down CPUs {1-3}", (1, 2, 3), "waiting-cpus"),
        ("Failed to shoot down CPUs {1,3}", (1, 3), "waiting-cpus"),
        ("Failed to shoot down CPUs {2,3}", (2,), None),
        ("Failed to shoot down CPUs {2", (2,), None),
    ],
)
def test_xens_report_follows_from_the_cpus_that_it_names(text: str, waiting: tuple[int, ...],
                                                         follows: str | None) -> None:  # fmt: skip
    machine = Machine()
    machine.variable("waiting_to_crash", bytes([sum(1 << cpu for cpu in waiting)]))
    said(machine, text)
    assert failures(machine) == {("shootdown-report", None): follows} | {("waiting-cpus", cpu): None for cpu in waiting}


def test_xens_report_of_a_silent_cpu_follows_from_its_silence() -> None:
    machine = Machine()
    silent(machine, 3)
    said(machine, "Failed to shoot down CPUs {3}")
    found = failures(machine)
    assert [what for what, follows in found.items() if follows is None] == [("nmi-answered", 3)]
    assert found["shootdown-report", None] == "nmi-answered"


def test_what_kept_a_cpu_from_answering_does_not_follow_from_its_silence() -> None:
    machine = Machine()
    silent(machine, 2)
    machine.gate(2, NMI, 5, b"\x0e")
    machine.gate(2, MC, 5, b"\xee")
    found = failures(machine)
    assert {what for what, follows in found.items() if follows is None} == {("nmi-gate-present", 2), ("mc-gate-dpl", 2)}
    assert found["nmi-answered", 2] == "nmi-gate-present"
    assert found["saved-cpus", 2] == "nmi-answered"


def test_a_hook_that_is_gone_explains_every_cpu_that_did_not_answer() -> None:
    machine = Machine()
    silent(machine, 1, 2, 3)
    unhooked(machine)
    found = failures(machine)
    assert [what for what, follows in found.items() if follows is None] == [("nmi-dispatch", None)]
    assert {found["nmi-answered", cpu] for cpu in (1, 2, 3)} == {"nmi-dispatch"}


def test_a_cpu_that_never_finished_stopping_explains_later_failures() -> None:
    machine = Machine()
    machine.variable("cpu_online_map", b"\x04")
    machine.variable("waiting_to_crash", b"\x04")
    machine.per_cpu("crash_save_done", 2, b"\0")
    assert failures(machine) == {
        ("online-cpus", 2): None, ("crash-save-done", 2): "online-cpus", ("waiting-cpus", 2): "crash-save-done",
    }  # fmt: skip


PAIRS: dict[str, tuple[Callable[[Machine], object], str, str]] = {
    "notes": (lambda m: (m.variable("crash_saved_cpus", b"\x0d"), m.poke(m.notes(1) + 20, bytes(336)),
                         m.poke(m.notes(1) + 372, bytes(32))), "saved-cpus", "crash-notes"),
    "the LAPIC": (lambda m: m.lapic(1, spiv=0x1FF, lvt=(0x10000, 0x10000, 0x10000, 0x700, 0x10000, 0x10000)),
                  "lapic-enabled", "lapic-lvt"),
    "the self-NMI": (lambda m: (m.lapic(1, icr_low=0xFD), m.physical(1, lambda p: p._replace(nmi_pending=False))),
                     "lapic-self-nmi", "nmi-pending"),
}  # fmt: skip


@pytest.mark.parametrize("what", PAIRS)
def test_one_cause_is_reported_once(what: str) -> None:
    change, cause, consequence = PAIRS[what]
    machine = Machine()
    change(machine)
    assert failures(machine) == {(cause, 1): None, (consequence, 1): cause}


def test_the_crashing_cpu_in_x2apic_mode_explains_what_xen_believes() -> None:
    machine = Machine()
    machine.lapic(0, apic_base=0xFEE00D00, icr_high=1)
    machine.variable("x2apic_enabled", b"\1")
    assert failures(machine) == {("lapic-mode", 0): None, ("x2apic-enabled", None): "lapic-mode"}


def test_a_silent_cpu_stays_in_the_mode_in_which_xen_ran() -> None:
    """After the crashing CPU's own stop, x2apic_enabled describes that CPU."""
    machine = Machine()
    silent(machine, 2)
    machine.lapic(2, apic_base=0xFEE00C00, icr_high=2)
    assert failures(machine)["lapic-mode", 2] == "nmi-answered"


def test_a_lapic_that_the_emulator_may_have_left_off_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 4.4 the path switches it off and on again, which TCG of QEMU before 9.0 does not do."""

    def mode(base: int, *, off: bool = True, accelerator: object = "tcg") -> Finding:
        machine = Machine()
        machine.lapic(2, apic_base=base)
        monkeypatch.setattr(type(machine.target), "accelerator", accelerator, raising=False)
        state = read_state(machine.memory)
        generation = identify(machine.memory).generation
        assert generation is not None
        generation = generation._replace(switches_lapic_off=off)
        context = Context(machine.memory, state, infer(state, generation), generation)
        return next(f for f in judge(context) if (f.check, f.cpu) == ("lapic-mode", 2))

    disabled, x2apic = 0xFEE00000, 0xFEE00C00
    for accelerator in ("tcg", Absent("not asked")):
        undecided = mode(disabled, accelerator=accelerator)
        assert (undecided.verdict, undecided.observed) == (Verdict.UNKNOWN, "disabled")
        assert str(undecided.reason).endswith("leaves it off under TCG: judge it under a newer QEMU")
    assert mode(disabled, accelerator="kvm").verdict is Verdict.FAIL
    assert mode(disabled, off=False).verdict is Verdict.FAIL  # since 77ffa26374
    assert mode(x2apic).verdict is Verdict.FAIL  # that is not off
    assert mode(0xFEE00800).verdict is Verdict.PASS


def test_xens_own_report_of_a_failed_shootdown_is_a_failure() -> None:
    machine = Machine()
    ring = machine.memory.variable("conring")
    size = machine.memory.variable("conring_size", 4)
    producer = machine.memory.variable("conringp", 4)
    text = b"(XEN) Failed to shoot down CPUs {2}\n"
    assert producer < size
    machine.poke(ring + producer - len(text), text)
    assert bad(machine.report()) == {("shootdown-report", None, "fail")}


def test_a_report_that_is_not_in_the_ring_is_unknown() -> None:
    machine = Machine()
    ring = machine.memory.variable("conring")
    producer = machine.memory.variable("conringp", 4)
    machine.poke(ring + producer - 2048, b"." * 2048)
    assert bad(machine.report()) == {("shootdown-report", None, "unknown")}


def test_what_was_not_read_is_unknown_and_never_passes() -> None:
    machine = Machine()
    gone = Absent("no QMP socket", Kind.UNREAD)
    for cpu in range(4):
        machine.physical(cpu, lambda p: p._replace(lapic=gone, nmi_blocked=gone, nmi_pending=gone, idtr=gone))
    report = machine.report()
    assert report.verdict is Verdict.UNKNOWN
    unknown = {f.check for f in report.findings if f.verdict is Verdict.UNKNOWN}
    assert unknown == needing(Need.LAPIC, Need.DEVICE_STATE) | {"idtr"}
    assert all(f.reason == "no QMP socket" for f in report.findings if f.verdict is Verdict.UNKNOWN)


def test_what_a_target_cannot_hold_is_skipped_with_the_reason() -> None:
    report = Machine("4.17-crashed-vmcore").report()
    skipped = [f for f in report.findings if f.check == "lapic-mode" and f.cpu == 1]
    assert [(f.verdict, f.reason) for f in skipped] == [
        (Verdict.SKIP, "it is not in memory, and the target holds no device state")
    ]


@pytest.mark.parametrize("name", [name for name in names() if name.endswith(("-handover", "-vmcore"))])
def test_with_memory_alone_whatever_can_be_decided_passes(name: str) -> None:
    report = memory_alone(name).report()
    assert (report.verdict, bad(report), report.undecided) == (Verdict.PASS, set(), None)
    assert [(s.stage, s.cpu) for s in report.stages] == [("handover", None)]
    assert report.crashing_cpu == crashed(name)
    skipped = {f.check for f in report.findings if f.verdict is Verdict.SKIP and f.reason in NOT_HELD}
    assert skipped == BEYOND_MEMORY
    places = {cpu["at"]["symbol"].partition("+")[0] for cpu in report.cpus if cpu["at"]}
    assert places <= {"kexec_crash_save_cpu", "elf_core_save_regs"} and places  # by the notes in Xen's memory


NOT_HELD = {
    "the dump holds no registers of any CPU",
    "the registers are those saved in the notes",
    "it is not in memory, and the target holds no device state",
}


def test_with_memory_alone_a_running_xen_passes() -> None:
    report = memory_alone("4.17-normal").report()
    assert (report.verdict, bad(report), report.undecided) == (Verdict.PASS, set(), None)
    assert ([(s.stage, s.cpu) for s in report.stages], report.crashing_cpu) == ([("normal", None)], None)
    skipped = {f.check for f in report.findings if f.verdict is Verdict.SKIP and f.reason in NOT_HELD}
    assert skipped == BEYOND_MEMORY & {"idtr", "tr", "lapic-id", "lapic-mode", "lapic-enabled", "dump-notes"}


@pytest.mark.parametrize("what", [what for what, (_, check, _) in CHANGES.items() if check not in BEYOND_MEMORY])
def test_with_memory_alone_no_change_passes(what: str) -> None:
    change, check, cpu = CHANGES[what]
    machine = memory_alone("4.17-handover")
    change(machine)
    report = machine.report()
    if what == "#MC handler of one CPU not swapped":  # as in the moment when the crashing CPU swaps them
        assert report.verdict is Verdict.UNKNOWN and bad(report) == set()
        assert "memory does not show that Xen handed over" in str(report.undecided)
    else:
        assert bad(report) == {(check, cpu, "fail")}


@pytest.mark.parametrize("name", [name for name in names() if name.endswith("-shootdown")])
def test_with_memory_alone_an_unfinished_crash_is_unknown(name: str) -> None:
    report = memory_alone(name).report()
    assert (report.verdict, bad(report), [s.stage for s in report.stages]) == (Verdict.UNKNOWN, set(), ["crashing"])
    assert "how far it got cannot be determined" in str(report.undecided)


def test_a_crash_between_two_stages_or_stuck_there_does_not_pass() -> None:
    machine = Machine()
    inside = machine.symbols.address("machine_kexec", "tT") + 4
    machine.physical(0, lambda p: p._replace(registers={**p.registers, "rip": inside}))
    report = machine.report()
    assert (report.verdict, bad(report), [s.stage for s in report.stages]) == (Verdict.UNKNOWN, set(), ["crashing"])
    assert "no CPU is at the beginning of a stage" in str(report.undecided)
    machine.gate(1, NMI, 5, b"\x8f")
    assert machine.report().verdict is Verdict.FAIL


def _shootdown_findings(change: Callable[[Machine], object]) -> set[tuple[str, int | None, str]]:
    machine = Machine("4.17-shootdown")
    change(machine)
    return bad(machine.report())


def test_before_the_nmi_is_sent_the_others_are_untouched() -> None:
    assert _shootdown_findings(lambda m: m.gate(1, MC, 4, b"\0")) == {("mc-gate-ist", 1, "fail")}
    assert _shootdown_findings(lambda m: m.per_cpu("crash_save_done", 1, b"\1")) == {("crash-save-done", 1, "fail")}
    assert _shootdown_findings(lambda m: m.variable("waiting_to_crash", b"\x0a")) == {("waiting-cpus", 2, "fail")}


def test_kexecing_must_be_set_on_the_crash_path() -> None:
    assert _shootdown_findings(lambda m: m.variable("kexecing", b"\0")) == {("kexecing", None, "fail")}


@pytest.mark.parametrize("others", [0x04, 0x28, 0xAC])  # the images, which of them counts, a hypercall under way
def test_of_kexec_flags_one_bit_is_judged(others: int) -> None:
    def flags(value: int) -> set[tuple[str, int | None, str]]:
        return _shootdown_findings(lambda m: m.variable("kexec_flags", value.to_bytes(8, "little")))

    assert flags(others) == {("kexec-in-progress", None, "fail")}
    assert flags(others | 1 << 6) == set()


def test_ist_0_while_an_amd_cpu_holds_a_guests_state_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def guest(machine: Machine, **changes: Any) -> None:
        for vector in (NMI, 8, MC):
            machine.gate(1, vector, 4, b"\0")
        machine.physical(1, lambda p: p._replace(**changes))

    assert _shootdown_findings(lambda m: guest(m, tr_base=0xFFFF888000001000)) == set()
    # TR is Xen's own until the guest is entered.
    physical = Machine("4.17-shootdown").example.physical_cpus[1]
    assert _shootdown_findings(lambda m: guest(m, tr_base=physical.tr_base)) == set()
    # A PV guest runs: no HVM guest's state is loaded.
    in_ring_3 = {**physical.registers, "cs": 0xE033}
    assert _shootdown_findings(lambda m: guest(m, tr_base=physical.tr_base, registers=in_ring_3)) == {
        ("nmi-gate-ist", 1, "fail"), ("mc-gate-ist", 1, "fail"),
    }  # fmt: skip
    # A Xen that may lack the fix of XSA-244.
    monkeypatch.setattr("xen_symbols.crashpath.context._SINCE_XSA_244", "per_cpu__of_a_later_xen")
    assert _shootdown_findings(lambda m: guest(m, tr_base=physical.tr_base)) == {
        ("nmi-gate-ist", 1, "unknown"), ("mc-gate-ist", 1, "unknown"),
    }  # fmt: skip


def test_guests_state_on_every_cpu_is_not_a_failure_either() -> None:
    def guests(machine: Machine, tr_base: int) -> None:
        for cpu in range(4):
            for vector in (NMI, 8, MC):
                machine.gate(cpu, vector, 4, b"\0")
            machine.physical(cpu, lambda p: p._replace(tr_base=tr_base))

    assert _shootdown_findings(lambda m: guests(m, 0xFFFF888000001000)) == set()

    def one_lost(machine: Machine) -> None:  # its NMI gate has an IST, and no #DF gate shows which is right
        guests(machine, 0xFFFF888000001000)
        machine.gate(1, NMI, 4, b"\x02")

    assert _shootdown_findings(one_lost) == {("nmi-gate-ist", 1, "unknown")}


@pytest.mark.parametrize("cpus", [(1,), (0, 1, 2, 3)])
@pytest.mark.parametrize(("vector", "check"), [(NMI, "nmi-gate-ist"), (MC, "mc-gate-ist")])
def test_an_ist_kept_while_a_guest_runs_on_amd_is_a_failure(
    cpus: tuple[int, ...], vector: int, check: str
) -> None:
    """The exception would use a stack that the guest's TSS names."""

    def guests(machine: Machine) -> None:
        for cpu in cpus:
            for each in (NMI, 8, MC):
                machine.gate(cpu, each, 4, b"\0")
            machine.physical(cpu, lambda p: p._replace(tr_base=0, guest_mode=True))

    def one_left(machine: Machine) -> None:
        guests(machine)
        machine.gate(1, vector, 4, b"\x02")

    assert _shootdown_findings(guests) == set()
    assert _shootdown_findings(one_left) == {(check, 1, "fail")}


def test_an_intel_cpu_in_a_guest_keeps_its_ists() -> None:
    def guest(machine: Machine) -> None:
        machine.physical(1, lambda p: p._replace(guest_mode=True))

    def one_lost(machine: Machine) -> None:
        guest(machine)
        machine.gate(1, NMI, 4, b"\0")

    assert _shootdown_findings(guest) == set()
    assert _shootdown_findings(one_lost) == {("nmi-gate-ist", 1, "fail")}


def test_idtr_of_a_cpu_outside_xen_is_judged_by_whose_it_may_be() -> None:
    """Without QMP it is not known whether a CPU is in a guest."""

    def outside(machine: Machine, rip: int, ist: bool) -> None:
        for vector in () if ist else (NMI, 8, MC):
            machine.gate(1, vector, 4, b"\0")
        machine.physical(1, lambda p: p._replace(guest_mode=Absent("no QMP"), idtr=(0xFFFFFE0000000000, 0xFFF),
                                              tr_base=0xFFFFFE0000003000,
                                              registers={**p.registers, "rip": rip}))  # fmt: skip

    linux, xen = 0xFFFFFFFF81539F10, 0xFFFF82D0402F9C06
    assert _shootdown_findings(lambda m: outside(m, linux, ist=False)) == set()
    assert _shootdown_findings(lambda m: outside(m, linux, ist=True)) == {("idtr", 1, "unknown"), ("tr", 1, "unknown")}
    assert _shootdown_findings(lambda m: outside(m, xen, ist=False)) == {("idtr", 1, "fail")}


def test_a_cpu_on_its_way_into_the_halt_loop_is_unknown_to_who_does_not_look_again() -> None:
    """At the handover, and after it; what a trace makes of it is in test_afterwards.py."""
    machine = Machine()
    start = machine.symbols.address("do_nmi_crash", "tT")
    machine.physical(1, lambda p: p._replace(halted=False, nmi_pending=False,
                                          registers={**p.registers, "rip": start + 0x20}))  # fmt: skip
    machine.lapic(1, icr_low=0xFD)
    undecided = {(check, 1, "unknown") for check in ("cpu-parked", "nmi-pending", "lapic-self-nmi")}
    assert bad(machine.report()) == undecided
    crash_kernel = 0xFFFFFFFF81000000
    machine.physical(0, lambda p: p._replace(registers={**p.registers, "rip": crash_kernel}))
    assert bad(machine.report()) == undecided


def offline(machine: Machine, cpu: int) -> None:
    """Makes a CPU look as one that was not online does before the shootdown."""
    rest = 0b1111 & ~(1 << cpu)
    machine.variable("cpu_online_map", bytes([rest]))
    machine.variable("waiting_to_crash", bytes([rest & ~1]))


def test_a_parked_cpu_has_trap_nop_and_no_ist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xen_symbols.crashpath.checks.cpus._AT_REST", {"default_idle"})

    def parked(ist: bytes) -> set[tuple[str, int | None, str]]:
        machine = Machine("4.17-shootdown")
        offline(machine, 3)
        handler(machine, 3, NMI, "trap_nop")
        machine.gate(3, NMI, 4, ist)
        report = machine.report()
        assert [cpu["role"] for cpu in report.cpus] == ["crashing", "other", "other", "offline"]
        return bad(report)

    assert parked(b"\0") == set()
    assert parked(b"\2") == {("nmi-gate-ist", 3, "fail")}


def test_notes_that_may_be_half_written_are_not_a_failure() -> None:
    machine = Machine()
    inside = machine.symbols.address("machine_kexec", "tT") + 4  # between two stages: every step is allowed for
    machine.physical(0, lambda p: p._replace(registers={**p.registers, "rip": inside}))
    machine.poke(machine.notes(1) + 372, bytes(32))
    machine.poke(machine.notes(2) + 20 + 112 + 17 * 8, b"\x33\0")

    def seen() -> dict[int | None, tuple[str, Any]]:
        return {f.cpu: (str(f.verdict), f.observed) for f in machine.report().findings if f.check == "crash-notes"}

    halted = seen()  # in the handler: they have saved them
    assert {cpu: verdict for cpu, (verdict, _) in halted.items()} == {0: "pass", 1: "fail", 2: "fail", 3: "pass"}
    for cpu in (1, 2, 3):
        machine.physical(cpu, lambda p: p._replace(halted=False))
    observed = seen()
    assert observed == {0: ("pass", "saved"), 1: ("pass", "half written"), 2: ("pass", "not Xen's registers"),
                        3: ("pass", "saved")}  # fmt: skip


def test_without_the_name_of_do_nmi_its_dispatch_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("4.14-handover")
    address = machine.symbols.address

    def nameless(name: str, kinds: str | None = None) -> int:
        if name == "do_nmi":
            raise Unreadable("no do_nmi", Kind.NO_SYMBOL)
        return address(name, kinds)

    monkeypatch.setattr(machine.symbols, "address", nameless)
    assert bad(machine.report()) == {("nmi-dispatch", None, "unknown")}


def test_evidence_names_the_bytes() -> None:
    machine = Machine()
    machine.gate(0, NMI, 4, b"\x02")
    finding: Finding = next(f for f in machine.report().findings if f.verdict is Verdict.FAIL)
    address = idt_address(machine.memory, 0) + 16 * NMI
    assert finding.evidence[0].address == address
    assert finding.evidence[0].raw == machine.memory.read(address, 16)
    assert (finding.expected, finding.observed) == (0, 2)


def test_a_failures_consequence_depends_on_what_was_expected() -> None:
    def reason(change: Callable[[Machine], object], name: str = "4.17-handover") -> str | None:
        machine = Machine(name)
        change(machine)
        return next(f.reason for f in machine.report().findings if f.verdict is Verdict.FAIL)

    assert "its IRET returns to garbage" in str(reason(lambda m: m.gate(0, NMI, 4, b"\x02")))
    assert "the stack that happens to be current" in str(reason(lambda m: m.gate(2, NMI, 4, b"\x00")))
    assert "instead of being ignored" in str(reason(lambda m: handler(m, 1, MC, "machine_check")))
    assert "is already marked as done" in str(reason(lambda m: m.per_cpu("crash_save_done", 0, b"\1")))
    assert "signs it off again" in str(reason(lambda m: m.per_cpu("crash_save_done", 2, b"\0")))


def test_each_explanation_is_of_a_value_that_its_check_can_expect() -> None:
    """A key of `instead_of` that no check expects would never be shown."""
    for check in CHECKS:
        for expected in check.instead_of:
            shown = {"symbol": expected} if isinstance(expected, str) and check.id.endswith("handler") else expected
            outcome = Outcome(Verdict.FAIL, shown, "something else")
            assert check.explain(outcome) == check.instead_of[expected] != check.consequence


def test_a_xen_that_fits_no_generation_is_shown_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    others = tuple(row for row in identification.GENERATIONS if row.id != "4.17.0")
    monkeypatch.setattr(identification, "GENERATIONS", others)
    found = identify(Machine().memory)
    assert found.generation is None and [near.generation.id for near in found.nearest] == ["4.3.4", "4.21.0", "4.21.2"]
    assert found.reason.endswith(
        "and what it renames (--alias). The nearest: 4.3.4 (10 of 11 statements hold; not so: symbol exception_table "
        "or symbol dummy_nmi_callback)"
    )


def unnamed(machine: Machine, **features: bool) -> tuple[State, Generation]:
    """A machine as in 4.2.0, whose memory does not name the CPU that crashed."""
    state = read_state(machine.memory)
    system = {**state.system, "crash_owner": absent("4.2.0 has none")}
    generation = identify(machine.memory).generation
    return state._replace(system=system), generation._replace(has_save_done=False, own_nmi_gate=False, **features)


def test_registers_alone_identify_the_crashing_cpu() -> None:
    machine = Machine()
    assert crashing_cpu(*unnamed(machine)) == (0, ("its RIP, in kexec_reloc",))
    machine.physical(0, lambda p: p._replace(registers={}))
    with pytest.raises(Undecidable, match="neither memory nor registers"):
        crashing_cpu(*unnamed(machine))


def test_registers_that_name_two_cpus_identify_none() -> None:
    machine = Machine()
    unhalted(machine)  # CPU 1 runs machine_kexec()
    with pytest.raises(Undecidable, match="contradictory: its RIP, in kexec_reloc: CPU 0, .*: CPU 1"):
        crashing_cpu(*unnamed(machine))


def test_memory_and_registers_that_disagree_identify_none() -> None:
    machine = Machine()
    machine.variable("crash_saved_cpus", bytes([1 << 2]))
    with pytest.raises(Undecidable, match="contradictory: its RIP, in kexec_reloc: CPU 0, the only notes saved: CPU 2"):
        crashing_cpu(*unnamed(machine))


def test_a_cpu_that_signed_off_without_saving_is_still_missed() -> None:
    machine = Machine()
    machine.variable("crash_saved_cpus", bytes([0b1101]))  # nothing of CPU 1 is left in Xen's masks

    def online(**features: bool) -> frozenset[int]:
        machine.memory.forget()
        state, generation = unnamed(machine, **features)
        return online_at_crash(state, generation, 0)

    machine.per_cpu("crash_save_done", 1, b"\0")
    assert online(frees_offline_cpus=False) == {0, 1, 2, 3}  # by its RIP
    machine.physical(1, lambda p: p._replace(registers={}))
    assert online(frees_offline_cpus=True) == {0, 1, 2, 3}  # by its IDT
    assert online(frees_offline_cpus=False) == {0, 2, 3}
