"""Messages and exit status when the command's output or its input is not as it should be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from tests.machines.recorded import load, write_files
from xen_symbols.absence import Undecidable, Unreadable
from xencrash import judging
from xencrash.cli import main
from xencrash.gdbmi import open_session

NO_DUMP = "not a dump of a known format; a raw image of memory needs its first byte's address (--base)"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A vmcore and its symbols."""
    vmcore, symbols = write_files(tmp_path_factory.mktemp("dump"), *load("4.17-crashed-vmcore"))
    return str(vmcore), str(symbols)


def run(words: Sequence[str], stdout: IO[str] | int, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before}from xencrash.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


@pytest.mark.parametrize("format", ["table", "json", "junit"])
def test_output_that_cannot_be_written_is_not_a_failed_check(format: str, files: tuple[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(["check", files[0], "--symbols", files[1], "--format", format], full)
    assert (done.returncode, done.stderr) == (3, "xencrash: writing the output: No space left on device\n")


def test_a_short_output_that_cannot_be_written_is_reported_too() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(["lab", "guests"], full)
    assert (done.returncode, done.stderr) == (3, "xencrash: writing the output: No space left on device\n")


def test_a_reader_that_has_gone_is_not_a_failed_check(files: tuple[str, str]) -> None:
    words = ["check", files[0], "--symbols", files[1], "--format", "json"]
    code = "import sys; from xencrash.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        said = process.stderr.read()
    assert (process.returncode, said) == (3, "")


@pytest.mark.parametrize("format", ["table", "json"])
def test_with_its_output_closed_the_status_is_the_verdict(format: str, files: tuple[str, str]) -> None:
    words = ["check", files[0], "--symbols", files[1], "--format", format]
    done = run(words, subprocess.DEVNULL, before="sys.stdout = sys.stderr = None; ")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_internal_error_is_not_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("planted")

    monkeypatch.setattr(judging, "judge_dump", broken)
    assert main(["check", "vmcore"]) == 3
    assert capsys.readouterr().err.endswith(
        "TypeError: planted\nxencrash: vmcore: internal error (traceback above); no verdict\n"
    )


def test_what_cannot_be_read_is_not_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unread(*_: object) -> None:
        raise Unreadable("physical 0x1000 is not in the dump")

    monkeypatch.setattr(judging, "judge_dump", unread)
    assert main(["check", "vmcore"]) == 3
    assert capsys.readouterr().err == "xencrash: physical 0x1000 is not in the dump\n"


def test_missing_symbols_are_reported_before_gdb_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gdb", "gdb:localhost:1", "--symbols", "/nonexistent"]) == 3
    said = capsys.readouterr().err
    assert said == (
        "xencrash: /nonexistent: No such file or directory; "
        "--symbols takes xen-syms, xen.efi, the .map of either, or Xen's image\n"
    )


def test_the_gdbstub_as_qmp_socket_is_refused_before_it_is_connected_to(tmp_path: Path) -> None:
    stub = tmp_path / "gdb.sock"
    other = tmp_path / "link"
    other.symlink_to(stub)
    for qmp in (stub, other):
        with pytest.raises(Undecidable, match="is the gdbstub's socket: --qmp takes that of QEMU's option -qmp"):
            open_session(f"gdb:{stub}", qmp=str(qmp))


QMP = "--qmp is for a live machine, and vmcore is a dump: leave it out"
BASE = "--base is for a raw image of memory, and gdb:/s is a live machine: leave it out"
MISMATCH = "--allow-build-id-mismatch is for --symbols, and none are given: leave it out"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("check vmcore --qmp s", QMP),
        ("check other vmcore --qmp s", QMP.replace("vmcore", "other")),
        ("info vmcore --qmp s", QMP),
        ("gdb vmcore --qmp s", QMP),
        ("check gdb:/s --base 0", BASE),
        ("info gdb:/s --base 0", BASE),
        ("gdb gdb:/s --base 0", BASE),
        ("check vmcore --allow-build-id-mismatch", MISMATCH),
        ("info vmcore --allow-build-id-mismatch", MISMATCH),
        ("trace gdb:/s --allow-build-id-mismatch", MISMATCH),
        ("trace vmcore --qmp s", "vmcore is not a live machine: trace takes gdb:HOST:PORT or gdb:SOCKET; "
         "use check for a dump"),
    ],
)  # fmt: skip
def test_an_option_that_would_have_no_effect_is_refused(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr() == ("", f"xencrash: {said}\n")


def test_a_file_name_cannot_break_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("a\nb", "c")]
    for name in names:
        Path(name).write_bytes(b"nothing known")
    assert main(["check", names[0]]) == 3
    assert capsys.readouterr().err.splitlines() == [f"xencrash: {tmp_path}/a\\nb: {NO_DUMP}"]
    assert main(["check", *names]) == 3
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2
    assert [line.split()[:2] for line in out.splitlines()[-3:-1]] == [
        ["unknown", f"{tmp_path}/a\\nb"], ["unknown", f"{tmp_path}/c"],
    ]  # fmt: skip


def test_a_trace_takes_no_base(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trace", "gdb:/s", "--base", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("unrecognized arguments: --base 0\n")


def test_a_trace_that_cannot_begin_waits_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", f"gdb:{tmp_path}/none"]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"xencrash: nothing to attach to at gdb:{tmp_path}/none:") and said.count("\n") == 1


def test_gdb_may_be_given_symbols_of_another_build_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XENCRASH_GDB", "/nonexistent")  # as far as it gets here
    assert main(["gdb", "gdb:/s", "--allow-build-id-mismatch"]) == 3
    assert capsys.readouterr().err == "xencrash: /nonexistent was not found: install gdb, or name one in XENCRASH_GDB\n"


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_a_number_that_is_not_one(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lab", "run", f"--cpus={number}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"argument --cpus: {number!r} is not a number above 0\n")


@pytest.mark.parametrize("command", ["trace", "check", "preflight", "gdb", "info", "log"])
def test_help_fits_a_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert ("gdb's own" in said) is (command == "gdb")
    assert ("every check passed" in said) is (command in ("trace", "check", "preflight"))
    assert ("TARGET is a dump's path, or" in said, "--base" in said) == ((command != "trace",) * 2)
