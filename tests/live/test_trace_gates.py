"""`trace --gates`: every change of every gate between the stages of a real crash, and nothing else; and those that no
Xen makes fail."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.live.machines import guest, ready, target
from tests.machines.realxen import LiveMachine, follow
from tests.schema import SCHEMA
from xen_symbols.absence import Undecidable
from xen_symbols.x86.gate import SIZE, decode, encode
from xen_symbols.xen.idt import idt_address
from xencrash.gdbmi import GdbSession, open_session
from xencrash.gdbprogram import find_gdb, gdb_arguments, plugin_script
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

NMI, MC = 2, 18
Gates = dict[tuple[int, int], dict[str, Any]]
# (CPU, vector, what changed, to which handler or IST), with CPU 0 crashing and one other.
ARMED = {(0, NMI, "handler", "trap_nop"), (0, NMI, "ist", 0), (0, MC, "ist", 0)}
PARKED = {(1, MC, "ist", 0)}
NEUTRALISED = {(0, MC, "handler", "trap_nop"), (1, MC, "handler", "trap_nop")}


def made(report: dict[str, Any]) -> set[tuple[int, int, str, Any]]:
    """(CPU, vector, property, new value) of every change in a report."""
    found = set()
    for change in report["gate_changes"]:
        for name in change["changed"]:
            value = change["after"][name]
            found.add((change["cpu"], change["vector"], name, value["symbol"] if name == "handler" else value))
    return found


def zip_writers(report: dict[str, Any]) -> list[tuple[dict[str, Any], set[tuple[int, str]]]]:
    """Each change, with (CPU, function) of those that were seen to write to the gate."""
    return [
        (change, {(writer["cpu"], writer["at"]["symbol"].partition("+")[0]) for writer in change["writers"]})
        for change in report["gate_changes"]
    ]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ("4.3.0", ARMED | PARKED | NEUTRALISED | {(1, NMI, "handler", "nmi_crash")}),
        ("4.17.0", ARMED | PARKED | NEUTRALISED),
        ("4.21.2", {(0, MC, "ist", 0)} | PARKED | NEUTRALISED),
    ],
)
def test_every_change_of_a_clean_crash(generation: str, expected: set[tuple[int, int, str, Any]]) -> None:
    with guest(generation, cpus=2) as lab:
        report = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=20, stall=10, gates=True,
                       trigger=lambda: lab.serial.send(b"C"))  # fmt: skip
    jsonschema.validate(report, SCHEMA)
    assert report["verdict"] == "pass"
    assert made(report) == expected
    assert len({(c["cpu"], c["vector"], name) for c in report["gate_changes"] for name in c["changed"]}) == sum(
        len(c["changed"]) for c in report["gate_changes"]
    )  # each property of each gate once
    stages = {(c["cpu"], c["vector"], c["changed"][0]): (c["since"], c["stage"]) for c in report["gate_changes"]}
    assert stages[0, MC, "ist"][1] == "shootdown"
    assert stages[0, MC, "handler"] == stages[1, MC, "handler"] == ("exec-entry", "nmis-unblocked")
    # The guest's gates are written by helpers that are functions of their own. While one CPU alone runs in Xen every
    # write is seen; the other's may be missed.
    writers = {(change["cpu"], change["vector"], change["stage"]): seen for change, seen in zip_writers(report)}
    for (cpu, vector, stage), seen in writers.items():
        if stage == "nmis-unblocked":
            assert seen == {(0, "_update_gate_addr_lower")}
        elif stage == "shootdown":
            helper = "set_ist" if vector == MC else "_update_gate_addr_lower" if cpu else "_set_gate_lower"
            assert seen == {(0, helper)}
        else:
            assert (cpu, vector) == (1, MC) and seen <= {(1, "set_ist")}


def test_the_watchpoints_are_there_for_the_trace_alone() -> None:
    with guest(cpus=2) as lab, open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:

        def watched() -> int:
            return session.cli("maint info breakpoints").count("hw watchpoint")

        session.xen("crash-trace-begin")
        assert watched() == 0
        with pytest.raises(Undecidable, match=r"usage: -xen-crash-trace-begin \[gates\]"):
            session.xen("crash-trace-begin", "gate")
        session.xen("crash-trace-begin", "gates")
        session.xen("crash-trace-begin", "gates")  # anew, with nothing left of the one before
        assert watched() == 4
        session.xen("crash-trace-end")
        assert watched() == 0


def test_gates_watched_by_a_program() -> None:
    with guest(cpus=2) as lab, open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
        assert session.xen("watch-gates-begin") == {"gates": 4}
        lab.serial.send(b"C")
        session.run()
        lab.serial.wait(rb"crash image: alive", 20)
        session.interrupt()
        report = {"gate_changes": session.xen("watch-gates-stop")["changes"]}
        assert made(report) == ARMED | PARKED | NEUTRALISED
        assert {(0, "_set_gate_lower")} in [seen for _, seen in zip_writers(report)]
        assert session.xen("watch-gates-end") == {"changes": []}
        assert "hw watchpoint" not in session.cli("maint info breakpoints")
        with pytest.raises(Undecidable, match="no gates are watched"):
            session.xen("watch-gates-stop")


def test_gates_watched_by_hand() -> None:
    with guest(cpus=2) as lab:
        words = [find_gdb(), *gdb_arguments(), "-batch"]
        for command in (f"source {plugin_script()}", f"set xen symbols {lab.symbols}", "set pagination off",
                        f"target remote {lab.gdb_socket}", "xen watch gates", "maint info breakpoints"):  # fmt: skip
            words += ["-ex", command]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            while (line := process.stdout.readline()) and not line.startswith("watching 4 gates"):
                pass
            lab.serial.send(b"C")
            lab.serial.wait(rb"crash image: alive", 20)
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=20)[0]
    assert "Changes of gates" in output and "Traceback" not in output
    assert re.search(r"^ *0 +#MC +handler machine_check -> trap_nop; IST 1 -> 0", output, re.M)
    assert re.search(r"CPU 0 _set_gate_lower\+0x[0-9a-f]+", output)
    assert "hw watchpoint" not in output


# What a crash of real Xen 4.17 on CPU 0 of 3 changes, and who is seen to.
REAL = ARMED | {(cpu, MC, "ist", 0) for cpu in (1, 2)} | {(cpu, MC, "handler", "trap_nop") for cpu in range(3)}


def assert_watched(changes: list[dict[str, Any]], before: Gates, after: Gates) -> None:
    """They lead from the gates before the crash to those after it, and whoever was seen to write is the right one."""
    assert made({"gate_changes": changes}) == REAL
    assert {(c["cpu"], c["vector"]): (c["before"], c["after"]) for c in changes} == {
        key: (before[key], after[key]) for key in before if before[key] != after[key]
    }
    for change, seen in zip_writers({"gate_changes": changes}):
        own = {(0, "machine_crash_shutdown")} if change["cpu"] == 0 else {(change["cpu"], "do_nmi_crash")}
        swap = {(0, "machine_kexec")} if change["vector"] == MC else set()
        assert seen <= own | swap
    # While CPU 0 alone runs in Xen no hit is lost.
    assert {(0, "machine_crash_shutdown")} in [seen for change, seen in zip_writers({"gate_changes": changes})
                                               if change["vector"] == NMI]  # fmt: skip


def gates_of(lab: Machine) -> Gates:
    """Every NMI and #MC gate, as the machine has it now."""
    with open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
        cpus = session.xen("crash-check")["cpus"]
    return {(cpu["cpu"], vector): cpu[name] for cpu in cpus for vector, name in ((NMI, "nmi_gate"), (MC, "mc_gate"))}


