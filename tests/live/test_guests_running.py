"""Xen is read correctly, without false failures, whatever the CPUs run: HVM guests, or dom0's user space."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import guest, named, ram, ready
from xen_symbols import open_dump
from xen_symbols.absence import Undecidable
from xencrash.cli import main
from xencrash.gdbmi import GdbSession, MiError, open_session
from xencrash.lab.judged import check_vmcore
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]
TRIES = 40
CPUS = 4
COMMANDS = ("cpus", "idt", "lapic", "bt", "notes", "symbols", "crash-status", "crash-check", "log")
FUNCTIONS = {"$xen_per_cpu": '$xen_per_cpu(\\"crash_save_done\\", 1)', "$xen_gate": "$xen_gate(1, 18)"}
# Of these nothing is a CPU's own state, of which QEMU's monitor says less.
OF_MEMORY = ("idt", "idt-of-one", "notes", "log", "percpu", "vtop", *FUNCTIONS)


def xen_facts(session: GdbSession) -> Json:
    """What every command says of one stop."""
    address = session.xen("idt", "0", "2")["gates"][0]["address"]
    facts = {name: session.xen(name) for name in COMMANDS}
    facts |= {
        "idt-of-one": session.xen("idt", "1"),
        "percpu": session.xen("percpu", "crash_save_done"),
        "vtop": session.xen("vtop", address),
    }
    for name, expression in FUNCTIONS.items():
        facts[name] = session.mi(f'-data-evaluate-expression "{expression}"')["value"]
    return facts


def assert_the_same_from_every_cpu(session: GdbSession, cpus: int) -> Json:
    """The facts of this stop, which are those whichever vCPU is selected."""
    found = []
    for thread in range(1, cpus + 1):
        session.mi(f"-thread-select {thread}")
        found.append(xen_facts(session))
    assert all(facts == found[0] for facts in found)
    return found[0]


def stop_in_guests(session: GdbSession, count: int) -> list[Json]:
    """Stop the machine again and again until `count` of its CPUs are in a guest: those."""
    for _ in range(TRIES):
        inside = [cpu for cpu in session.xen("cpus")["cpus"] if cpu["guest_mode"]]
        if len(inside) >= count:
            return inside
        session.run()
        session.wait_stop(0.05)
        session.interrupt()
    raise AssertionError(f"not {count} CPUs were in a guest in {TRIES} stops")


def assert_the_same_without_qmp(session: GdbSession, cpus: int) -> None:
    """Without QMP no verdict changes, but of what QEMU's monitor does not say: LAPIC modes, and who is in a guest."""
    findings = session.xen("crash-check")["findings"]
    assert (named(findings), {check for check, _ in named(findings, "unknown")}) == ([], {"lapic-mode"})
    assert [cpu["guest_mode"] for cpu in session.xen("cpus")["cpus"]] == [None] * cpus


def assert_it_is_what_ram_holds(lab: Machine, facts: Json) -> None:
    """The first gate, where the page walk says that it lies, and the functions' values beside the commands'."""
    at = int(facts["vtop"]["physical"], 16)
    with ram(lab) as memory:
        assert memory[at : at + 16].hex() == facts["idt"]["gates"][0]["gate"]["raw"]
    handler = facts["idt-of-one"]["gates"][18]["gate"]["handler"]["address"]
    assert facts["$xen_gate"].split()[0] == handler
    assert int(facts["$xen_per_cpu"]) == int(facts["percpu"]["cpus"][1]["value"], 16)


def attach(lab: Machine, qmp: bool = True) -> GdbSession:
    return open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket) if qmp else None)


