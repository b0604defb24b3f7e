"""The plugin in a real gdb on real QEMUs: right values, nothing changed, and one line for each error.

More than 400 lines: each test needs the same machines, which are booted once for a module.
"""

from __future__ import annotations

import ast
import itertools
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.machines import LOOK, gdb, guest, packets, ram, rows, run_gdb, target
from xen_symbols.absence import Undecidable
from xen_symbols.symbols.load import load_symbols
from xencrash.gdbmi import GdbSession, open_session
from xencrash.gdbprogram import find_gdb, gdb_arguments, plugin_script
from xencrash.guests import build, command_line
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

MODE = "maint packet qqemu.PhyMemMode"
OFF = 'received: "0"'


@pytest.fixture(scope="module")
def lab() -> Iterator[Machine]:
    with guest() as machine:
        yield machine


def attach(lab: Machine, qmp: bool = True) -> GdbSession:
    return open_session(target(lab), str(lab.symbols), str(lab.qmp_socket) if qmp else None)


# -- values -----------------------------------------------------------------------------------


def test_gates_are_those_in_ram(lab: Machine) -> None:
    with attach(lab) as session, ram(lab) as memory:
        gates = session.xen("idt")["gates"]
        assert [(gate["cpu"], gate["vector"]) for gate in gates] == [(c, v) for c in range(4) for v in (2, 8, 18)]
        for gate in gates:
            at = int(session.xen("vtop", gate["address"])["physical"], 16)
            assert gate["gate"]["raw"] == memory[at : at + 16].hex()
        handlers = {gate["gate"]["handler"]["symbol"] for gate in gates if gate["vector"] == 2}
        assert handlers == {"nmi"}


def test_all_gates_of_one_cpu(lab: Machine) -> None:
    with attach(lab) as session:
        gates = session.xen("idt", "1")["gates"]
        assert [gate["vector"] for gate in gates] == list(range(256))
        assert gates[2] == session.xen("idt", "1", "2")["gates"][0]


def test_per_cpu_values_and_functions(lab: Machine) -> None:
    with attach(lab) as session, ram(lab) as memory:
        found = session.xen("percpu", "crash_save_done")
        assert [cpu["value"] for cpu in found["cpus"]] == ["0x0"] * 4
        at = int(session.xen("vtop", found["cpus"][2]["address"])["physical"], 16)
        memory[at] = 1
        try:
            assert session.mi('-data-evaluate-expression "$xen_per_cpu(\\"crash_save_done\\", 2) + 1"')["value"] == "2"
            assert session.xen("percpu", "crash_save_done", "2")["cpus"][0]["value"] == "0x1"
        finally:
            memory[at] = 0
        handler = session.xen("idt", "3", "18")["gates"][0]["gate"]["handler"]["address"]
        value = session.mi('-data-evaluate-expression "$xen_gate(3, 18)"')["value"]
        assert value.split()[0] == handler  # not a decimal
        assert int(handler, 16) == load_symbols(str(lab.symbols)).address("machine_check")
        assert session.mi('-data-evaluate-expression "(long)$xen_gate(3, 18) - (long)$xen_gate(2, 18)"')["value"] == "0"


def test_what_is_not_ram_is_refused(lab: Machine) -> None:
    script = (
        "python from gdbplugin.register import _registered; t = _registered[0].target(); "
        "print([type(x).__name__ for x in t.read_physical_many([(0x1000, 8), (0xfee00000, 16), (0x3fffff8, 16), "
        "(0x8000000, 8)])])"
    )
    assert gdb(lab, script).strip().splitlines()[0] == "['bytes', 'Absent', 'Absent', 'Absent']"


def test_qmp_and_the_monitor_agree(lab: Machine) -> None:
    with attach(lab) as session:
        exact = session.xen("lapic")["cpus"]
        cpus = session.xen("cpus")["cpus"]
        session.cli("set xen qmp-socket")
        others = session.xen("lapic")["cpus"]
        again = session.xen("cpus")["cpus"]
    assert {cpu["mode_source"] for cpu in exact} == {"QEMU device state"}
    assert {cpu["mode_source"] for cpu in others} == {"inferred from x2apic_enabled"}
    for name in ("cpu", "apic_id", "mode", "spiv", "icr_low", "icr_high", "lvt", "enabled"):
        assert [cpu[name] for cpu in exact] == [cpu[name] for cpu in others], name
    for name in ("cpu", "thread", "index", "apic_id", "at", "ring", "halted", "online"):
        assert [cpu[name] for cpu in cpus] == [cpu[name] for cpu in again], name
    assert [cpu["nmi_blocked"] for cpu in cpus] == [False] * 4
    assert [cpu["nmi_blocked"] for cpu in again] == [None] * 4  # not known is not false