def test_gates_of_real_xen_watched_by_a_program(tmp_path: Path) -> None:
    with ready(cpus=3, dom0_vcpus=3) as lab:
        before = gates_of(lab)
        with open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
            assert session.xen("watch-gates-begin") == {"gates": 6}
            session.run()
            lab.crash("panic", cpu=0)
            lab.dumps.vmcore(tmp_path / "vmcore", 300).unlink()
            session.interrupt()
            changes = session.xen("watch-gates-end")["changes"]
        assert_watched(changes, before, gates_of(lab))


def test_gates_of_real_xen_watched_by_hand(tmp_path: Path) -> None:
    with ready(qemu="10.0", cpus=3, dom0_vcpus=3) as lab:
        words = [find_gdb(), *gdb_arguments(), "-batch"]
        for command in (f"source {plugin_script()}", f"set xen symbols {lab.symbols}", "set pagination off",
                        f"target remote {lab.gdb_socket}", "xen watch gates"):  # fmt: skip
            words += ["-ex", command]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            while (line := process.stdout.readline()) and not line.startswith("watching 6 gates"):
                pass
            lab.crash("panic", cpu=0)
            lab.dumps.vmcore(tmp_path / "vmcore", 300).unlink()
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[0]
    assert "Traceback" not in output
    table = output[output.index("Changes of gates") :]
    for cpu, vector, what in ((0, "NMI", "handler nmi -> trap_nop; IST 2 -> 0"),
                              *((cpu, "#MC", "handler machine_check -> trap_nop; IST 1 -> 0") for cpu in range(3))):
        assert re.search(rf"^ *{cpu} +{vector} +{re.escape(what)} +(CPU|not seen)", table, re.M), table
    assert len(re.findall(r"^ *\d+ +(NMI|#MC) ", table, re.M)) == 4
    assert re.search(r"CPU 0 machine_crash_shutdown\+0x[0-9a-f]+", table)
    assert set(re.findall(r"CPU \d (\w+)\+0x", table)) <= {"machine_crash_shutdown", "do_nmi_crash", "machine_kexec"}


