"""What a summary says of real crashes, against what was done: Xen's own faults, and a fatal NMI.

The crash key's and dom0's panic's are in test_dumps.py and test_lab.py. Each machine is looked at twice: as a raw image
of its memory, and live, when the crash kernel has begun to run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import ram, ready
from xen_symbols import open_dump
from xencrash.cli import main
from xencrash.lab.machine import Machine

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("default_row")]

CPU = 2
CRASH_KERNEL = rb"Executing kexec image on cpu\d(?s:.*)\n\[ +\d"  # its first line, after whatever time on a busy host


def by_a_page_fault(lab: Machine) -> None:
    lab.prepare("page-fault", CPU)
    lab.crash("page-fault", cpu=CPU)


def by_a_bug(lab: Machine) -> None:
    lab.prepare("bug", CPU)
    lab.crash("bug", cpu=CPU)


def by_an_nmi(lab: Machine) -> None:
    """As nmi=fatal on Xen's command line would have it, which another machine would have to be booted for."""
    memory = open_dump(str(lab.ram_file), lab.symbols, base=0)
    with ram(lab) as bytes_of:
        at = memory.physical(memory.symbols.address("opt_nmi"))
        bytes_of[at : at + 6] = b"fatal\0"
    lab.qmp("inject-nmi")


@pytest.mark.parametrize(
    ("crash", "id", "says", "cpu", "at", "event", "vcpu"),
    [
        (by_a_page_fault, "panic", "FATAL PAGE FAULT, [error_code=0000], Faulting linear address: ", CPU,
         "do_kexec_op", "#PF", "d0v2"),
        (by_a_bug, "panic", "FATAL TRAP: vector = 6 (invalid opcode)", CPU, "do_kexec_op", "#UD", "d0v2"),
        (by_an_nmi, "panic", "FATAL TRAP: vec 2, NMI", 0, "", "NMI", None),
    ],
    ids=["page-fault", "bug", "nmi"],
)  # fmt: skip
def test_a_crash(
    crash: Callable[[Machine], None], id: str, says: str, cpu: int, at: str, event: str | None, vcpu: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    output = tmp_path / "summary"
    with ready(dom0_vcpus=4, shared_ram=True) as lab:
        crash(lab)
        lab.wait_log(lab.serial_log, CRASH_KERNEL, 600, "waiting for the crash kernel")
        lab.qmp("stop")
        words = ["--symbols", str(lab.symbols), "--format", "json", "--output", str(output)]
        found: list[Any] = []
        for target in ([str(lab.ram_file), "--base", "0"], [f"gdb:{lab.gdb_socket}", "--qmp", str(lab.qmp_socket)]):
            assert main(["summary", *target, *words]) == 0
            found.append(json.loads(output.read_text()))
    for summary in found:
        crashed = summary["crashing_cpu"]
        assert (summary["why"]["id"], crashed["cpu"]) == (id, cpu)
        assert summary["why"]["says"].startswith(says)
        assert (crashed["doing"]["at"] or "").startswith(at)  # an NMI may come to a guest, too
        assert crashed["doing"]["event"] == event
        assert vcpu is None or crashed["vcpu"]["name"] == vcpu
        assert sorted(other for group in summary["others"] for other in group["cpus"]) == sorted({0, 1, 2, 3} - {cpu})
        assert {group["domain"] for group in summary["others"]} <= {"idle", 0}
        assert (summary["xen"]["version"], summary["xen"]["command_line"].split()[0]) == ("4.17.7", "xen")
        assert summary["crash_kernel"]["notes"] == [{"cpus": [0, 1, 2, 3], "state": "saved", "says": "complete"}]
        assert summary["verdict"]["counts"].get("fail", 0) == 0
    assert [one["target"]["kind"] for one in found] == ["dump", "live"]
