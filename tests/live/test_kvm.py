"""KVM, on any machine: AMD's in a Linux under TCG.

Every clean generation of the reference guest and a dozen faults, the interrupt controllers in the kernel and split in
turn; and real Xen, once. What fails, where and when is the same as under TCG (test_kvm_too.py has the other half).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.machines import named
from tests.live.nestedruns import ACCELS, DEALT, OTHERS, Under, exactly_what_should_fail_does
from xencrash.lab import judged
from xencrash.lab.specification import Specification

pytestmark = pytest.mark.live


def test_each_crash_is_left_for_all_rows_by_the_other_kind() -> None:
    both = {(under.run, under.accel) for under in (*DEALT, *OTHERS)}
    assert both == {(under.run, accel) for under in DEALT for accel in ACCELS}
    assert len(both) == 2 * len(DEALT) and {under.accel for under in DEALT} == {*ACCELS}


@pytest.mark.parametrize("under", DEALT, ids=str)
def test_exactly_what_should_fail_does_under_kvm(under: Under) -> None:
    exactly_what_should_fail_does(under)


def test_real_xen_from_its_boot_to_its_vmcore(tmp_path: Path) -> None:
    with judged.machine(tmp_path, Specification(accel=ACCELS[0], cpus=2)) as lab:
        report = judged.follow(lab, tmp_path, lab.crash)
        dump = judged.check_vmcore(lab, tmp_path)
    assert (report["verdict"], report.get("undecided"), named(report["findings"], "unknown")) == ("pass", None, [])
    assert report["target"]["accelerator"] == "kvm"
    assert report["stages"][-1]["stage"] == "after-handover"
    answered = {stage["cpu"] for stage in report["stages"] if stage["stage"] == "nmi-taken"}
    assert answered == {0, 1} - {report["crashing_cpu"]}
    assert (dump["verdict"], dump["crashing_cpu"]) == ("pass", report["crashing_cpu"])
    assert (tmp_path / "vmcore").stat().st_size > 500 << 20


def test_a_machine_that_is_left_running_holds_no_stream_of_the_command(tmp_path: Path) -> None:
    """Else `lab up | tee log` never ends."""
    command, run_dir = [sys.executable, "-m", "xencrash", "lab"], ["--run-dir", str(tmp_path / "machine")]
    machine = ["--guest", "4.17.0", "--qemu", "10.0", "--accel", ACCELS[0]]
    try:
        subprocess.run([*command, "up", *machine, *run_dir], capture_output=True, check=True, timeout=600)
        status = subprocess.run([*command, "status", *run_dir], capture_output=True, check=True, text=True)
        assert "running" in status.stdout
    finally:
        subprocess.run([*command, "down", *run_dir], check=True)