@pytest.mark.parametrize("mode", ["xapic", "x2apic"])
def test_rdmsr_gives_what_the_device_state_gives(mode: str) -> None:
    with guest(append=command_line(x2apic=mode == "x2apic"), qemu="10.0", lapic=mode) as machine:
        with attach(machine) as session:
            session.break_at(load_symbols(str(machine.symbols)).address("kexec_crash"))
            session.run()
            machine.serial.send(b"C")
            assert session.wait_stop(20) is not None
            exact = session.xen("lapic")["cpus"]
            session.set("rdmsr", "on")
            with pytest.raises(Undecidable, match="gdb drops the result"):
                session.xen("lapic")
            session.leave(running=False)
        registers = "thread apply all info registers"
        output = gdb(machine, registers, "echo === 2\\n", "set xen rdmsr on", "xen lapic", "echo === 3\\n", registers,
                     "echo === 4\\n", qmp=False)  # fmt: skip
        before, shown, after = re.split("=== [234]\n", output)[:3]
        assert before == after
        measured = rows(shown, "Local APICs")
        assert {cpu["mode"] for cpu in exact} == {mode}
        assert measured[0][:4] == ["0", "0", mode, "rdmsr,"] and exact[0]["apic_base"] in measured[0]
        assert measured[1][:4] == ["1", "1", mode, "inferred"]  # it is halted, and was left alone


def test_the_log_is_what_was_printed(lab: Machine) -> None:
    with attach(lab) as session:
        text = session.xen("log")["text"]
    printed = lab.serial_log.read_bytes().decode().replace("\r\n", "\n")
    assert "4 CPUs ready" in text and text == printed


@pytest.mark.parametrize(
    ("generation", "stacks", "of_nmi"),
    [
        ("4.3.4", ["#DF", "NMI", "#MC", "primary"], "NMI"),  # the numbers before 6001660473, and since
        ("4.21.0", ["#MC", "NMI", "#DB", "#DF", "primary"], "NMI"),
        ("rfc-v1", ["#DF", "NMI", "#MC", "primary"], "primary"),  # which takes IST away from the gates
    ],
)
def test_bt_at_the_handover(generation: str, stacks: list[str], of_nmi: str) -> None:
    with guest(generation) as machine:
        trace(target(machine), str(machine.symbols), str(machine.qmp_socket), timeout=60, leave_stopped=True,
              trigger=lambda: machine.serial.send(b"C"))  # fmt: skip
        with attach(machine) as session:
            crashed, *others = session.xen("bt")["cpus"]
            notes = session.xen("notes")
    assert [stack["name"] for stack in crashed["stacks"]["list"]] == stacks
    assert crashed["stacks"]["by"].endswith("which TR points to")
    assert crashed["steps"][0]["at"]["symbol"] == "kexec_reloc" and crashed["steps"][0]["stack"] == "primary"
    names = [call["symbol"].partition("+")[0] for step in crashed["steps"] for call in step["calls"]]
    assert "kexec_crash" in names
    assert crashed["steps"][-1]["interrupted_by"] == "interrupt 0xf0"  # the serial port's
    for cpu in others:
        here, interrupted = cpu["steps"]
        assert here["at"]["symbol"].startswith("do_nmi_crash+") and here["stack"] == of_nmi
        assert (interrupted["interrupted_by"], interrupted["stack"]) == ("NMI", "primary")
        assert interrupted["at"]["symbol"].startswith(("default_idle", "idle_loop"))
        assert [(f["stack"], f["state"]) for f in cpu["frames"]] == [("NMI", "current")] * (of_nmi == "NMI")
        assert cpu["stacks"]["processor_id"] == cpu["cpu"] and not cpu["lost"]
    assert [buffer["state"] for buffer in notes["buffers"]] == ["saved"] * 4
    assert notes["info"]["extra_version"] == "-reference-guest" and notes["file"] == []


# -- nothing is changed -----------------------------------------------------------------------


def test_a_check_changes_nothing(lab: Machine) -> None:
    with attach(lab) as session, ram(lab) as memory:
        everything = "thread apply all info registers"
        before, registers = bytes(memory), session.cli(everything)
        for name in ("crash-check", "crash-status", "cpus", "lapic", "idt", "symbols", "log", "bt", "notes"):
            session.xen(name)
        assert bytes(memory) == before
        assert session.cli(everything) == registers


