"""The report of a storm: its schema, its tables, JUnit; and the budget of a run, with fake machines."""

from __future__ import annotations

import contextlib
import json
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest

import xencrash.lab.storm
from tests.machines.changed import Machine
from tests.machines.pages import parsed
from xen_symbols.report.console import plain
from xen_symbols.report.junit import to_junit
from xencrash.cli import main
from xencrash.lab.commands.storm import _again, add_options, problem, status
from xencrash.lab.errors import LabError
from xencrash.lab.storm.begin import Scenery
from xencrash.lab.storm.experiment import Action, Experiment, Place, event
from xencrash.lab.storm.judge import PASSED, Outcome, Verdict
from xencrash.lab.storm.record import Recording, Step
from xencrash.lab.storm.report import to_json, verdict_of
from xencrash.lab.storm.run import Budget, Result, Storm
from xencrash.lab.storm.scene import Scene
from xencrash.lab.storm.shown import as_findings, blocks, page

MACHINE = Machine("4.17-handover")
SYMBOLS = MACHINE.symbols
CRASH, NMI_CRASH = (SYMBOLS.address(name, "tT") for name in ("kexec_crash", "do_nmi_crash"))
ABOUT = {"machine": "Xen 4.17", "qemu": "7.2", "seed": 7, "seconds": 12.5, "interrupted": False,
         "replay": "xencrash lab storm --xen 4.17 --qemu 7.2 --cpus 2 --replay"}  # fmt: skip
SCHEMA = json.loads((Path(xencrash.lab.storm.__file__).parent / "schema.json").read_text())


def scene() -> Scene:
    from xen_symbols.crashpath.identification import identify

    return Scene(
        symbols=SYMBOLS, memory_root=0, found_by="", build_id=b"", identification=identify(MACHINE.memory), crashing=0,
        apic_ids=(0, 1), begins=CRASH, send=0, handover=0, ends={}, own_handlers={}, notes={}, kernel_sign=b"",
    )  # fmt: skip


def recording() -> Recording:
    steps = [Step(Place(0, CRASH)), Step(Place(0, CRASH + 4)), Step(Place(0, CRASH + 4, 2)), Step(Place(1, NMI_CRASH))]
    return Recording(steps, texts={CRASH: "push rbx"})


def scenery(snapshot: Any = None) -> Scenery:
    return Scenery(snapshot, scene(), recording())


def result(number: int, verdict: Verdict, what: str = "", action: Action = Action.NMI, **more: Any) -> Result:
    experiment = Experiment((event(action, Place(0, CRASH + 4 * number)),), "injection")
    outcome = PASSED if verdict is Verdict.PASS else Outcome(verdict, what, f"{what} happened")
    return Result(number, experiment, f"nmi@0:kexec_crash+{4 * number:#x}", outcome, 0.25, **more)


RESULTS = [
    result(0, Verdict.PASS),
    result(1, Verdict.FAIL, "hang", exact=False, shrunk="nmi@0:kexec_crash+0x0", unfired=1),
    result(1, Verdict.WINDOW, "own-mc-handler", Action.MC),
]


def report(results: list[Result] | None = None) -> dict[str, Any]:
    made = to_json(RESULTS if results is None else results, scenery(), ABOUT, 10)
    jsonschema.validate(made, SCHEMA)
    return made


def test_the_report_is_what_its_schema_says() -> None:
    made = report()
    assert made["counts"] == {"pass": 1, "window": 1, "undecided": 0, "fail": 1}
    assert made["verdict"] == "fail"
    first, other = made["functions"]
    assert (first["function"], first["role"]) == ("kexec_crash", "crashing")
    assert (first["instructions"], first["touched"]) == (2, 2)
    assert first["experiments"] == {"nmi": 2, "mc": 1}
    assert first["lines"] == [
        {"at": "kexec_crash+0x0", "text": "push rbx", "outcomes": {"nmi": "pass"}},
        {"at": "kexec_crash+0x4", "text": None, "outcomes": {"nmi": "fail", "mc": "window"}},
    ]
    assert (other["function"], other["role"], other["touched"]) == ("do_nmi_crash", "other", 0)
    assert made["windows"] == [
        {"event": "mc", "on": "crashing", "why": "own-mc-handler", "instructions": 1, "functions": {"kexec_crash": 1}}
    ]


