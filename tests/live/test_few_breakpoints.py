"""Stubs with few hardware breakpoints, or none: the trace passes with four, and with fewer says what it cannot see."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.limited import Stub, limited
from tests.live.machines import When, guest, run_gdb, target
from xen_symbols.symbols.load import load_symbols
from xencrash.gdbmi import NotRun, open_session
from xencrash.gdbprogram import plugin_script
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]
CRASHING = ["crash-entry", "shutdown-entry", "shootdown", "shootdown-done", "crash-info", "exec-entry",
            "nmis-unblocked", "handover"]  # fmt: skip
OTHERS = ["cpu-save", "cpu-stop", "nmi-taken"]
UNSEEN = {3: ["cpu-save"], 2: ["cpu-save", "nmi-taken"], 1: ["cpu-save", "cpu-stop", "nmi-taken", "nmis-unblocked"]}


@pytest.fixture
def lab() -> Iterator[Machine]:
    with guest() as machine:
        yield machine


def follow(lab: Machine, socket: Path, **more: Any) -> Json:
    more = {"timeout": 20, "stall": 5, "trigger": lambda: lab.serial.send(b"C"), **more}
    return trace(f"gdb:{socket}", str(lab.symbols), str(lab.qmp_socket), **more)


def seen(report: Json) -> Counter[tuple[str, int | None]]:
    return Counter((stage["stage"], stage["cpu"]) for stage in report["stages"])


def unknown(report: Json, check: str = "trace-complete") -> dict[str, str]:
    return {f["stage"]: f["reason"] for f in report["findings"] if (f["verdict"], f["check"]) == ("unknown", check)}


def running(lab: Machine) -> bool:
    return bool(lab.qmp("query-status")["status"] == "running")


def test_four_are_enough(lab: Machine) -> None:
    with limited(lab, stub := Stub(4)) as socket:
        report = follow(lab, socket)
    assert report["verdict"] == "pass" and "undecided" not in report
    expected = {("normal", None): 1, ("after-handover", None): 1, **{(name, 0): 1 for name in CRASHING},
                **{(name, cpu): 1 for name in OTHERS for cpu in (1, 2, 3)}}  # fmt: skip
    assert seen(report) == expected
    assert stub.most == 4
    lab.serial.wait(rb"crash image: alive", 10)


def test_more_than_four_are_never_set(lab: Machine) -> None:
    with limited(lab, stub := Stub(100)) as socket:
        assert follow(lab, socket)["verdict"] == "pass"
        # Those of the probe, which are not set while the machine runs; the machine has ten places.
    assert (stub.most, stub.refused) == (10, 0)


@pytest.mark.parametrize("few", [3, 2, 1])
def test_fewer_show_less_and_say_so(lab: Machine, few: int) -> None:
    messages: list[str] = []
    with limited(lab, Stub(few)) as socket:
        report = follow(lab, socket, progress=lambda stage, findings: messages.extend(
            f["reason"] for f in findings if stage["stage"] == "normal" and f["verdict"] == "unknown"
        ))  # fmt: skip
    assert report["verdict"] == "unknown" and "undecided" not in report
    plural = "s" * (few > 1)
    why = f"only {few} hardware breakpoint{plural} can be set, and 4 are needed: nothing is seen at this stage"
    assert unknown(report) == dict.fromkeys(UNSEEN[few], why)
    assert messages == [why] * len(UNSEEN[few])  # before the crash
    assert unknown(report, "enable-nmis").keys() == ({"handover", "after-handover"} if few == 1 else set())
    found = seen(report)
    assert [found[name, 0] for name in CRASHING] == [int(name not in UNSEEN[few]) for name in CRASHING]
    for name in {*OTHERS} - {*UNSEEN[few]}:
        assert [found[name, cpu] for cpu in (1, 2, 3)] == [1] * 3, name
    assert not {name for name, _ in found} & ({*UNSEEN[few]} - {"cpu-stop"})
    lab.serial.wait(rb"crash image: alive", 10)


def test_without_breakpoints_nothing_is_waited_for(lab: Machine) -> None:
    with limited(lab, Stub(0)) as socket:
        report = follow(lab, socket, timeout=None, trigger=lambda: pytest.fail("it was let run"))
    assert report["verdict"] == "unknown"
    assert report["undecided"].startswith("no hardware breakpoint can be set, and 4 are needed: no stage")
    assert unknown(report).keys() == {*CRASHING, *OTHERS}
    assert [stage["stage"] for stage in report["stages"]] == ["normal"]
    assert running(lab)


def test_a_stub_that_refuses_too_late(lab: Machine) -> None:
    """gdb answers that the machine runs, and then that it does not."""
    with limited(lab, stub := Stub(0, generously=9)) as socket:
        report = follow(lab, socket, timeout=None)
    assert stub.refused
    assert report["undecided"] == (
        f"gdb could not set its breakpoints: gdb:{socket} takes no more hardware breakpoints (KVM has four, "
        "watchpoints included)"
    )
    assert report["verdict"] == "unknown" and running(lab)


def test_a_session_that_sets_one_too_many(lab: Machine) -> None:
    text = load_symbols(str(lab.symbols)).address("machine_kexec")
    with limited(lab, Stub(4)) as socket:
        with open_session(f"gdb:{socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            session.set_breakpoints(range(text, text + 5))
            session.run()
            with pytest.raises(NotRun, match="could not set its breakpoints"):
                session.wait_stop(20)
        assert running(lab)


def test_the_command_says_it_before_it_waits(lab: Machine) -> None:
    words = [sys.executable, "-m", "xencrash", "trace", "--symbols", str(lab.symbols), "--qmp", str(lab.qmp_socket),
             "--timeout", "20", "--gates"]  # fmt: skip
    with limited(lab, Stub(3, watched=8)) as socket:
        process = subprocess.Popen([*words, f"gdb:{socket}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stderr is not None and process.stdout is not None
            said = [process.stderr.readline() for _ in range(4)]
            lab.serial.send(b"C")
            report, rest = process.stdout.read(), process.stderr.read()
    assert said[0] == "xencrash: only 3 hardware breakpoints can be set, and 4 are needed: cpu-save cannot be seen\n"
    assert said[1] == f"xencrash: writers not seen: gdb:{socket} takes fewer than 8 watchpoints of 16 bytes\n"
    assert re.fullmatch(r"normal +102 pass, 1 unknown\n", said[2]) and said[3].startswith("waiting for Xen to crash")
    assert process.returncode == 3 and "handover" in rest and "Traceback" not in rest
    assert re.search(r"^UNKNOWN +\d+ pass, 1 unknown", report, re.MULTILINE), report
    assert re.search(r"^writers not seen: gdb:\S+ takes fewer than 8 watchpoints", report, re.MULTILINE)


# -- inside gdb -------------------------------------------------------------------------------


def in_gdb(lab: Machine, stub: Stub, *commands: str, when: When | None = None) -> str:
    """A crash begins once the trace waits for it."""
    when = {"waiting for Xen to crash": lambda _: lab.serial.send(b"C")} if when is None else when
    with limited(lab, stub) as socket:
        output = run_gdb(f"source {plugin_script()}", f"set xen symbols {lab.symbols}",
                         f"set xen qmp-socket {lab.qmp_socket}", f"target remote {socket}", "echo \\n=== begin\\n",
                         *commands, when=when)  # fmt: skip
    assert "Traceback" not in output and "Python Exception" not in output, output
    return output


def stages(output: str) -> Counter[str]:
    return Counter(re.findall(r"^([a-z]+(?:-[a-z]+)*) +CPU", output.partition("\ntarget ")[0], re.MULTILINE))


def test_the_command_inside_gdb_with_four(lab: Machine) -> None:
    output = in_gdb(lab, stub := Stub(4), "xen crash trace --timeout 20")
    assert stages(output) == {**dict.fromkeys(CRASHING, 1), **dict.fromkeys(OTHERS, 3)}, output
    assert re.search(r"^PASS +\d+ pass", output, re.MULTILINE) and stub.most == 4
    assert running(lab)


@pytest.mark.parametrize("few", [3, 2, 1])
def test_the_command_inside_gdb_with_fewer(lab: Machine, few: int) -> None:
    output = in_gdb(lab, Stub(few), "xen crash trace --timeout 20")
    first = output.strip().splitlines()[0]
    assert re.fullmatch(rf"only {few} hardware breakpoints? can be set, and 4 are needed: (.*) cannot be seen", first)
    assert all(name in first for name in UNSEEN[few])
    assert re.search(r"^UNKNOWN +\d+ pass", output, re.MULTILINE), output
    assert [stages(output)[name] for name in CRASHING] == [int(name not in UNSEEN[few]) for name in CRASHING]
    assert running(lab)


def test_the_command_inside_gdb_without_any(lab: Machine) -> None:
    output = in_gdb(lab, Stub(0), "xen crash trace", when={})
    assert "not decided: no hardware breakpoint can be set, and 4 are needed" in output
    assert running(lab)


def test_the_users_own_breakpoints_take_their_share(lab: Machine) -> None:
    output = in_gdb(lab, Stub(4), "hbreak *0x1000", "xen crash trace --timeout 20")
    assert "only 3 hardware breakpoints can be set, and 4 are needed: cpu-save cannot be seen" in output
    assert stages(output) == {**dict.fromkeys(CRASHING, 1), **dict.fromkeys(["nmi-taken", "cpu-stop"], 3)}


def test_the_command_inside_gdb_when_the_stub_refuses_late(lab: Machine) -> None:
    output = in_gdb(lab, Stub(0, generously=9), "xen crash trace", "xen crash status", when={})
    assert "not decided: gdb could not set its breakpoints: the machine takes no more hardware breakpoints" in output
    assert re.search(r"^stage +normal", output, re.MULTILINE)
    assert running(lab)


def test_gates_are_not_watched_when_the_machine_does_not_run(lab: Machine) -> None:
    own = [f"hbreak *{address:#x}" for address in range(0x1000, 0x1005)]
    output = in_gdb(lab, Stub(4), *own, "xen watch gates", "xen crash status", when={})
    assert re.search("^gdb could not set its breakpoints: the machine takes no more hardware breakpoints", output, re.M)
    assert re.search(r"^stage +normal", output, re.MULTILINE)


# -- watchpoints ------------------------------------------------------------------------------


def test_changes_of_gates_without_their_writers(lab: Machine) -> None:
    with limited(lab, stub := Stub(4, watched=8)) as socket:
        report = follow(lab, socket, gates=True)
    assert report["verdict"] == "pass" and stub.refused == 2  # the fifth breakpoint and the first watchpoint
    assert report["writers_absent"] == f"gdb:{socket} takes fewer than 8 watchpoints of 16 bytes"
    assert {change["cpu"] for change in report["gate_changes"]} == {0, 1, 2, 3}
    assert all(change["writers"] == [] for change in report["gate_changes"])


def test_gates_watched_by_hand_without_their_writers(lab: Machine) -> None:
    def crash(process: subprocess.Popen[str]) -> None:
        lab.serial.send(b"C")
        lab.serial.wait(rb"crash image: alive", 20)
        process.send_signal(signal.SIGINT)

    output = in_gdb(lab, Stub(4, watched=8), "xen watch gates", when={"watching ": crash})
    lines = output.strip().splitlines()
    assert re.fullmatch(r"writers not seen: gdb:\S+ takes fewer than 8 watchpoints of 16 bytes", lines[0])
    assert lines[1] == "watching 8 gates: Ctrl-C ends it"
    assert re.search(r"^ *0 +NMI +handler nmi -> trap_nop.* not seen$", output, re.MULTILINE), output


def test_what_kvm_cannot_do_is_refused_before_anything_is_changed(lab: Machine) -> None:
    kvm = "python from gdbplugin.target import LiveTarget; LiveTarget.accelerator = 'kvm'"
    registers = "info registers rip rcx"
    output = in_gdb(lab, Stub(4), kvm, registers, "echo === 2\\n", "set xen rdmsr on", "xen lapic", "echo === 3\\n",
                    registers, "echo === 4\\n", when={})  # fmt: skip
    before, said, after = re.split("=== [234]\n", output)[:3]
    assert before == after
    assert said == "set xen rdmsr is on: under KVM a step from another rip never ends; use set xen qmp-socket\n"
    with open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
        session.cli(kvm)
        assert session.xen("watch-gates-begin") == {
            "gates": 8, "writers_absent": "KVM has four watchpoints of 8 bytes, and each gate has 16"}  # fmt: skip