def test_a_machine_that_is_to_stop_as_soon_as_it_runs(lab: Machine) -> None:
    """The interrupt must not meet gdb while it still sets breakpoints: a command then ended with Quit."""
    runs = "print([let_run(0) for _ in range(20)])"
    output = gdb(lab, f"python from gdbplugin.running import let_run; {runs}", timeout=300)
    assert output.count("Stop(expired=True, interrupted=False)") == 20, output


def test_physical_mode_is_off_afterwards(lab: Machine) -> None:
    interrupted = (
        "python from gdbplugin.target import LiveTarget\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "LiveTarget._packet = stop"
    )
    output = gdb(lab, "xen cpus", MODE, "xen idt 99", MODE, interrupted, "xen cpus", MODE)
    assert output.count(OFF) == 3, output


def test_a_mode_left_on_by_another_is_reset(lab: Machine) -> None:
    gdb(lab, "maint packet Qqemu.PhyMemMode:1")
    assert OFF in gdb(lab, "xen symbols", MODE)


def test_the_selection_is_kept(lab: Machine) -> None:
    where = "python print(gdb.selected_thread().num, gdb.selected_frame().level(), hex(gdb.selected_frame().pc()))"
    commands = [f"add-symbol-file {lab.symbols}", "thread 3", "up", where, "xen cpus", where, "xen crash check", where]
    output = gdb(lab, *commands)
    found = re.findall(r"^3 1 0x[0-9a-f]+$", output, re.MULTILINE)
    assert len(found) == 3 and len(set(found)) == 1, output


@pytest.mark.parametrize("qmp", [True, False])
def test_a_machine_continues_as_it_was_found(qmp: bool) -> None:
    with guest(cpus=1) as machine:
        with attach(machine, qmp) as session:
            session.xen("crash-check")
        assert machine.qmp("query-status")["status"] == "running"
        with attach(machine, qmp) as session:
            session.break_at(load_symbols(str(machine.symbols)).address("kexec_crash"))
            session.run()
            machine.serial.send(b"C")
            assert session.wait_stop(20) is not None
            session.leave(running=False)
        assert machine.qmp("query-status")["status"] == "debug"
        with attach(machine, qmp) as session:
            assert session.xen("crash-status")["stage"] == "crash-entry"
        assert machine.qmp("query-status")["status"] == "debug"


# -- output -----------------------------------------------------------------------------------


def test_output_into_a_pipe_is_plain_and_complete(lab: Machine) -> None:
    output = gdb(lab, "xen cpus", "xen crash check")
    assert "\x1b" not in output and "Traceback" not in output
    assert [row[:3] for row in rows(output, "CPUs")] == [[str(cpu), str(cpu + 1), str(cpu)] for cpu in range(4)]
    assert re.search(r"^PASS +\d+ pass", output, re.MULTILINE)


def _on_a_terminal(lab: Machine, *commands: str, term: str) -> str:
    words = [find_gdb(), *gdb_arguments(), "-iex", "set pagination off", "-ex", f"source {plugin_script()}"]
    for command in (f"set xen symbols {lab.symbols}", f"target remote {lab.gdb_socket}", *commands, "detach", "quit"):
        words += ["-ex", command]
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": term}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        output = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and select.select([leader], [], [], 60)[0]:
            try:
                output += os.read(leader, 65536)
            except OSError:  # the other side is closed: gdb has ended
                break
        process.wait(10)
    os.close(leader)
    return output.decode().partition("echo-mark")[2]


def test_colours_are_for_terminals_that_have_them(lab: Machine) -> None:
    mark = "echo echo-mark"
    coloured = _on_a_terminal(lab, mark, "xen idt 0 2", term="xterm-256color")
    assert re.search(r"\x1b\[[0-9;]+mInterrupt gates", coloured) and "0xe008" in coloured
    without_rich = _on_a_terminal(
        lab, "python import sys; sys.modules['rich.console'] = None", mark, "xen idt 0 2", term="xterm-256color"
    )
    piped = _on_a_terminal(lab, mark, "pipe xen idt 0 2 | cat", term="xterm-256color")
    dumb = _on_a_terminal(lab, mark, "xen idt 0 2", term="dumb")
    for text in (without_rich, piped, dumb):
        table = text[text.index("Interrupt gates") : text.index("0xe008")]
        assert "\x1b" not in table, text


