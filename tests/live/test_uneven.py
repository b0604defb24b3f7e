"""Uneven machines: absent CPUs, parked CPUs, one CPU, many; each CPU is judged for what it is, and none is missed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import gdb, packets, ready, rows
from xen_symbols import evaluate, open_dump
from xen_symbols.symbols.load import load_symbols
from xencrash.gdbmi import open_session
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]


def follow(lab: Machine, **options: Any) -> Json:
    options = {"timeout": 60, "trigger": lab.crash, **options}
    return trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), **options)


def verdicts(report: Json) -> dict[int, set[str]]:
    """The verdicts given of each CPU."""
    found: dict[int, set[str]] = defaultdict(set)
    for finding in report["findings"]:
        if finding["cpu"] is not None:
            found[finding["cpu"]].add(finding["verdict"])
    return dict(found)


def assert_passed(report: Json) -> None:
    wrong = [f for f in report["findings"] if f["verdict"] in ("fail", "unknown")]
    assert (report.get("undecided"), wrong) == (None, [])
    assert report["verdict"] == "pass" and "handover" in [stage["stage"] for stage in report["stages"][-2:]]


def test_cpus_possible_but_not_present(tmp_path: Path) -> None:
    with ready(cpus=4, max_cpus=8) as lab:
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            cpus = session.xen("cpus")["cpus"]
            assert [(cpu["cpu"], cpu["exists"]) for cpu in cpus] == [(cpu, cpu < 4) for cpu in range(8)]
            assert all("possible but not present" in cpu["absent"] for cpu in cpus[4:])
        report = follow(lab)
        assert_passed(report)
        assert verdicts(report) == {cpu: {"pass", "skip"} for cpu in range(4)}
        assert {cpu["cpu"]: cpu["role"] for cpu in report["cpus"]} == {
            cpu: "crashing" if cpu == report["crashing_cpu"] else "other" for cpu in range(4)
        }
        vmcore = lab.dumps.vmcore(tmp_path / "vmcore")  # with notes of the absent ones, all zero
        dump = evaluate(open_dump(vmcore, lab.symbols)).to_json()
        vmcore.unlink()
    assert (dump["verdict"], [cpu["cpu"] for cpu in dump["cpus"]]) == ("pass", [0, 1, 2, 3])


def test_parked_cpus_before_and_through_a_crash_and_in_the_vmcore(tmp_path: Path) -> None:
    with ready(cpus=4, xen_args="maxcpus=2", cpu_args="vendor=GenuineIntel") as lab:
        first: list[Json] = []
        report = follow(lab, progress=lambda stage, findings: first.extend(findings) if not first else None)
        assert_passed(report)
        handlers = {f["cpu"]: f["observed"]["symbol"] for f in first if f["check"] == "nmi-gate-handler"}
        assert handlers == {0: "nmi", 1: "nmi", 2: "trap_nop", 3: "trap_nop"}
        assert set(verdicts(report)) == {0, 1, 2, 3}
        assert [cpu["role"] for cpu in report["cpus"]][2:] == ["offline", "offline"]
        vmcore = lab.dumps.vmcore(tmp_path / "vmcore")
        dump = evaluate(open_dump(vmcore, lab.symbols)).to_json()
        vmcore.unlink()
    assert (dump["verdict"], dump["crashing_cpu"]) == ("pass", report["crashing_cpu"])
    for cpu in dump["cpus"][2:]:
        assert (cpu["role"], cpu["nmi_gate"]["handler"]["symbol"], cpu["mc_gate"]["ist"]) == ("offline", "trap_nop", 1)
    # Only what concerns each CPU that exists is asked of a parked one; nothing of what only running CPUs do.
    asked = {f["check"] for f in dump["findings"] if f["cpu"] == 2 and f["verdict"] == "pass"}
    assert "nmi-gate-handler" in asked and "crash-notes" in asked and not asked & {"nmi-answered", "cpu-parked"}


@pytest.mark.parametrize("cpu", [0, 1, 2, 3])
def test_a_crash_on_each_cpu_in_turn(cpu: int) -> None:
    with ready(cpus=4, dom0_vcpus=4) as lab:
        report = follow(lab, trigger=lambda: lab.crash("panic", cpu=cpu))
    assert_passed(report)
    assert report["crashing_cpu"] == cpu
    assert {s["cpu"] for s in report["stages"] if s["stage"] == "nmi-taken"} == {0, 1, 2, 3} - {cpu}


def test_one_cpu_and_thirty_two() -> None:
    sent = {}
    for cpus in (1, 32):
        with ready(cpus=cpus) as lab:
            sent[cpus] = packets(lab)
            report = follow(lab)
        assert_passed(report)
        assert verdicts(report) == {cpu: {"pass", "skip"} for cpu in range(cpus)}
        for stage in ("nmi-taken", "cpu-stop"):
            assert len({s["cpu"] for s in report["stages"] if s["stage"] == stage}) == cpus - 1
    # Two for each CPU; and a few pieces of page tables, of 256 bytes each, for where so many have their memory.
    assert sent[32] - sent[1] <= 2 * 31 + 10, sent


def test_x2apic_and_back(tmp_path: Path) -> None:
    """Each CPU's LAPIC mode and ICR at every stage, from QEMU's device state; then every source, at one stop."""
    stops: list[dict[int, Json]] = []
    seen: list[tuple[Json, dict[int, Json]]] = []

    with ready(qemu="10.0", cpus=3, dom0_vcpus=3) as lab:
        report = follow(
            lab, trigger=lambda: lab.crash("panic", cpu=1), leave_stopped=True,
            on_stop=lambda session: stops.append({cpu["cpu"]: cpu for cpu in session.xen("lapic")["cpus"]}),
            progress=lambda stage, _: seen.append((stage, stops[-1])) if stops else None,
        )  # fmt: skip
        assert_passed(report)
        for stage, cpus in seen:
            name, subject = stage["stage"], stage["cpu"]
            assert {cpu["mode_source"] for cpu in cpus.values()} == {"QEMU device state"}
            if name in ("crash-entry", "shutdown-entry", "shootdown"):
                assert {cpu["mode"] for cpu in cpus.values()} == {"x2apic"}, name
            if name in ("nmi-taken", "cpu-save", "cpu-stop"):  # each other one switches for itself
                assert cpus[subject]["mode"] == cpus[1]["mode"] == "x2apic", name
            if name in ("shootdown-done", "crash-info", "exec-entry", "handover"):
                own = "x2apic" if name == "shootdown-done" else "xapic"
                assert {number: cpu["mode"] for number, cpu in cpus.items()} == {0: "xapic", 1: own, 2: "xapic"}, name
        assert {stage["stage"] for stage, _ in seen} >= {"nmi-taken", "cpu-stop", "shootdown-done", "handover"}
        last = seen[-1][1]
        assert [last[cpu]["apic_base"] for cpu in range(3)] == ["0xfee00900", "0xfee00800", "0xfee00800"]
        # The self-NMI was written in xAPIC mode: the destination is in the upper byte.
        assert [(last[cpu]["icr_low"], last[cpu]["icr_high"]) for cpu in (0, 2)] == [("0x400", "0x0"),
                                                                                   ("0x400", "0x2000000")]  # fmt: skip
        # The shootdown's own NMI was written in x2APIC mode by CPU 1, whose register kept that form.
        assert int(last[1]["icr_high"], 16) < 1 << 24
        assert_sources_agree(lab, last, awake=1)
        assert_passed_after_the_fact(lab, 1, "xapic", tmp_path)


def assert_sources_agree(lab: Machine, exact: dict[int, Json], awake: int) -> None:
    """What memory and monitor give by inference, and rdmsr on the CPU that is awake in Xen, is what QEMU's device state
    gave: the machine has not moved since."""
    with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols)) as session:
        inferred = {cpu["cpu"]: cpu for cpu in session.xen("lapic")["cpus"]}
    assert inferred.keys() == exact.keys()
    for number, cpu in inferred.items():
        assert cpu["mode_source"].startswith("inferred from")
        assert [cpu[name] for name in ("mode", "spiv", "icr_low", "icr_high")] == [
            exact[number][name] for name in ("mode", "spiv", "icr_low", "icr_high")]  # fmt: skip
    measured = {int(row[0]): row for row in rows(gdb(lab, "set xen rdmsr on", "xen lapic", qmp=False), "Local APICs")}
    assert measured[awake][2:4] == [exact[awake]["mode"], "rdmsr,"] and exact[awake]["apic_base"] in measured[awake]
    assert {row[3] for number, row in measured.items() if number != awake} == {"inferred"}  # halted: left alone


def assert_passed_after_the_fact(lab: Machine, crashing: int, parked: str, folder: Path) -> None:
    """The crash kernel runs on the crashing CPU, where Linux leaves x2APIC mode if it was in it, as it has no interrupt
    remapping; the others are parked, in the mode in which Xen left them."""
    lab.dumps.vmcore(folder / "vmcore", 300).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "xencrash", "check", f"gdb:{lab.gdb_socket}", "--symbols", str(lab.symbols),
         "--qmp", str(lab.qmp_socket), "--format", "json"], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    report = json.loads(done.stdout)
    assert [f for f in report["findings"] if f["verdict"] in ("fail", "unknown")] == []
    assert [stage["stage"] for stage in report["stages"]] == ["crashed"]
    assert (report["verdict"], report["crashing_cpu"]) == ("pass", crashing)
    modes = {cpu["cpu"]: cpu["lapic"]["mode"] for cpu in report["cpus"]}
    assert modes == {cpu: "xapic" if cpu == crashing else parked for cpu in range(3)}


def test_x2apic_of_the_firmware(tmp_path: Path) -> None:
    """Xen was entered in x2APIC mode: each CPU stops in it, and writes its self-NMI into the ICR that is an MSR."""
    with ready(qemu="10.0", lapic="x2apic-firmware", cpus=3, dom0_vcpus=3) as lab:
        report = follow(lab, trigger=lambda: lab.crash("panic", cpu=0), leave_stopped=True)
        assert_passed(report)
        assert b"x2APIC mode is already enabled by BIOS" in lab.serial_log.read_bytes()
        assert report["crashing_cpu"] == 0
        modes = {(f["observed"], f["verdict"]) for f in report["findings"] if f["check"] == "lapic-mode"}
        assert modes == {("x2apic", "pass")}
        judged = {f["cpu"]: f["observed"] for f in report["findings"]
                  if f["check"] == "lapic-self-nmi" and f["stage"] == "handover"}  # fmt: skip
        assert judged == {1: "an NMI to itself", 2: "an NMI to itself"}
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            exact = {cpu["cpu"]: cpu for cpu in session.xen("lapic")["cpus"]}
            assert [exact[cpu]["apic_base"] for cpu in range(3)] == ["0xfee00d00", "0xfee00c00", "0xfee00c00"]
            # SDM vol. 3, 10.12.9: the destination is the upper half as it is.
            assert [(exact[cpu]["icr_low"], exact[cpu]["icr_high"]) for cpu in (1, 2)] == [("0x400", "0x1"),
                                                                                          ("0x400", "0x2")]  # fmt: skip
            # What Xen would have to say if one of its CPUs had gone back to xAPIC, as after any other boot.
            address = load_symbols(str(lab.symbols)).address("apic_boot_mode", "dDbB")
            session.mi(f"-data-write-memory-bytes {address:#x} 02000000")
            changed = session.xen("crash-check")
            session.mi(f"-data-write-memory-bytes {address:#x} 03000000")
            failed = {(f["check"], f["cpu"]) for f in changed["findings"] if f["verdict"] == "fail"}
            assert failed == {("x2apic-enabled", None), *(("lapic-mode", cpu) for cpu in range(3))}
            session.leave(running=False)
        assert_sources_agree(lab, exact, awake=0)
        assert_passed_after_the_fact(lab, 0, "x2apic", tmp_path)