def test_a_pvh_dom0_in_guest_mode() -> None:
    with ready(xen="4.20", qemu="10.0", cpus=2, pvh=True, shared_ram=True) as lab:
        lab.dom0.run("(while :; do :; done) >/dev/null 2>&1 &")
        with attach(lab) as session:
            inside = [cpu["cpu"] for cpu in stop_in_guests(session, 1)]
            facts = assert_the_same_from_every_cpu(session, 2)
            report = facts["crash-check"]
            unknown = [f for f in report["findings"] if f["verdict"] == "unknown"]
            assert (unknown, report["verdict"], report["stages"][0]["stage"]) == ([], "pass", "normal")
            # svm_ctxt_switch_to cleared the IST of all three while the guest's state is loaded.
            ists = {(gate["cpu"], gate["name"]): gate["gate"]["ist"] for gate in facts["idt"]["gates"]}
            assert {ists[inside[0], name] for name in ("NMI", "#DF", "#MC")} == {0}
            assert "Building a PVH Dom0" in facts["log"]["text"]
            idtr = {f["cpu"]: f["verdict"] for f in report["findings"] if f["check"] == "idtr"}
            assert idtr == {cpu: "skip" if cpu in inside else "pass" for cpu in range(2)}
            session.leave(running=False)
        with attach(lab, qmp=False) as session:
            assert_the_same_without_qmp(session, 2)
            session.leave(running=True)
        # A crash while the guest runs: Xen has no crash kernel, so its path ends at its entry.
        report = trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60,
                       trigger=lambda: lab.crash("panic"))  # fmt: skip
        assert [stage["stage"] for stage in report["stages"]] == ["normal", "crash-entry"]
        assert "no crash kernel is loaded" in report["undecided"] and named(report["findings"]) == []


def test_a_domu_on_every_cpu_and_a_crash_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its vCPUs are in 32-bit code with page tables of their own: nothing that a CPU holds there is Xen's."""
    with ready(domu_vcpus=CPUS, shared_ram=True) as lab:
        core = lab.domus.dump_core(1, tmp_path / "core")
        for command in ("check", "info"):
            assert main([command, str(core), "--symbols", str(lab.symbols)]) == 3
            said = capsys.readouterr()
            assert len(said.err.splitlines()) == 1 and "a core of a Xen domain" in said.err
            assert "nothing was judged" in said.out if command == "check" else "PASS" not in said.out
        with attach(lab) as session, ram(lab) as memory:
            everywhere = stop_in_guests(session, CPUS)
            assert {cpu["guest_mode"] for cpu in everywhere} == {True}
            facts = assert_the_same_from_every_cpu(session, CPUS)
            assert facts["crash-check"]["verdict"] == "pass"
            assert named(facts["crash-check"]["findings"], "unknown") == []
            gates = {(gate["cpu"], gate["vector"]): gate for gate in facts["idt"]["gates"]}
            assert {gate["gate"]["ist"] for gate in gates.values()} == {0}  # by svm_ctxt_switch_to
            with pytest.raises(Undecidable, match="QEMU writes one while the first CPU runs 32-bit code"):
                open_dump(str(lab.dumps.qemu(tmp_path / "dump")))
            # What is damaged on such a CPU is found there: byte 4 of a gate is its IST, byte 5 type, DPL and P.
            for vector, at, value, check in ((2, 4, 2, "nmi-gate-ist"), (2, 5, 0x8F, "nmi-gate-type"),
                                             (18, 4, 1, "mc-gate-ist"), (18, 5, 0x0E, "mc-gate-present")):  # fmt: skip
                where = int(session.xen("vtop", gates[2, vector]["address"])["physical"], 16) + at
                before, memory[where] = memory[where], value
                try:
                    assert named(session.xen("crash-check")["findings"]) == [(check, 2)]
                finally:
                    memory[where] = before
            session.leave(running=False)
        with attach(lab, qmp=False) as session:
            assert_the_same_without_qmp(session, CPUS)
            session.leave(running=True)
        stacks: list[Json] = []
        report = trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60, trigger=lab.crash,
                       on_stop=lambda session: stacks.append(session.xen("bt")))  # fmt: skip
        assert (report["verdict"], report["stages"][-1]["stage"]) == ("pass", "after-handover")
        # Of the others at least one was in the domU when the crash began: its NMI is a VM exit, then one without IST.
        begun = [f for f in report["findings"] if (f["check"], f["stage"]) == ("nmi-gate-ist", "crash-entry")]
        assert 0 in {f["observed"] for f in begun if f["cpu"] != report["crashing_cpu"]}
        where = [step["at"] for cpu in stacks[-1]["cpus"] for step in cpu["steps"] if step["interrupted_by"] == "NMI"]
        calls = [call for cpu in stacks[-1]["cpus"] for step in cpu["steps"] for call in step["calls"]]
        assert any(place["symbol"].startswith("svm_") for place in (*where, *calls))
        assert check_vmcore(lab, tmp_path)["verdict"] == "pass"


