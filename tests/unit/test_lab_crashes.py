"""The matrix's cells and the selection that covers it, the random parts of runs of crashes, and the sum of outcomes."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.machines.pages import parsed
from xencrash.cli import main
from xencrash.lab import cells, crashes, judged
from xencrash.lab.cells import Cell
from xencrash.lab.commands import matrix, repeat, run
from xencrash.lab.crash import WAYS, Crash
from xencrash.lab.crash import crashes as crashes_of
from xencrash.lab.crashes import crash
from xencrash.lab.errors import BadSpecification, LabError, PackageGone
from xencrash.lab.outcomes import finish, render, status_of, words
from xencrash.lab.rows import ACCELS, GDBS, QEMUS, SUITES, XENS
from xencrash.lab.specification import Specification

Json = dict[str, Any]


def outcome(verdict: str = "pass", *, gone: bool = False, **more: Any) -> Json:
    cell = {"name": "one", "xen": "4.17", "qemu": "7.2", "gdb": "debian", "lapic": "xapic", "how": "panic", "cpu": 2}
    came = {"verdict": verdict, "reason": "" if verdict == "pass" else "why | so", "gone": gone, "seconds": 31.4}
    found = {"load": 0, "domu": False, "delay": 0.0, "accel": "tcg"}
    found |= {"generation": "4.17.0", "crashing_cpu": 2, "lapic_modes": ["xapic"]}
    return {**cell, **came, **found, **more}


def test_a_mode_that_a_qemu_does_not_have_makes_no_cell() -> None:
    every = cells.cells()
    per_xen = len(GDBS) * sum(len(row.cpu) for row in QEMUS.values())
    assert len(every) == len({cell.name for cell in every}) == per_xen * len(XENS) > 0
    modes = {(cell.qemu, cell.lapic) for cell in every}
    assert modes == {(row.name, mode) for row in QEMUS.values() for mode in row.cpu}
    assert ("10.0", "x2apic") in modes and ("7.2", "x2apic") not in modes
    assert {(cell.how, cell.cpu) for cell in every} == {("key", None), *(("panic", cpu) for cpu in range(4))}


def test_under_kvm_every_qemu_has_both_modes_and_no_domu() -> None:
    every = cells.cells(accel="kvm-in-tcg")
    assert {(cell.qemu, cell.lapic) for cell in every} == set(itertools.product(QEMUS, ("xapic", "x2apic")))
    assert {cell.accel for cell in every} == {"kvm-in-tcg"} and not any(cell.domu for cell in every)
    assert every[0].name == "4.17-7.2-debian-xapic-kvm-in-tcg"
    made = crashes._specification(every[0])
    assert (made.accel, made.lapic, made.accel_row.nested) == ("kvm-in-tcg", "xapic", True)
    assert words(outcome(accel="kvm-in-tcg"))[1] == "7.2, kvm-in-tcg"


def test_the_default_selection_covers_every_pair() -> None:
    def pairs(some: tuple[Cell, ...]) -> set[tuple[str, ...]]:
        return set().union(*map(cells._pairs, some))

    settled = cells.settled(cells.cells())
    few = cells.covering(settled)
    assert pairs(few) == pairs(settled)
    assert 2 * len(few) < len(settled)
    assert few[0].name == "4.17-7.2-debian-xapic"
    assert all(pairs(few[:i]) < pairs(few[: i + 1]) for i in range(len(few)))


def test_a_moving_suite_is_in_no_selection_that_does_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SUITES[QEMUS["sid"].suite].moving
    moving = {cell for cell in cells.cells() if "sid" in (cell.qemu, XENS[cell.xen].suite)}
    assert moving and not moving & set(cells.settled(cells.cells()))
    ran: list[Cell] = []

    def crash_all(some: tuple[Cell, ...], *_: object) -> list[Json]:
        ran[:] = some
        return [outcome()]

    monkeypatch.setattr(matrix, "crash_all", crash_all)
    monkeypatch.setattr(repeat, "crash_all", crash_all)
    more = {"output": Path(), "jobs": 1, "format": "json", "number": 90, "seed": 1, "fresh": False}
    for command in (matrix, repeat):
        command.run(_args(**more, all=False))
        assert "sid" not in {cell.qemu for cell in ran}
        command.run(_args(**more, all=False, qemu=["sid"]))
        assert {cell.qemu for cell in ran} == {"sid"}
    matrix.run(_args(**more, all=True))
    assert "sid" in {cell.qemu for cell in ran}


def _args(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**dict.fromkeys(cells.DIMENSIONS), "accel": "tcg", **given})


def test_filters() -> None:
    left = cells.chosen({"xen": ["4.20"], "lapic": ["x2apic"]}, cells.cells())
    assert [cell.name for cell in left] == [
        f"4.20-{row.name}-{gdb}-x2apic" for row in QEMUS.values() if "x2apic" in row.cpu for gdb in GDBS
    ]
    with pytest.raises(BadSpecification, match="x2APIC only since QEMU 9"):
        cells.chosen({"qemu": ["7.2"], "lapic": ["x2apic"]}, cells.cells())
    assert cells.wanted({**vars(_args(xen=["4.20"])), "jobs": 2}) == {"xen": ["4.20"]}


def test_a_seed_gives_the_same_crashes_and_they_go_over_all_cells() -> None:
    settled = cells.settled(cells.cells())
    number = 2 * len(settled) + 14
    one, again, other = (cells.moments(number, seed, settled) for seed in (7, 7, 8))
    assert one == again != other
    assert len({cell.name for cell in one}) == number
    rows = [(cell.xen, cell.qemu, cell.gdb, cell.lapic) for cell in one]
    assert set(rows[: len(settled)]) == {(cell.xen, cell.qemu, cell.gdb, cell.lapic) for cell in settled}
    assert rows[len(settled) :] == (2 * rows[: len(settled)])[: number - len(settled)]
    assert {cell.load > 0 for cell in one} == {False, True}
    assert {cell.domu for cell in one} == {False, True}
    assert {(cell.how, cell.cpu) for cell in one} <= {(crash.how, crash.cpu) for crash in crashes_of(4)}
    assert not [cell for cell in one if cell.domu and WAYS[cell.how].planted]
    assert {cell.how for cell in cells.moments(200, 7, settled)} == set(WAYS)
    assert {cell.how for cell in cells.moments(200, 7, settled, {"mce", "nmi"})} == set(WAYS) - {"mce", "nmi"}
    assert all(0 <= cell.delay <= 2 for cell in one)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (["pass", "pass"], 0),
        (["pass", "fail", "unknown"], 1),
        (["pass", "unknown"], 3),
        (["pass", "skip"], 3),
        (["pass", "gone"], 0),
        (["pass", "gone", "fail"], 1),
        (["gone", "unknown"], 3),
        (["gone"], 3),
        ([], 3),
    ],
)
def test_the_exit_status(verdicts: list[str], status: int) -> None:
    outcomes = [outcome("skip", gone=True) if verdict == "gone" else outcome(verdict) for verdict in verdicts]
    assert status_of(outcomes) == status


def test_a_package_that_is_gone_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish([outcome(), outcome("skip", gone=True)], "table", "The matrix") == 0
    assert "NOT RUN, ITS PACKAGE IS GONE: one: why | so" in capsys.readouterr().err


def test_formats() -> None:
    outcomes = [outcome(), outcome("fail", load=5, domu=True, delay=0.5, how="key", cpu=None)]
    markdown = render(outcomes, "markdown", "T").splitlines()
    assert markdown[0] == "## T" and markdown[2] == "2 crashes: 1 fail, 1 pass."
    moment = "key, 5 busy loops in dom0, a domU on every CPU, after 0.50 s"
    assert markdown[-1] == f"| 4.17 | 7.2 | debian | xapic | {moment} | 4.17.0 | CPU 2 | fail | 31 | why \\| so |"
    assert render(outcomes, "table", "T").splitlines()[-1] == "2 crashes: 1 fail, 1 pass"
    assert json.loads(render(outcomes, "json", "T"))["cells"] == outcomes
    junit = ET.fromstring(render(outcomes, "junit", "T"))
    assert [len(case) for case in junit.iter("testcase")] == [0, 1]
    page = parsed(render(outcomes, "html", "T"))
    assert page.all("title")[0].text() == "T" and "2 crashes: 1 fail, 1 pass" in page.text()
    rows = [[cell.text() for cell in row.all("td")] for row in page.all("tbody")[0].all("tr")]
    assert [(row[4], row[7], row[9]) for row in rows] == [
        ("panic on CPU 2", "pass", ""), (moment, "\u2717 fail", "why | so"),
    ]  # fmt: skip


CELL = Cell("one", "4.17", "7.2", "debian", "xapic", how="panic", cpu=2)


@pytest.mark.parametrize(("error", "gone"), [(PackageGone("no more"), True), (LabError("no network"), False)])
def test_what_cannot_be_got_is_a_skip(
    error: LabError, gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(cell: Cell) -> str:
        raise error

    monkeypatch.setattr(crashes, "_get", nothing)
    found = crash(CELL, tmp_path)
    assert (found["verdict"], found["reason"], found["gone"]) == ("skip", str(error), gone)


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"generation": "4.17.0"}, 0, ""),
        ({"generation": "4.21.0"}, 3, "xencrash: the crash path should be generation 4.17.0, and is 4.21.0\n"),
        ({"mode": "x2apic"}, 3, "xencrash: the local APICs were to be in xapic mode, not x2apic\n"),
        ({"mode": "x2apic", "lapic": None}, 0, ""),  # nothing was asked
        ({"cpu": 1}, 3, "xencrash: CPU 2 was to crash, not 1\n"),
        ({"generation": "4.3.0", "guest": "4.3.0", "cpu": 0, "mode": "x2apic"}, 0, ""),
        ({"generation": "4.17.0", "guest": "4.3.0"}, 3,
         "xencrash: the crash path should be generation 4.3.0, and is 4.17.0\n"),
    ],
)  # fmt: skip
def test_a_run_is_of_what_it_was_asked_for(
    given: Json, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guest, lapic = given.pop("guest", None), given.pop("lapic", "xapic")
    machine = {"guest": guest} if guest else {"xen": "4.17", "dom0_vcpus": 4}
    wanted = Specification(**machine, lapic=lapic, crash=Crash(cpu=2))
    assert run.as_asked(wanted, [report(**given)] * 2) == status
    assert capsys.readouterr().err == said


def report(verdict: str = "pass", cpu: int = 2, mode: str = "xapic", generation: str | None = "4.17.0") -> Json:
    finding = {"check": "lapic-mode", "stage": "normal", "cpu": 1, "verdict": verdict, "observed": mode}
    identified = generation and {"id": generation}
    return {"verdict": verdict, "crashing_cpu": cpu, "generation": identified, "findings": [finding]}


@pytest.mark.parametrize(
    ("reports", "verdict", "reason"),
    [
        ([report(), report()], "pass", ""),
        ([report(), report("fail")], "fail", "fail: lapic-mode on CPU 1 at normal"),
        ([report(cpu=1), report(cpu=1)], "unknown", "CPU 2 was to crash, not 1"),
        ([report(), report(cpu=1)], "unknown", "CPU 2 was to crash, not 1 and 2"),
        ([report(generation="4.21.0")] * 2, "unknown", "the crash path should be generation 4.17.0, and is 4.21.0"),
        ([report(), report(generation="4.21.0")], "unknown",
         "the crash path should be generation 4.17.0, and is 4.17.0 and 4.21.0"),
        ([report(generation=None)], "unknown", "the crash path should be generation 4.17.0, and is not identified"),
        ([report(mode="x2apic")], "unknown", "the local APICs were to be in xapic mode, not x2apic"),
        ([report(), LabError("no vmcore")], "unknown", "no vmcore"),
        ([report("fail"), LabError("no vmcore")], "fail", "fail: lapic-mode on CPU 1 at normal"),
        ([LabError("does not boot")], "unknown", "does not boot"),
    ],
)
def test_the_worst_counts(
    reports: list[Any], verdict: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(*_: object) -> Any:
        for item in itertools.chain(reports):
            if isinstance(item, LabError):
                raise item
            yield item

    monkeypatch.setattr(crashes, "_get", lambda cell: "gdb")
    monkeypatch.setattr(crashes, "_reports", given)
    (tmp_path / "vmcore").touch()
    found = crash(CELL, tmp_path)
    assert (found["verdict"], found["reason"]) == (verdict, reason)
    assert (tmp_path / "vmcore").exists() is (verdict != "pass")


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a full disk for a crash's report; the crash itself is made up."""

    @contextlib.contextmanager
    def machine(*_: object, **__: object) -> Iterator[Any]:
        dom0 = argparse.Namespace(load=lambda loops: None)
        yield argparse.Namespace(gdb_socket="", symbols="", qmp_socket="", dom0=dom0, prepare=lambda how, cpu: None,
                                 accel_row=ACCELS["tcg"])  # fmt: skip

    monkeypatch.setattr(judged, "machine", machine)
    monkeypatch.setattr(judged, "trace", lambda *_, **__: report())
    monkeypatch.setattr(crashes, "_get", lambda cell: "gdb")
    (tmp_path / "trace.json").symlink_to("/dev/full")
    return tmp_path