def test_sourcing_twice_is_the_same_as_once(lab: Machine) -> None:
    output = gdb(lab, f"source {plugin_script()}", "xen idt 0 2", "show xen symbols")
    assert str(lab.symbols) in output and rows(output, "Interrupt gates")[0][:3] == ["0", "2", "NMI"]


def test_completion(lab: Machine) -> None:
    output = gdb(lab, "complete xen idt ", "complete xen percpu crash_save", "complete xen vtop machine_kexe",
                 "complete xen crash ", "complete set xen q")  # fmt: skip
    assert output.splitlines()[:10] == [
        "xen idt 0", "xen idt 1", "xen idt 2", "xen idt 3", "xen percpu crash_save_done", "xen vtop machine_kexec",
        "xen crash check", "xen crash report", "xen crash status", "xen crash trace",
    ]  # fmt: skip
    assert "set xen qmp-socket" in output


def test_help_is_there_for_everything() -> None:
    output = run_gdb(f"source {plugin_script()}", "echo === begin\\n", "help xen", "help xen crash trace",
                     "help set xen rdmsr", "help function xen_gate", "show xen qmp-socket")  # fmt: skip
    for text in ("xen idt -- Show gates", "Usage: xen crash trace", "registers put back afterwards",
                 "$xen_gate(CPU, VECTOR)", "QMP socket (a unix socket's path, or HOST:PORT): not set."):  # fmt: skip
        assert text in output, output


# -- errors are one line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("xen idt 9", "CPU 9 does not exist: nr_cpu_ids is 4"),
        ("xen idt 0 256", "vector 256 does not exist: an IDT has 256"),
        ("xen idt x", "CPU is a number, not 'x'"),
        ("xen idt 1 2 3", "usage: xen idt [CPU] [VECTOR]"),
        ("xen percpu", "usage: xen percpu NAME [CPU]"),
        ("xen percpu nonsense", "per_cpu__nonsense is not in the ELF symbol table"),
        ("xen vtop 0x123456789abcdef0", "0x123456789abcdef0 is not a canonical address"),
        ("xen vtop no_such_thing", "no_such_thing: No symbol"),
        ("xen crash report", "there is no report yet"),
        ("xen crash trace --timeout", "usage: xen crash trace [--timeout SECONDS]"),
        ("xen crash trace --timeout -1", "usage: xen crash trace [--timeout SECONDS]"),
        ("print $xen_gate(0, 256)", "vector 256 does not exist"),
        ("print $xen_gate(0)", "usage: $xen_gate(CPU, VECTOR)"),
        ("print $xen_gate()", "usage: $xen_gate(CPU, VECTOR)"),
        ("print $xen_gate(0, 2, 3)", "usage: $xen_gate(CPU, VECTOR)"),
        ("print $xen_gate(99, 18)", "CPU 99 does not exist: nr_cpu_ids is 4"),
        ('print $xen_gate("a", 18)', "CPU is a number"),
        ('print $xen_per_cpu("crash_save_done")', 'usage: $xen_per_cpu("NAME", CPU)'),
        ("print $xen_per_cpu(1, 2)", "NAME is a string, in quotes"),
        ('print $xen_per_cpu("crash_save_done", "a")', "CPU is a number"),
        ("xen crash trace now", "usage: xen crash trace [--timeout SECONDS]"),
        ("xen watch gates now", "usage: xen watch gates"),
        ('print $xen_per_cpu("nonsense", 0)', "per_cpu__nonsense is not in"),
    ],
)
def test_bad_arguments(lab: Machine, command: str, says: str) -> None:
    output = gdb(lab, command)
    line = output.strip().splitlines()[0]
    assert says in line and "Traceback" not in output and "Python Exception" not in output, output


def test_without_a_connection() -> None:
    output = run_gdb(f"source {plugin_script()}", "echo === begin\\n", "xen cpus")
    assert output == "gdb is not connected to QEMU: target remote HOST:PORT, or a unix socket's path\n"


def test_a_running_machine(lab: Machine) -> None:
    with attach(lab) as session:
        session.run()
        with pytest.raises(Undecidable, match="the machine is running: stop it first"):
            session.xen("cpus")
        session.interrupt()
        assert len(session.xen("cpus")["cpus"]) == 4


def test_a_machine_before_paging() -> None:
    with guest(paused=True) as machine:
        with attach(machine) as session, pytest.raises(Undecidable, match="Xen is not running there yet"):
            session.xen("crash-check")
        assert machine.qmp("query-status")["status"] == "prelaunch"