def test_changes_that_real_xen_never_makes() -> None:
    """While another CPU is at its handler's first instruction, the #MC IST of one that is not there yet goes off, as if
    by itself, and on again, which no Xen does; after the shootdown the NMI handler of CPU 3 is another for a while; and
    the #MC handler of CPU 2 becomes a no-op when it should, but it is memcpy() that does it."""
    stops: list[str] = []
    flickering: list[int] = []
    saved: dict[str, int] = {}
    sessions: list[GdbSession] = []

    def register(name: str) -> int:
        return int(sessions[0].mi(f'-data-evaluate-expression "(unsigned long)${name}"')["value"])

    def gate_at(cpu: int, vector: int) -> int:
        return idt_address(machine.memory, cpu) + SIZE * vector

    def call_memcpy(stage: dict[str, Any], _findings: object) -> None:
        """Once exec-entry is judged: machine_kexec() begins with a call of memcpy(), as if it were in its code."""
        if stage["stage"] != "exec-entry":
            return
        saved.update((name, register(name)) for name in ("rax", "rcx", "rdx", "rsi", "rdi"))
        here, stack = register("rip"), register("rsp") - 8
        sessions[0].mi(f"-data-write-memory-bytes {stack:#x} {here.to_bytes(8, 'little').hex()}")
        to = {"rdi": gate_at(2, MC), "rsi": gate_at(0, NMI), "rdx": SIZE,
              "rip": machine.symbols.address("memcpy", "tT"), "rsp": stack}  # the last: gdb selects a caller then
        for name, value in to.items():
            sessions[0].cli(f"set ${name} = {value:#x}")

    def write(session: GdbSession, cpu: int, vector: int, **properties: int) -> None:
        address = gate_at(cpu, vector)
        gate = decode(machine.memory.read(address, SIZE))
        session.mi(f"-data-write-memory-bytes {address:#x} {encode(gate._replace(**properties)).hex()}")

    def meddle(session: GdbSession) -> None:
        sessions[:] = [session]
        at = machine.symbols.describe(register("rip"))
        if at == "machine_kexec" and saved:  # memcpy() has returned
            for name, value in saved.items():
                session.cli(f"set ${name} = {value:#x}")
        if at == "do_nmi_crash" and not flickering:
            stopped = int(session.mi("-thread-info")["current-thread-id"]) - 1
            flickering.append(1 if stopped != 1 else 2)
            write(session, flickering[0], MC, ist=0)
        elif stops[-1:] == ["do_nmi_crash"] and stops.count("do_nmi_crash") == 1:
            write(session, flickering[0], MC, ist=1)
        elif at in ("kexec_crash_save_info", "machine_kexec"):
            handler = "trap_nop" if at == "kexec_crash_save_info" else "nmi"
            write(session, 3, NMI, handler=machine.symbols.address(handler, "tT"))
        stops.append(at)

    with ready(dom0_vcpus=4, shared_ram=True) as lab:
        machine = LiveMachine(lab)
        report = follow(lab, 0, on_stop=meddle, progress=call_memcpy, gates=True)
    failures = [finding for finding in report["findings"] if finding["verdict"] == "fail"]
    after = 1 + next(n for n, stage in enumerate(report["stages"]) if stage["stage"] == "nmi-taken")
    found = [(f["check"], f["cpu"], f["stop"], f["observed"], f.get("follows")) for f in failures]
    info = next(n for n, stage in enumerate(report["stages"]) if stage["stage"] == "crash-info")
    (last,) = (c for c in report["gate_changes"] if c["cpu"] == 2 and c["stage"] == "nmis-unblocked")
    (writer,) = last["writers"]
    assert writer["at"]["symbol"].startswith("memcpy+")
    by_memcpy = f"#MC written by CPU 0 {writer['at']['symbol']}, after exec-entry"
    # Where this CPU's registers at the stop say that it has not come to its handler, its IST is wrong there already.
    early = [row[:3] for row in found if row[0] == "mc-gate-ist"]
    assert early in ([], [("mc-gate-ist", flickering[0], after - 1)])
    assert [row for row in found if row[0] == "gate-change"] == [
        ("gate-change", flickering[0], after, ["#MC IST 0 -> 1, after nmi-taken"], "mc-gate-ist" if early else None),
        ("gate-change", 3, info, ["NMI handler nmi -> trap_nop, after shootdown-done"], "nmi-gate-handler"),
        ("gate-change", 3, info + 1, ["NMI handler trap_nop -> nmi, after crash-info"], "nmi-gate-handler"),
        ("gate-change", 2, info + 2, ["#MC handler machine_check -> trap_nop, after exec-entry", by_memcpy], None),
    ]
    judged = {f["cpu"]: f for f in report["findings"] if f["check"] == "gate-change" and f["stop"] == info + 2}
    assert {cpu: judged[cpu]["verdict"] for cpu in (0, 1, 3)} == dict.fromkeys((0, 1, 3), "pass")
    assert "that has no business there" in judged[2]["reason"]
    assert [row[:3] for row in found if row[0] != "gate-change"] == [*early, ("nmi-gate-handler", 3, info)]
    assert report["stages"][-1]["stage"] == "after-handover"
    # The list is complete, and those writers are named that were seen: gdb itself is none.
    others = {(cpu, MC, "ist", 0) for cpu in (1, 2, 3)} | {(flickering[0], MC, "ist", 1)}
    swapped = {(cpu, MC, "handler", "trap_nop") for cpu in range(4)}
    exchanged = {(3, NMI, "handler", name) for name in ("trap_nop", "nmi")}
    assert made(report) == ARMED | others | swapped | exchanged
    for change, seen in zip_writers(report):
        if change["stage"] in ("shootdown", "nmis-unblocked"):
            function = "machine_crash_shutdown" if change["stage"] == "shootdown" else "machine_kexec"
            function = "memcpy" if change is last else function
            assert seen == {(0, function)}
        elif change["vector"] == NMI or change["after"]["ist"] == 1:
            assert seen == set()
        else:
            assert seen <= {(change["cpu"], "do_nmi_crash")}
