"""A crash path that no generation fits, on a machine: followed by what symbols of its stages there are."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import gdb, guest, target
from xencrash.cli import main
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

FITS_NONE = "no generation of the crash path fits "


@pytest.fixture
def lab() -> Iterator[Machine]:
    with guest() as machine:
        yield machine


def renamed(lab: Machine, folder: Path, *names: str) -> str:
    """The guest's symbols, as if a patch had given some functions other names."""
    words = [f"--redefine-sym={name}=my_{name}" for name in names]
    subprocess.run(["objcopy", *words, lab.symbols, folder / "syms"], check=True)
    return str(folder / "syms")


def follow(lab: Machine, symbols: str, **more: Any) -> Any:
    more = {"timeout": 120, "trigger": lambda: lab.serial.send(b"C"), **more}
    return trace(target(lab), symbols, str(lab.qmp_socket), **more)


def test_a_renamed_handler_costs_its_stage_and_what_depends_on_it(lab: Machine, tmp_path: Path) -> None:
    report = follow(lab, renamed(lab, tmp_path, "do_nmi_crash"))
    assert report["generation"] is None and report["undecided"].startswith(FITS_NONE)
    assert (report["verdict"], report["nearest"][0]["id"]) == ("unknown", "4.17.0")
    found = [stage["stage"] for stage in report["stages"]]
    once = ["normal", "crash-entry", "shutdown-entry", "shootdown", "shootdown-done", "crash-info", "exec-entry",
            "handover", "after-handover"]  # fmt: skip
    assert [name for name in found if name in once] == once
    assert {name: found.count(name) for name in found if name not in once} == {"cpu-save": 3, "cpu-stop": 3}
    verdicts = {(f["check"], f["verdict"]) for f in report["findings"]}
    assert not {check for check, verdict in verdicts if verdict == "fail"}
    passed = {check for check, verdict in verdicts if verdict == "pass"}
    assert passed >= {"trace-complete", "idtr", "tr", "cpu-stack", "lapic-id", "nmi-gate-type", "mc-gate-reserved"}
    lab.serial.wait(rb"crash image: alive", 10)


def test_a_path_that_leaves_through_other_functions_ends_where_it_was_last_seen(lab: Machine, tmp_path: Path) -> None:
    report = follow(lab, renamed(lab, tmp_path, "do_nmi_crash", "machine_kexec", "kexec_reloc"))
    assert [stage["stage"] for stage in report["stages"]][-2:] == ["crash-info", "after-handover"]
    assert report["undecided"].startswith(FITS_NONE)
    lab.serial.wait(rb"crash image: alive", 10)


def test_a_crash_that_cannot_be_seen_to_begin_is_not_waited_for(lab: Machine, tmp_path: Path) -> None:
    symbols = renamed(lab, tmp_path, "do_nmi_crash", "kexec_crash", "machine_crash_shutdown")
    report = follow(lab, symbols, timeout=None, trigger=lambda: pytest.fail("it was let run"))
    assert report["undecided"].startswith("the symbols name neither kexec_crash nor machine_crash_shutdown: no stage")
    assert [stage["stage"] for stage in report["stages"]] == ["normal"]
    assert {f["check"] for f in report["findings"] if f["verdict"] == "pass"} >= {"nmi-gate-handler", "mc-gate-ist"}


def test_what_gdb_and_the_command_show(lab: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    symbols = renamed(lab, tmp_path, "do_nmi_crash")
    words = ["check", target(lab), "--symbols", symbols, "--qmp", str(lab.qmp_socket)]
    assert main(words) == 3
    said = capsys.readouterr()
    assert f"xencrash: {FITS_NONE}" in said.err and "not identified; perhaps as in Xen 4.17" in said.out
    assert main([*words, "--generation", "4.17.0", "--alias", "do_nmi_crash=my_do_nmi_crash"]) == 0
    shown = gdb(lab, "xen symbols", "xen crash status", "xen crash check", "xen preflight", symbols=symbols,
                timeout=300)
    assert len(re.findall(f"^crash path +{FITS_NONE}", shown, re.MULTILINE)) == 2
    assert shown.count("UNKNOWN nmi-dispatch, waiting-cpus, crash-save-done") == 2
