"""The whole matrix: every generation clean, and every fault in every generation in which it makes sense.

Each run boots the reference guest in QEMU, follows its crash through gdb as `xencrash trace` does, and compares what
failed, where, and at which stage first, with the table of faults. At its end QEMU dumps the machine, and the dump must
say what the last stage said. One gdb follows them all, one after another: to start it costs as much as the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.live.guestruns import MAY_BE_SEEN, Run, as_in, expected, first_seen
from tests.live.machines import guest, target
from tests.machines.changed import needing
from xen_symbols import evaluate, open_dump
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.checks.model import Need
from xencrash.gdbmi import GdbSession
from xencrash.guests import BY_ID, FAULTS, Fault, command_line, generations
from xencrash.guests.faults import clean
from xencrash.lab.machine import Machine
from xencrash.trace import follow

pytestmark = pytest.mark.live

Json = dict[str, Any]


def clean_runs() -> Iterator[Run]:
    for generation in generations():
        for lapic in ("xapic", "x2apic"):
            # The switch back from x2APIC is illegal in old Xens only where the firmware made it: that is a fault.
            for cpus in (1, 2, 4, 8):
                yield Run(generation, None, cpus, lapic)


def fault_runs() -> Iterator[Run]:
    """With a CPU beside the crashing one and the faulty one, if the fault has one: of these nothing may be said."""
    for fault in FAULTS:
        cpus = min(fault.most_cpus, max(fault.cpus, 1) + 1)
        for generation in fault.generations:
            yield Run(generation, fault.id, cpus, "x2apic" if fault.x2apic else "xapic")


RUNS = (*clean_runs(), *fault_runs())
MEMORY_MIB = 40  # the guest's crash image ends below 34
# Seconds without a stage after which a crash is stuck. The longest that the path itself takes is the second for which
# it waits for the other CPUs; a busy host is slower. Where it is to get stuck, few are tried first.
STALL, STALL_STUCK = 12, 3
# QEMU's dumps, dealt to the runs in turn: dump-guest-memory's arguments.
DUMPS: tuple[dict[str, Any], ...] = ({}, {"format": "kdump-zlib"}, {"paging": True})
# What QEMU's notes do not hold, and what only a trace counts.
NOT_IN_A_DUMP = needing(Need.LAPIC, Need.DEVICE_STATE, Need.TRACE)


@dataclass(frozen=True)
class Followed:
    """The report of one crash, that of the dump taken at its handover, or its end (None for one that cannot be judged),
    and, of a clean one, the verdict on its RAM after it."""

    report: Json
    dump: Json | None
    of_memory_alone: str | None


def crash(run: Run, session: GdbSession, stall: float = STALL) -> Followed:
    gates = bool(run.fault and BY_ID[run.fault].gates)
    append = command_line(fault=run.fault, x2apic=run.fault is None and run.lapic == "x2apic")
    qemu, lapic = ("10.0", "x2apic") if run.lapic == "x2apic" else ("7.2", None)
    with guest(run.generation, cpus=run.cpus, append=append, qemu=qemu, lapic=lapic, memory=MEMORY_MIB) as lab, \
            TemporaryDirectory() as folder:  # fmt: skip
        path = Path(folder) / "dump"

        def dump() -> None:
            lab.dumps.qemu(path, **DUMPS[RUNS.index(run) % len(DUMPS)])

        def at_stage(stage: Json, findings: object) -> None:
            if stage["stage"] == "handover":
                dump()

        session.open(target(lab), str(lab.symbols), str(lab.qmp_socket))
        report = follow(session, timeout=60, stall=stall, gates=gates,
                        progress=at_stage, trigger=lambda: lab.serial.send(b"C"))  # fmt: skip
        if not path.exists():
            dump()
        try:
            dumped = evaluate(open_dump(path, lab.symbols)).to_json()
        except Undecidable:
            dumped = None
        return Followed(report, dumped, None if run.fault else of_memory_alone(lab))


def of_memory_alone(lab: Machine) -> str:
    """The verdict on the machine's RAM as a raw image."""
    try:
        return str(evaluate(open_dump(lab.ram_file, lab.symbols, base=0)).verdict)
    except Undecidable:
        return "unknown"


@pytest.fixture(scope="module")
def sessions() -> Iterator[list[GdbSession]]:
    """The gdb that is attached to one guest after another, once there is one."""
    started: list[GdbSession] = []
    yield started
    for session in started:
        session.close()


@pytest.fixture(scope="module", params=RUNS, ids=str)
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


@pytest.fixture(scope="module")
def followed(run: Run, sessions: list[GdbSession]) -> Followed:
    if gets_stuck(run):
        made = crash_in(sessions, run, STALL_STUCK)
        if first_seen(made.report, "fail") == expected(run):
            return made
    return crash_in(sessions, run, STALL)


def crash_in(sessions: list[GdbSession], run: Run, stall: float) -> Followed:
    """By the gdb there is, or a new one: where a trace was lost, what is left of it in gdb is not known."""
    if not sessions:
        sessions.append(GdbSession())
    try:
        made = crash(run, sessions[0], stall)
    except BaseException:
        sessions.pop().close()
        raise
    if "undecided" in made.report:
        sessions.pop().close()
    return made


