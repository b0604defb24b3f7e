"""`xencrash check` over several dumps: a line and a report for each, one valid document, the worst status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.machines.changed import Machine
from tests.machines.recorded import write_files
from xen_symbols.report.model import Report
from xencrash import judging, several
from xencrash.cli import main
from xencrash.options import Request


class Dumps:
    """Files that pass, fail, are not dumps, or do not exist."""

    def __init__(self, folder: Path) -> None:
        machine = Machine("4.17-crashed-vmcore")
        good, symbols = write_files(folder / "good", machine.target, machine.symbols)
        machine.gate(2, 18, 4, b"\x01")
        bad, _ = write_files(folder / "bad", machine.target, machine.symbols)
        text, none = folder / "text", folder / "none"
        text.write_text("no dump")
        self.good, self.bad, self.text, self.none = (str(path) for path in (good, bad, text, none))
        self.symbols = str(symbols)

    def check(self, *words: str) -> int:
        return main(["check", *words, "--symbols", self.symbols])


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Dumps:
    return Dumps(tmp_path_factory.mktemp("dumps"))


def test_a_line_for_each(dumps: Dumps, capsys: pytest.CaptureFixture[str]) -> None:
    assert dumps.check(dumps.good, dumps.bad, dumps.none) == 1
    said = capsys.readouterr()
    lines = [re.split("  +", line.strip(), maxsplit=4) for line in said.out.splitlines()[4:7]]
    path = "as in Xen 4.17 - 4.20 (e7f147bf4a)"
    assert lines[0] == ["pass", dumps.good, path, "0"]
    assert lines[1] == ["fail", dumps.bad, path, "0", "fail: mc-gate-ist on CPU 2 at crashed"]
    assert lines[2] == ["unknown", dumps.none, "-", "-", "No such file or directory"]
    assert said.err == f"xencrash: {dumps.none}: No such file or directory\n"


def test_an_internal_error_in_one_leaves_the_others(
    dumps: Dumps, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(asked: Request) -> Report:
        if asked.target == dumps.text:
            raise TypeError("planted")
        return judging.judge_dump(asked)

    monkeypatch.setattr(several, "judge_dump", broken)
    assert dumps.check(dumps.good, dumps.text, dumps.bad) == 1
    said = capfd.readouterr()
    lines = [line.split(maxsplit=4) for line in said.out.splitlines()[4:7]]
    assert [line[:2] for line in lines] == [["pass", dumps.good], ["unknown", dumps.text], ["fail", dumps.bad]]
    why = "internal error (traceback above); no verdict"
    assert lines[1][4] == why
    assert said.err.endswith(f"TypeError: planted\nxencrash: {dumps.text}: {why}\n")
    assert dumps.check(dumps.text, dumps.good) == 3


def test_the_worst_status(dumps: Dumps) -> None:
    assert dumps.check(dumps.good, dumps.good) == 0
    assert dumps.check(dumps.good, dumps.none) == 3
    assert dumps.check(dumps.none, dumps.bad) == dumps.check(dumps.bad, dumps.text, dumps.good) == 1


def test_json_is_one_list(dumps: Dumps, capsys: pytest.CaptureFixture[str]) -> None:
    dumps.check(dumps.good, dumps.bad, dumps.text, "--format", "json")
    reports = json.loads(capsys.readouterr().out)
    assert [report["verdict"] for report in reports] == ["pass", "fail", "unknown"]
    assert [report["target"]["location"] for report in reports] == [dumps.good, dumps.bad, dumps.text]
    dumps.check(dumps.good, "--format", "json")
    assert json.loads(capsys.readouterr().out) == reports[0]


def test_junit_is_one_document(dumps: Dumps, capsys: pytest.CaptureFixture[str]) -> None:
    dumps.check(dumps.good, dumps.bad, dumps.text, "--format", "junit")
    root = ElementTree.fromstring(capsys.readouterr().out.encode())
    assert root.tag == "testsuites"
    assert [(suite.get("name"), suite.get("failures"), suite.get("errors")) for suite in root] == [
        (f"{dumps.good}: crashed", "0", "0"),
        (f"{dumps.bad}: crashed", "1", "0"),
        (f"{dumps.text}: xencrash", "0", "1"),
    ]
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(cases)) == len(cases)
    failed = [case.get("classname") for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed == [f"{dumps.bad}: crashed.cpu2"]


def test_each_has_a_report_even_if_two_share_a_name(
    dumps: Dumps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "reports"
    assert dumps.check(dumps.good, dumps.bad, dumps.none, "--format", "json", "--output", str(folder)) == 1
    assert capsys.readouterr().out.splitlines()[1] == "Dumps"
    written = {path.name: json.loads(path.read_text())["verdict"] for path in folder.iterdir()}
    assert written == {"0-vmcore.json": "pass", "1-vmcore.json": "fail", "2-none.json": "unknown"}
    dumps.check(dumps.good, dumps.bad, "--format", "junit", "--output", str(folder))
    assert ElementTree.parse(folder / "1-vmcore.xml").getroot().find("testsuite").get("name") == "crashed"  # type: ignore[union-attr]


def test_usage(dumps: Dumps, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert dumps.check(dumps.good, dumps.bad, "--output", str(tmp_path / "file")) == 2
    assert capsys.readouterr().err.endswith("/file: File exists; several dumps need a directory\n")
    assert dumps.check(dumps.good, "gdb:localhost:1") == 2
    assert capsys.readouterr().err == "xencrash: gdb:localhost:1 is a live machine: check it by itself\n"


@pytest.mark.parametrize("base", ["zz", "-1", "0x10000000000000", "1.5"])
def test_a_base_that_is_not_an_address(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "ram", f"--base={base}"])
    assert caught.value.code == 2
    assert f"argument --base: '{base}' is not a physical address, such as 0x100000" in capsys.readouterr().err


def test_the_help_says_which_status_wins(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 if a check failed in any of them, else 3 if any could not be decided or opened" in said