def test_a_full_disk_is_an_undecided_cell(full: Path) -> None:
    found = crash(CELL, full)
    assert (found["verdict"], found["reason"]) == ("unknown", f"running the lab: {full}: No space left on device")


def test_a_full_disk_is_an_undecided_run(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "run", "--output", str(full)]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == f"xencrash: running the lab: {full}: No space left on device"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_a_step_that_is_ended_cleans_up(
    sign: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def step(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), sign)
            raise AssertionError("it went on")
        finally:
            os.kill(os.getpid(), sign)  # a second request does no harm
            cleaned.append(args.cpus)

    monkeypatch.setattr(run, "run", step)
    before = signal.signal(sign, signal.SIG_DFL)  # the tests may run under nohup(1)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["lab", "run"])
        assert signal.getsignal(sign) is signal.SIG_DFL
    finally:
        signal.signal(sign, before)
    assert (ended.value.code, cleaned) == (128 + sign, [4])
    assert capsys.readouterr().err == f"xencrash: ended by {sign.name}\n"


def test_what_nohup_ignores_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(args: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(run, "run", step)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["lab", "run"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("undecided", "last", "check", "verdict", "followed"),
    [
        (None, "after-handover", "trace-complete", "pass", True),
        (None, "after-handover", "nmi-gate-ist", "fail", True),
        (None, "handover", "trace-complete", "unknown", True),  # a stage for which no breakpoint was left
        ("gdb ended", "after-handover", "nmi-gate-ist", "pass", True),
        ("gdb ended", "handover", "nmi-gate-ist", "pass", False),
        (None, "crashing", "trace-complete", "fail", False),  # it died, and the report is decided
    ],
)
def test_a_vmcore_is_waited_for_where_a_crash_kernel_starts(
    undecided: str | None, last: str, check: str, verdict: str, followed: bool
) -> None:
    report: Any = {"findings": [{"check": check, "verdict": verdict}], "stages": [{"stage": last}]}
    assert judged.was_followed(report | ({"undecided": undecided} if undecided else {})) is followed