def gets_stuck(run: Run) -> bool:
    return bool(run.fault) and any(check == "trace-complete" for check, _, _ in expected(run))


def test_exactly_what_should_fail_does(run: Run, followed: Followed) -> None:
    report = followed.report
    found = first_seen(report, "fail")
    wanted = expected(run)
    assert {as_in(wanted, item, report) for item in found if item[0] not in MAY_BE_SEEN.get(run.fault, ())} == wanted
    assert first_seen(report, "unknown") == set()
    assert report["generation"]["id"] == run.generation
    if gets_stuck(run):
        stuck = next(f for f in report["findings"] if f["check"] == "trace-complete")
        words = r"the dump is lost; CPU 0 is (halted )?in \w+\+0x\w+; Xen's console ends: \S"
        assert re.search(words, stuck["reason"])
    if not run.fault:
        assert report["stages"][-1]["stage"] == "after-handover"
        assert len({stage["cpu"] for stage in report["stages"] if stage["stage"] == "nmi-taken"}) == run.cpus - 1
        # 4.2.0 names no owner, and its last steps leave nothing in memory.
        judged = "unknown" if run.generation == "4.2.0" else "fail" if expected(run) else "pass"
        assert followed.of_memory_alone == judged


def handed_over(report: Json) -> bool:
    return "handover" in [stage["stage"] for stage in report["stages"]]


def verdicts(report: Json) -> dict[tuple[str, int | None], str]:
    """Each (check, CPU)'s verdict at the handover, or the last stage before it, but for what was skipped there."""
    stages = [stage["stage"] for stage in report["stages"]]
    last = stages.index("handover") if "handover" in stages else len(stages) - 1
    return {(f["check"], f["cpu"]): f["verdict"] for f in report["findings"]
            if f["stop"] == last and f["verdict"] != "skip" and f["check"] != "trace-complete"}  # fmt: skip


def test_a_dump_of_it_says_the_same_as_the_machine(run: Run, followed: Followed) -> None:
    fault = BY_ID[run.fault] if run.fault else None
    if followed.dump is None:  # 4.2.0 on its way: neither its memory nor its registers name the crashing CPU
        assert run.generation == "4.2.0" and fault and fault.not_in_a_dump
        assert not handed_over(followed.report)
        return
    live, dump = verdicts(followed.report), verdicts(followed.dump)
    assert followed.dump["generation"]["id"] == run.generation
    # A CPU on its way into the halt loop: the machine is looked at again, and of a dump that is unknown.
    awake = {asked for asked, verdict in dump.items() if verdict == "unknown"}
    assert awake.isdisjoint(live) and (awake or run.fault != "parked-awake")
    dump = {asked: verdict for asked, verdict in dump.items() if asked not in awake}
    if not handed_over(followed.report):  # it was dumped at none of the path's stages
        assert {asked for asked, verdict in dump.items() if verdict == "fail"} <= {
            (f["check"], f["cpu"]) for f in followed.report["findings"] if f["verdict"] == "fail"
        }
        assert "fail" in dump.values() or (fault and fault.not_in_a_dump)
        return
    both = live.keys() & dump.keys()
    assert {asked: dump[asked] for asked in both} == {asked: live[asked] for asked in both}
    assert {check for check, _ in live.keys() - dump.keys()} <= NOT_IN_A_DUMP
    gone = fault is None or fault.gone_from_a_dump(run.generation)
    shown = expected(Run(run.generation, None, run.cpus, run.lapic) if gone else run)
    failed = {asked for asked, verdict in dump.items() if verdict == "fail"}
    assert failed == {asked for asked, verdict in live.items() if verdict == "fail"} & dump.keys()
    assert bool(failed) is bool(shown)


@pytest.mark.parametrize("run", [Run("rfc-v1", None, 4, "xapic")], indirect=True, ids=str)
def test_the_rfc_as_posted_fails_in_the_one_way_that_its_author_names(followed: Followed) -> None:
    report = followed.report
    assert first_seen(report, "fail") == {("waiting-cpus", None, "shootdown-done")}
    failure = next(finding for finding in report["findings"] if finding["verdict"] == "fail")
    assert (failure["expected"], failure["observed"]) == (0, 3)
    assert "waits a full second" in failure["reason"]


@pytest.mark.parametrize("run", [Run("rfc-v1", "stuck", 3, "xapic")], indirect=True, ids=str)
def test_one_silent_cpu_explains_one_of_the_two_that_the_rfc_counts(followed: Followed) -> None:
    failures = [f for f in followed.report["findings"] if f["verdict"] == "fail"]
    counts = [f for f in failures if f["check"] == "waiting-cpus"]
    assert counts and all("follows" not in f and f["observed"] == 2 for f in counts)
    assert "nmi-answered of CPU 1 would account for 1 only" in counts[0]["reason"]
    assert {f["cpu"] for f in failures if f.get("follows") == "nmi-answered"} == {1}


def test_a_fault_that_leaves_no_trace_says_so() -> None:
    silent: list[Fault] = [fault for fault in FAULTS if not fault.visible]
    assert silent and all(fault.invisible for fault in silent)
    assert all(fault.expected(generation) == clean(generation) for fault in silent for generation in fault.generations)