def test_what_happened_to_another_cpu_is_not_an_outcome_of_the_instruction() -> None:
    lost = result(1, Verdict.WINDOW, "unreachable")
    other = Experiment((event(Action.MC, Place(0, CRASH + 4), 1),), "injection")
    made = report([lost, Result(2, other, "mc>1@0:kexec_crash+0x4", PASSED, 0.1)])
    assert made["functions"][0]["lines"][1]["outcomes"] == {"nmi": "window"}
    assert made["functions"][0]["experiments"] == {"nmi": 1, "mc": 1}


def test_an_empty_run_does_not_pass() -> None:
    assert report([])["verdict"] == "undecided"


def test_windows_are_not_failures() -> None:
    assert verdict_of([result(0, Verdict.PASS), result(1, Verdict.WINDOW)]) is Verdict.PASS
    assert verdict_of([result(0, Verdict.UNDECIDED), result(1, Verdict.WINDOW)]) is Verdict.UNDECIDED


def test_the_table_says_what_failed_and_how_to_do_it_again() -> None:
    text = plain(blocks(report(), ["kexec_crash"]))
    assert "3 of 10 in 12 s, seed 7" in text
    assert "not reached the place of an event, in 1 of them" in text
    line = next(line for line in text.splitlines() if line.startswith("nmi@0:kexec_crash+0x4"))
    assert "hang" in line and "different outcome" in line and "enough: nmi@0:kexec_crash+0x0" in line
    picture = text[text.index("kexec_crash, on the crashing CPU") :].splitlines()
    assert picture[3].split() == ["kexec_crash+0x0", ".", "push", "rbx"]
    assert picture[4].split() == ["kexec_crash+0x4", "F", "w"]


def test_the_page_has_each_failure_with_its_command_and_each_function_to_unfold() -> None:
    made = report()
    text = "".join(page(made))
    assert text.index("<h2>Failures</h2>") < text.index("<h2>Windows") < text.index("<h2>What was executed")
    row = next(line for line in text.splitlines() if "different outcome" in line)
    assert "xencrash lab storm --xen 4.17 --qemu 7.2 --cpus 2 --replay nmi@0:kexec_crash+0x4" in row
    crashing, other = text.split("<details>")[1:]
    assert crashing.startswith("<summary>kexec_crash, on the crashing CPU, 1 pass, 1 fail, 1 window")
    assert ">push rbx</td>" in crashing and "do_nmi_crash" in other


def test_the_page_marks_only_where_something_failed() -> None:
    root = parsed("".join(page(report([result(0, Verdict.PASS)]))))
    assert root.all("span", class_="pass") and "\u2717" not in root.text()


def test_a_command_to_repeat_is_safe_in_a_shell() -> None:
    made = report()
    made["experiments"][1]["id"] = "nmi>1@0:kexec_crash"
    assert "--replay &#x27;nmi&gt;1@0:kexec_crash&#x27;" in "".join(page(made))


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ([], "--qemu 7.2 --cpus 4"),
        (["--guest", "4.17.0", "--fault", "trap-nop-stays", "--seed", "3"],
         "--guest 4.17.0 --fault trap-nop-stays --qemu 7.2 --cpus 4"),
        (["--xen-image", "my xen.gz", "--cpus", "2", "--minutes", "1"],
         "--xen-image 'my xen.gz' --qemu 7.2 --cpus 2"),
    ],
    ids=["default", "guest", "own"],
)  # fmt: skip
def test_the_command_names_the_machine_and_nothing_of_the_run(given: list[str], command: str) -> None:
    parser = ArgumentParser()
    add_options(parser)
    assert _again(parser.parse_args(given)) == f"xencrash lab storm {command} --replay"


@pytest.mark.parametrize(("format", "begins"), [("html", "<!DOCTYPE html>"), ("table", "machine"), ("junit", "<?xml")])
def test_render_writes_a_storm_in_each_format(tmp_path: Path, format: str, begins: str) -> None:
    file, out = tmp_path / "storm.json", tmp_path / "out"
    file.write_text(json.dumps(report()))
    assert main(["render", str(file), "--format", format, "--output", str(out)]) == 0
    assert out.read_text().startswith(begins)
    assert "nmi@0:kexec_crash+0x4" in out.read_text()


def test_render_refuses_a_damaged_storm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "storm.json"
    file.write_text(json.dumps({**report(), "functions": None}))
    assert main(["render", str(file)]) == 3
    assert "damaged, or not a report" in capsys.readouterr().err


def test_junit_has_a_case_for_each_experiment() -> None:
    root = ET.fromstring(to_junit(as_findings(report())).partition("\n")[2])
    (suite,) = root
    assert (suite.get("name"), suite.get("tests"), suite.get("failures"), suite.get("skipped")) == (
        "injection", "3", "1", "1",
    )  # fmt: skip


