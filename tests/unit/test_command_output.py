"""A command's output: in any encoding, with any file name, and never an earlier run's report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from tests.machines.changed import Machine
from tests.machines.recorded import write_files
from tests.schema import SCHEMA
from xen_symbols.crashpath.engine import TOOL
from xen_symbols.report.model import Report
from xencrash import judging, several
from xencrash import trace as following
from xencrash.cli import main
from xencrash.gdbprogram import find_gdb, gdb_arguments, plugin_script
from xencrash.lab import judged, progress
from xencrash.lab.commands.status import show

COMMAND = (sys.executable, "-c", "import sys; from xencrash.cli import main; sys.exit(main())")
UNKNOWN_SYMBOLS: Any = {"path": None, "build_id": None, "match": None}
TEXT = "no dump, \N{SNOWMAN}"  # a file's name


class Files:
    """A vmcore of which a check fails, and its symbols, in a folder whose name few encodings have."""

    def __init__(self, folder: Path) -> None:
        machine = Machine("4.17-crashed-vmcore")
        good, symbols = write_files(folder / "good", machine.target, machine.symbols)
        machine.gate(2, 18, 4, b"\x01")
        bad, _ = write_files(folder / f"{TEXT}, \N{LATIN SMALL LETTER E WITH ACUTE}", machine.target, machine.symbols)
        self.good, self.bad, self.symbols = str(good), str(bad), str(symbols)
        self.text = str(folder / TEXT)
        Path(self.text).write_text("no dump")

    def words(self, *dumps: str) -> list[str]:
        return ["check", *dumps, "--symbols", self.symbols]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *words], capture_output=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize("encoding", ["ascii", "ISO-8859-1", "utf-8"])
@pytest.mark.parametrize("format", ["table", "json", "junit"])
def test_what_an_encoding_lacks_is_replaced_and_the_status_kept(encoding: str, format: str, files: Files) -> None:
    done = run(*files.words(files.bad), "--format", format, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (1, b"")
    if format == "table":
        name = files.bad.encode(encoding, "backslashreplace")
        assert done.stdout.startswith(b"target      " + name + b" (")
    elif format == "json":
        assert json.loads(done.stdout)["target"]["location"] == files.bad
    else:
        assert ElementTree.fromstring(done.stdout).tag == "testsuites"  # UTF-8 whatever the declaration says


def test_junit_of_several_is_well_formed_in_any_encoding(files: Files) -> None:
    done = run(*files.words(files.bad, files.text), "--format", "junit", PYTHONIOENCODING="ISO-8859-1")
    assert done.returncode == 1
    names = [suite.get("name") for suite in ElementTree.fromstring(done.stdout)]
    assert names == [f"{files.bad}: crashed", f"{files.text}: xencrash"]


@pytest.mark.parametrize("words", [["info"], ["check"]])
def test_a_name_that_is_not_utf_8(words: list[str], tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xe9"
    Path(os.fsdecode(name)).write_bytes(b"no dump")
    for output in ([], ["--output", str(tmp_path / "report")]):
        done = subprocess.run([*COMMAND, *words, name, *output], capture_output=True, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith(b"xencrash: " + os.fsencode(tmp_path) + b"/\\udcff\\udce9: not a dump")
        assert done.stderr.count(b"\n") == 1


def test_an_escape_character_in_a_name_reaches_no_terminal(tmp_path: Path, files: Files) -> None:
    folder = tmp_path / "a\x1b[31mb\nc"
    machine = Machine("4.17-crashed-vmcore")
    vmcore, symbols = write_files(folder, machine.target, machine.symbols)
    for words in (["check", str(vmcore)], ["info", str(vmcore)], ["check", str(vmcore), files.text]):
        done = run(*words, "--symbols", str(symbols))
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"/a\\x1b[31mb\\nc/vmcore" in done.stdout


def test_nor_does_what_was_typed(tmp_path: Path) -> None:
    for words in (["\x1b[31m"], ["check", "x", "--\x1b[31m"], ["lab", "up", "--xen", "\x1b[31m"]):
        done = run(*words)
        assert (done.returncode, b"\x1b" in done.stderr, b"\\x1b[31m" in done.stderr) == (2, False, True)
    setting, command = f"set xen symbols {tmp_path}/\x1b[31m", "xen symbols"
    gdb = [find_gdb(), *gdb_arguments(), "-batch", "-ex", f"source {plugin_script()}"]
    said = subprocess.run([*gdb, "-ex", setting, "-ex", command], capture_output=True, check=False)
    assert b"\x1b" not in said.stdout + said.stderr and b"\\x1b[31m: No such file" in said.stderr


def test_nor_what_a_machines_folder_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    show({"run_dir": "/tmp/\x1b[31m", "cpus": 4})
    assert capsys.readouterr().out == "run_dir  /tmp/\\x1b[31m\ncpus     4\n\n"
    progress.on_stderr()("starting (/tmp/\x1b[31m)")
    assert capsys.readouterr().err.endswith("  starting (/tmp/\\x1b[31m)\n")


# -- The last run's report is not this one's --------------------------------------------------


def test_what_cannot_be_opened_has_a_report_that_says_why(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    why = f"{files.text}: not a dump of a known format; a raw image of memory needs its first byte's address (--base)"
    assert main(["check", files.text, "--format", "json"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    jsonschema.validate(report, SCHEMA)
    assert (report["verdict"], report["undecided"], report["findings"]) == ("unknown", why, [])
    assert (report["target"]["kind"], report["target"]["location"]) == ("dump", files.text)
    assert err == f"xencrash: {why}\n"

    assert main(["check", files.text, "--format", "junit"]) == 3
    error = ElementTree.fromstring(capsys.readouterr().out.encode()).find("testsuite/testcase/error")
    assert error is not None and error.get("message") == why

    assert main(["check", files.text]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"target      {files.text} (unknown)", "UNKNOWN  nothing was judged", f"not decided: {why}"]


def test_a_machine_that_is_not_there_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"gdb:{tmp_path}/none"
    for command in ("check", "trace"):
        assert main([command, target, "--format", "json"]) == 3
        report = json.loads(capsys.readouterr().out)
        jsonschema.validate(report, SCHEMA)
        assert report["target"] == {"kind": "live", "format": "unknown", "location": target}
        assert report["undecided"].startswith(f"nothing to attach to at {target}")
    assert main(["info", target, "--format", "json"]) == 3
    assert json.loads(capsys.readouterr().out)["undecided"].startswith(f"nothing to attach to at {target}")


@pytest.mark.parametrize("format", ["table", "json", "junit"])
def test_an_earlier_report_does_not_survive(format: str, files: Files, tmp_path: Path) -> None:
    report = tmp_path / "report"
    words = ["--format", format, "--output", str(report)]
    assert main([*files.words(files.good), *words]) == 0
    green = report.read_text()
    assert main([*files.words(files.text), *words]) == 3
    assert "not a dump of a known format" in report.read_text() != green


def test_an_earlier_report_of_info_does_not_survive(files: Files, tmp_path: Path) -> None:
    report = tmp_path / "report"
    for dump, held in ((files.good, "crash_notes"), (files.text, "undecided")):
        main(["info", dump, "--symbols", files.symbols, "--format", "json", "--output", str(report)])
        assert held in json.loads(report.read_text())


def test_nor_where_the_run_is_ended(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    report = tmp_path / "report"
    report.write_text("green")
    monkeypatch.setattr(judging, "judge_dump", ended)
    assert main([*files.words(files.good), "--output", str(report)]) == 130
    assert report.read_text() == ""


def test_nor_what_a_run_of_the_lab_left(tmp_path: Path) -> None:
    for name in ("trace.json", "trace.xml", "trace.html", "check.json", "check.html", "vmcore", "notes"):
        (tmp_path / name).write_text("green")
    judged.folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]  # which is not the lab's


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupted_trace_leaves_what_it_saw(begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of one that had seen nothing."""

    class Session(contextlib.AbstractContextManager["Session"]):
        def __exit__(self, *_: object) -> None:
            pass

        def xen(self, name: str, *_: str) -> Any:
            if not begun:
                raise KeyboardInterrupt
            report = Report(TOOL, {"kind": "live", "format": "QEMU gdbstub", "location": "gdb:/s"}, UNKNOWN_SYMBOLS)
            return {"report": report.to_json(), "early": [], "unseen": None, "breakpoints": ["0x10"], "wait": None}

        def set_breakpoints(self, _: object) -> None:
            pass

        def run(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(following, "open_session", lambda *_, **__: Session())
    report = tmp_path / "report"
    report.write_text("green")
    assert main(["trace", "gdb:/s", "--format", "json", "--output", str(report)]) == 130
    if begun:
        found = json.loads(report.read_text())
        jsonschema.validate(found, SCHEMA)
        assert found["verdict"] == "unknown"
        assert found["undecided"] == "interrupted before the crash path came to its end"
    else:
        assert report.read_text() == ""


def test_what_is_read_is_not_written_to(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "link"
    link.symlink_to(files.text)
    for words in (["x", "--symbols", str(link), "--output", files.text], [files.text, "--output", str(link)]):
        assert main(["check", *words]) == 2
        assert capsys.readouterr().err.endswith("would overwrite the input: give another file\n")
    assert Path(files.text).read_text() == "no dump"


# -- Several ----------------------------------------------------------------------------------


def test_the_names_of_reports_sort(files: Files, tmp_path: Path) -> None:
    assert main([*files.words(*[files.text] * 11), "--format", "json", "--output", str(tmp_path / "all")]) == 3
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"{number:02}-{TEXT}.json" for number in range(11)]


def test_reports_of_an_earlier_run_of_several_go(files: Files, tmp_path: Path) -> None:
    (tmp_path / "7-old.json").write_text("green")
    (tmp_path / "07-old.txt").write_text("green")
    (tmp_path / "7 things.json").write_text("not ours")
    assert main([*files.words(files.good, files.bad), "--format", "junit", "--output", str(tmp_path)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-vmcore.xml", "1-vmcore.xml", "7 things.json"]


def test_one_process_for_each_cpu(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each waits until another one runs: if run in turn they would never end."""

    def together(asked: object) -> object:
        (tmp_path / str(os.getpid())).touch()
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return judging.judge_dump(asked)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(several, "judge_dump", together)
    assert main([*files.words(files.good, files.bad), "--format", "json"]) == 1
    assert [report["verdict"] for report in json.loads(capsys.readouterr().out)] == ["pass", "fail"]


def test_one_that_is_killed_leaves_the_others(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(asked: object) -> object:
        if asked.target == files.text:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        return judging.judge_dump(asked)  # type: ignore[arg-type]

    monkeypatch.setattr(several, "judge_dump", killed)
    assert main([*files.words(files.good, files.text), "--format", "json"]) == 3
    reports = json.loads(capsys.readouterr().out)
    why = f"{files.text}: the process that judged it was killed (SIGKILL); check it by itself"
    assert [report.get("undecided") for report in reports] == [None, why]


def test_ctrl_c_keeps_what_was_judged(files: Files, tmp_path: Path) -> None:
    """Of three, on two CPUs, the second never ends: when the third has started, the first is done."""
    begun = tmp_path / "begun"
    code = (
        "import os, pathlib, sys, time; from xencrash import judging, several; from xencrash.cli import main\n"
        "def judge(asked, real=judging.judge_dump):\n"
        "    if asked.target == 'good': return real(asked._replace(target=os.environ['GOOD']))\n"
        "    if asked.target == 'third': pathlib.Path(os.environ['BEGUN']).touch()\n"
        "    time.sleep(600)\n"
        "os.sched_getaffinity = lambda _: {0, 1}; several.judge_dump = judge; sys.exit(main())"
    )
    folder = tmp_path / "reports"
    words = [sys.executable, "-c", code, *files.words("good", "second", "third"), "--format", "json"]
    for output in ([], ["--output", str(folder)]):
        with subprocess.Popen(
            [*words, *output], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "GOOD": files.good, "BEGUN": str(begun)},
        ) as process:  # fmt: skip
            deadline = time.monotonic() + 60
            while not begun.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            begun.unlink()
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "xencrash: interrupted\n")
        if not output:
            assert [report["verdict"] for report in json.loads(out)] == ["pass"]
    assert [line.split()[0] for line in out.splitlines()[4:] if line] == ["pass"]
    assert json.loads((folder / "0-good.json").read_text())["verdict"] == "pass"
