"""A real Xen that runs: would a crash work, and what has it said? And the reference guest, crashed from a shell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.live.machines import ready
from xencrash.cli import main
from xencrash.lab.machine import attach

pytestmark = pytest.mark.live


def test_preflight_and_log_of_a_real_xen(capsys: pytest.CaptureFixture[str]) -> None:
    with ready(shared_ram=True) as lab:
        words = ["--symbols", str(lab.symbols), "--qmp", str(lab.qmp_socket), "--format", "json"]
        assert main(["preflight", f"gdb:{lab.gdb_socket}", *words]) == 0
        report = json.loads(capsys.readouterr().out)
        asked = {each["check"]: each["observed"] for each in report["findings"] if each["stage"] == "preflight"}
        area = asked.pop("crash-area")
        said = re.search(rb"Kdump: (\d+)MB \(\d+kB\) at (0x[0-9a-f]+)", lab.serial_log.read_bytes())
        assert said is not None and (area["size"], area["start"]) == (int(said[1]) << 20, said[2].decode())
        assert 32 << 20 < area["image"] < area["size"]  # Linux and its initramfs
        assert asked == {
            "kexec-built-in": True, "crash-image": "loaded", "nmi-policy": "dom0",
            "crash-cpus": {"online": [0, 1, 2, 3], "parked": [], "absent": []},
            "crash-lapic": {"now": ["xapic"], "after": "xapic"}, "nmi-callback": {"address": "0x0", "symbol": None},
        }  # fmt: skip
        assert lab.qmp("query-status")["status"] == "running"

        lab.qmp("stop")  # or it may say more meanwhile
        assert main(["log", str(lab.ram_file), "--base", "0"]) == 0  # by the symbols that Xen carries
        of_ram = capsys.readouterr().out
        assert main(["log", f"gdb:{lab.gdb_socket}", "--symbols", str(lab.symbols), "--qmp", str(lab.qmp_socket)]) == 0
        assert capsys.readouterr().out == of_ram
        assert "(XEN) Brought up 4 CPUs\n" in of_ram


def test_the_guest_is_crashed_from_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = str(tmp_path / "run")
    assert main(["lab", "up", "--guest", "4.17.0", "--run-dir", run_dir]) == 0
    machine = attach(run_dir)
    try:
        machine.serial.wait(rb"CPUs ready", 20)
        assert main(["lab", "crash", "--run-dir", run_dir]) == 0
        machine.serial.wait(rb"crash image: alive", 20)
        capsys.readouterr()
        assert main(["lab", "status", "--run-dir", run_dir, "--format", "json"]) == 0
        (status,) = json.loads(capsys.readouterr().out)
        assert status["phase"] == "crash kernel runs"
    finally:
        machine.down()