def test_a_replay_that_is_not_exact_says_why() -> None:
    (failed,) = [one for one in report()["experiments"] if one["verdict"] == "fail"]
    assert "clock" in failed["inexact_because"]


# -- a run ------------------------------------------------------------------------------------


class NoMachines:
    """A snapshot whose machines fail to start, each after a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    @contextlib.contextmanager
    def machine(self) -> Iterator[Any]:
        time.sleep(self.seconds)
        raise LabError("no QEMU")
        yield


def storm(budget: Budget, seconds: float = 0.0) -> Storm:
    return Storm(scenery(NoMachines(seconds)), budget, lambda text: None)


def plan(count: int) -> list[Experiment]:
    return [Experiment((event(Action.NMI, Place(0, CRASH + number)),)) for number in range(count)]


def test_what_the_lab_fails_to_do_is_undecided_and_the_run_goes_on() -> None:
    results = storm(Budget()).run(plan(5), 5)
    assert [each.number for each in results] == [0, 1, 2, 3, 4]
    assert {each.outcome for each in results} == {Outcome(Verdict.UNDECIDED, "lab", "no QEMU")}


def test_no_more_experiments_than_asked_for() -> None:
    assert len(storm(Budget(experiments=3)).run(plan(9), 9)) == 3


def test_when_time_is_up_what_was_done_is_kept() -> None:
    begun = time.monotonic()
    results = storm(Budget(seconds=0.5), 0.05).run(plan(1000), 1000)
    assert 0 < len(results) < 1000
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit], ids=["ctrl-c", "sigterm"])
def test_an_ended_run_keeps_what_was_done(ending: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    run = storm(Budget(), 0.02)
    pauses = iter(range(3))
    sleep = time.sleep

    def ended(seconds: float) -> None:
        sleep(seconds)
        if seconds == 0.1 and next(pauses, None) is None:
            raise ending

    monkeypatch.setattr("xencrash.lab.storm.run.time.sleep", ended)
    results = run.run(plan(1000), 1000)
    assert run.interrupted
    assert 0 < len(results) < 1000


class Ending:
    """Stands for run_one: each experiment fails, until one is ended."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, scenery: Scenery, number: int, experiment: Experiment, *rest: Any) -> Result:
        if not self.left:
            raise SystemExit
        self.left -= 1
        return result(number, Verdict.FAIL, "hang")


def test_an_ended_repetition_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xencrash.lab.storm.run.run_one", Ending(3))
    run = storm(Budget())
    run.repeat(Experiment(), 20)
    assert run.interrupted
    assert [(each.number, each.exact) for each in run.results] == [(0, True), (1, True), (2, True)]


def test_a_run_ended_while_it_looks_again_keeps_its_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xencrash.lab.storm.run.run_one", Ending(1))
    run = storm(Budget())
    run.results = [result(0, Verdict.FAIL, "hang"), result(0, Verdict.FAIL, "hang")]
    run.look_again()
    assert run.interrupted
    assert [each.exact for each in run.results] == [True, None]


def test_progress_says_what_is_left() -> None:
    run = storm(Budget(seconds=100.0))
    run.results = [result(number, Verdict.PASS) for number in range(10)]
    assert run._state(run._begun + 5, 40) == "10 of 40 experiments, 2.0 a second, 15 s left, 0 failed"
    assert run._state(run._begun + 5, None) == "10 experiments, 2.0 a second, 95 s left, 0 failed"


def test_the_exit_status_is_the_worst_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    assert status([result(0, Verdict.PASS), result(1, Verdict.WINDOW)]) == 0
    assert status([]) == 3
    assert status([result(0, Verdict.UNDECIDED, "lab")]) == 3
    assert status(RESULTS) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "xencrash: storm: 1 of 3 fail; first: nmi@0:kexec_crash+0x4: hang happened"
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--repeat", "3"], "give one"),
        (["--stop-at", "0"], "give one"),
        (["--replay", "none", "--stop-at", "1", "--repeat", "2"], "leave --repeat out"),
        (["--replay", "none", "--stop-at", "-1"], "counted from 0"),
        (["--minutes", "0"], "above 0"),
        (["--replay", "none", "--repeat", "2"], None),
    ],
)
def test_options_that_do_not_go_together(given: list[str], why: str | None) -> None:
    parser = ArgumentParser()
    add_options(parser)
    said = problem(parser.parse_args(given))
    assert (said is None) if why is None else why in (said or "")