def test_dom0_busy_in_user_space_on_every_cpu_and_a_crash_then() -> None:
    """On Intel dom0 has page tables without Xen in them (XPTI): gdb itself reads nothing of Xen's from such a CPU."""
    with ready(cpus=2, dom0_vcpus=2, cpu_args="vendor=GenuineIntel", shared_ram=True) as lab:
        assert re.search(rb"XPTI \(64-bit PV only\): Dom0 enabled", lab.serial_log.read_bytes())
        for cpu in range(2):
            lab.dom0.run(f"(taskset -p {1 << cpu} $$; while :; do :; done) >/dev/null 2>&1 &")
        with attach(lab) as session:
            for _ in range(TRIES):
                if any(cpu["ring"] == 3 for cpu in session.xen("cpus")["cpus"]):
                    break
                session.run()
                session.wait_stop(0.05)
                session.interrupt()
            facts = assert_the_same_from_every_cpu(session, 2)
            assert_it_is_what_ram_holds(lab, facts)
            assert facts["crash-check"]["verdict"] == "pass"
            away = next(cpu for cpu in facts["cpus"]["cpus"] if cpu["ring"] == 3)
            session.mi(f"-thread-select {away['thread']}")
            with pytest.raises(MiError, match="Unable to read memory"):
                session.mi(f"-data-read-memory-bytes {facts['percpu']['cpus'][1]['address']} 1")  # an IDT it has
            session.leave(running=False)
        with attach(lab, qmp=False) as session:
            assert_the_same_without_qmp(session, 2)
            again = assert_the_same_from_every_cpu(session, 2)
            assert {name: again[name] for name in OF_MEMORY} == {name: facts[name] for name in OF_MEMORY}
            session.leave(running=True)
        report = trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60, trigger=lab.crash)
        assert (report["verdict"], report["stages"][-1]["stage"]) == ("pass", "after-handover")
        # After the fact: the crash kernel runs on the crashing CPU, the other one is parked.
        lab.serial.wait(rb"\[ +\d+\.\d+\]", 30, since=lab.serial_log.read_bytes().rindex(b"Executing kexec image"))
        with attach(lab) as session:
            facts = assert_the_same_from_every_cpu(session, 2)
            assert (facts["crash-check"]["verdict"], facts["crash-status"]["stage"]) == ("pass", "crashed")
            assert facts["crash-status"]["crashing_cpu"] == report["crashing_cpu"]
            assert_it_is_what_ram_holds(lab, facts)
            session.leave(running=False)
        with attach(lab, qmp=False) as session:
            again = assert_the_same_from_every_cpu(session, 2)
            assert {name: again[name] for name in OF_MEMORY} == {name: facts[name] for name in OF_MEMORY}
            assert again["crash-status"]["crashing_cpu"] == report["crashing_cpu"]
            unknown = {check for check, _ in named(again["crash-check"]["findings"], "unknown")}
            assert (named(again["crash-check"]["findings"]), unknown) == (
                [], {"lapic-mode", "lapic-self-nmi", "nmi-latch", "nmi-pending"},
            )  # fmt: skip


def test_a_machine_whose_device_state_qemu_cannot_save_lives_on() -> None:
    """QEMU up to 10.0 dies of xen-save-devices-state when it has an amd-iommu."""
    with guest(qemu_args=("-device", "amd-iommu")) as lab, attach(lab) as session:
        report = session.xen("crash-check")
        unknown = [finding for finding in report["findings"] if finding["verdict"] == "unknown"]
        assert {finding["check"] for finding in unknown} == {"lapic-mode"}
        assert all("non-migratable device: amd-iommu" in finding["reason"] for finding in unknown)
        assert lab.alive() and named(report["findings"]) == []
