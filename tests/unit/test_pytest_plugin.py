"""The pytest plugin as a user's pytest loads it, by its entry point; without a machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines.elfwriter import START, Sym, build_id_note, function, sections, xen_syms
from xencrash.lab.crash import WAYS

IMAGE = b"\x7fELF\1\1\1".ljust(16, b"\0") + bytes(112) + (0x1BADB002).to_bytes(4, "little") + build_id_note()
NOTHING = """
import sys

def test_nothing_of_the_lab_is_imported():
    assert [name for name in sys.modules if name.startswith(("xencrash.lab", "xen_symbols.sym"))] == []
"""
CRASHES = "def test_crashes(xen_trace): assert xen_trace.verdict == 'pass', xen_trace.why\n"


def run(folder: Path, *words: str | Path, test: str = CRASHES) -> subprocess.CompletedProcess[str]:
    """pytest in a folder of its own, with one test."""
    (folder / "test_one.py").write_text(test)
    ours = ("-q", "-p", "no:cacheprovider", "--rootdir", folder)
    command = [sys.executable, "-m", "pytest", *ours, *words, "test_one.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_it_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    done = run(tmp_path, test=NOTHING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_options_have_their_section_of_the_help(tmp_path: Path) -> None:
    text = run(tmp_path, "--help").stdout
    section = text.partition("a Xen to test (fixtures xen_machine, xen_trace, xen_dump):")[2].partition("\n\n")[0]
    for option in ("--xen-image=FILE", "--xen-syms=FILE", "--xen-qemu=ROW", "--xen-cpus=N", "--xen-output=DIR"):
        assert option in section
    assert "xen_crash(how=None, cpu=None)" in run(tmp_path, "--markers").stdout


def test_a_test_of_xen_without_an_image_fails_and_says_what_to_give(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "a test of Xen needs an image: give --xen-image FILE\n" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--xen-syms", "xen-syms"], "--xen-syms is for --xen-image: give the image too"),
        (["--xen-image", "absent"], "--xen-image {folder}/absent: No such file"),
        (["--xen-image", "xen", "--xen-syms", "other"], "--xen-syms {folder}/other: they are of another build"),
        (["--xen-image", "xen", "--xen-qemu", "1.0"], "--xen-qemu is one of 7.2, 10.0, sid"),
    ],
    ids=["no-image", "absent", "other", "qemu"],
)
def test_wrong_options_are_said_in_a_line_before_any_test(tmp_path: Path, words: list[str], why: str) -> None:
    symbols = [Sym("_start", START), function("kexec_crash", START + 0x100)]
    (tmp_path / "xen").write_bytes(IMAGE)
    (tmp_path / "xen-syms").write_bytes(xen_syms(symbols, sections(note=build_id_note())))
    (tmp_path / "other").write_bytes(xen_syms(symbols, sections(note=build_id_note(bytes(20)))))
    done = run(tmp_path, *words)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"ERROR: {why.format(folder=tmp_path)}")


def test_the_mark_takes_what_a_crash_has(tmp_path: Path) -> None:
    symbols = [Sym("_start", START), function("kexec_crash", START + 0x100)]
    (tmp_path / "xen").write_bytes(IMAGE)
    (tmp_path / "xen-syms").write_bytes(xen_syms(symbols, sections(note=build_id_note())))
    for mark, why in (
        ("'nmi'", "@pytest.mark.xen_crash takes how= and cpu=, nothing else"),
        ("how='stare'", f"--how is {' or '.join(WAYS)}, not 'stare'"),
    ):
        done = run(tmp_path, "--xen-image", "xen", test=f"import pytest\n@pytest.mark.xen_crash({mark})\n{CRASHES}")
        assert done.returncode == 1
        assert why in done.stdout and "Traceback" not in done.stdout