def test_the_qmp_socket_of_another_machine(lab: Machine) -> None:
    with guest() as other, attach(lab) as session:
        session.cli(f"set xen qmp-socket {other.qmp_socket}")
        with pytest.raises(Undecidable, match="is the QMP socket of another machine"):
            session.xen("cpus")


def test_a_second_debugger(lab: Machine) -> None:
    with attach(lab), GdbSession() as second:  # a busy host takes seconds to start one
        begun = time.monotonic()
        with pytest.raises(Undecidable, match="another debugger is attached"):
            second.open(target(lab), str(lab.symbols), str(lab.qmp_socket))
        assert time.monotonic() - begun < 5


def test_symbols_of_another_build() -> None:
    """Two builds whose page tables have the same address: with others a mismatch cannot be allowed."""
    other = build("4.21.2").symbols
    with (
        guest("4.21.0", cpus=2) as lab,
        open_session(target(lab), str(other), str(lab.qmp_socket)) as session,
    ):
        wrong, right = (load_symbols(str(path)) for path in (other, lab.symbols))
        assert wrong.address("idle_pg_table") == right.address("idle_pg_table")
        ours, theirs = wrong.build_id, right.build_id
        assert ours and theirs and ours != theirs
        with pytest.raises(Undecidable) as error:
            session.xen("crash-check")
        assert ours.hex() in str(error.value) and theirs.hex() in str(error.value)
        session.set("allow-build-id-mismatch", "on")
        assert session.xen("symbols")["symbols"]["match"] is False


@pytest.mark.parametrize(("content", "says"), [(b"", "empty"), (b"\x00\x01 nonsense", "neither an ELF file nor")])
def test_a_file_that_is_not_a_symbol_file(lab: Machine, tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "symbols"
    file.write_bytes(content)
    with open_session(target(lab), str(file)) as session, pytest.raises(Undecidable, match=says):
        session.xen("crash-check")


# -- cost -------------------------------------------------------------------------------------


def test_a_status_costs_a_few_packets_for_each_cpu_and_a_constant() -> None:
    """Its gates and its own variables lie in two places; without QMP, `info registers` and `info lapic` come on top."""
    counts, without = {}, {}
    for cpus in (2, 8, 16, 32):
        with guest(cpus=cpus) as machine:
            counts[cpus] = packets(machine)
            if cpus <= 16:  # more are read over TCP only
                without[cpus] = packets(machine, qmp=False)
    for of_each, found in ((2, counts), (4, without)):
        for (few, less), (many, more) in itertools.pairwise(found.items()):
            assert more - less <= of_each * (many - few), found
        assert found[2] <= of_each * 2 + 30, found


def test_a_look_at_a_stage_costs_no_more_packets_than_it_did(lab: Machine) -> None:
    """With notes, which a status does without; a bare client shows what they cost (tests/benchmarks/live.py). It is one
    more or less by where the guest's variables lie; the recorded machines of real Xen have their exact numbers in
    tests/unit/test_looks.py."""
    status, look = packets(lab), packets(lab, what=LOOK)
    assert (status <= 24, look <= 25) == (True, True), (status, look)


def test_a_qemu_whose_monitor_takes_no_cpu_number(lab: Machine) -> None:
    """Before 7.2: each CPU is selected in turn, and then the one that was."""
    older = (
        "python from gdbplugin.target import LiveTarget\n"
        "ask, asked = LiveTarget._monitor, []\n"
        "def older(self, command):\n"
        "    asked.append(command)\n"
        "    numbered = command.startswith('info registers ')\n"
        "    return 'info registers: extraneous characters at the end of line' if numbered else ask(self, command)\n"
        "LiveTarget._monitor = older"
    )
    output = gdb(lab, "monitor cpu 2", "xen cpus", "echo === 2\\n", older, "xen cpus", "echo === 3\\n",
                 "python print(asked)", "echo === 4\\n", "monitor info cpus", qmp=False)  # fmt: skip
    shown, again, asked, selected = re.split("=== [234]\n", output)
    assert shown == again
    assert [row[:3] for row in rows(again, "CPUs")] == [[str(cpu), str(cpu + 1), str(cpu)] for cpu in range(4)]
    one_by_one = [command for cpu in range(4) for command in (f"cpu {cpu}", "info registers")]
    lapics = [f"info lapic {cpu}" for cpu in range(4)]
    assert ast.literal_eval(asked) == ["info cpus", "info registers 0", *one_by_one, "cpu 2", *lapics]
    assert re.search(r"^\* CPU #2:", selected, re.MULTILINE)
