"""Traces that go well, and traces that end early: each gives a report, in time, and leaves no gdb behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import gdb, guest, named, ram, ready, target
from xen_symbols.absence import Undecidable
from xen_symbols.symbols.load import load_symbols
from xencrash.gdbmi import GdbSession, open_session
from xencrash.lab.machine import Machine
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]
EARLY = 5.0  # seconds within which the end of a machine or of gdb is reported


@pytest.fixture
def lab() -> Iterator[Machine]:
    with guest() as machine:
        yield machine


@pytest.fixture(autouse=True)
def no_gdb_is_left() -> Iterator[None]:
    yield
    assert _gdbs() == []


def _gdbs() -> list[int]:
    """The gdbs that are children of this process, whatever their program is called."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if parent == os.getpid() and b"--interpreter=mi3" in words:
            found.append(int(folder.name))
    return found


def follow(lab: Machine, trigger: Callable[[], None] | None = None, **more: Any) -> Json:
    more = {"timeout": 20, "stall": 5, **more}
    press = trigger or (lambda: lab.serial.send(b"C"))
    return trace(target(lab), str(lab.symbols), str(lab.qmp_socket), trigger=press, **more)


def stages(report: Json) -> list[str]:
    return [stage["stage"] for stage in report["stages"]]


def symbol(lab: Machine, name: str) -> int:
    return load_symbols(str(lab.symbols)).address(name)


def state(lab: Machine) -> str:
    return str(lab.qmp("query-status")["status"])


def test_every_stage_in_order(lab: Machine) -> None:
    messages: list[str] = []
    report = follow(lab, progress=lambda stage, findings: messages.append(stage["stage"]))
    assert report["verdict"] == "pass" and "undecided" not in report
    assert report["target"]["accelerator"] == "tcg"
    assert messages == stages(report)
    crashing = [name for name in messages if name not in ("nmi-taken", "cpu-save", "cpu-stop")]
    assert crashing == ["normal", "crash-entry", "shutdown-entry", "shootdown", "shootdown-done", "crash-info",
                        "exec-entry", "nmis-unblocked", "handover", "after-handover"]  # fmt: skip
    for name in ("nmi-taken", "cpu-save", "cpu-stop"):
        assert sorted(stage["cpu"] for stage in report["stages"] if stage["stage"] == name) == [1, 2, 3]
    assert {finding["stop"] for finding in report["findings"]} == set(range(len(messages)))
    # The machine runs on, without our breakpoints, into its crash kernel.
    lab.serial.wait(rb"crash image: alive", 10)


def test_it_can_be_left_at_the_last_stage(lab: Machine) -> None:
    report = follow(lab, leave_stopped=True)
    assert report["verdict"] == "pass"
    assert state(lab) == "debug"
    with open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
        status = session.xen("crash-status")
    assert (status["stage"], status["crashing_cpu"]) == ("handover", 0)


def test_what_is_changed_at_a_stop_is_found_there(lab: Machine) -> None:
    """Clear crash_save_done of CPU 2 at the last stage: that check, on that CPU, and nothing else."""

    def change(session: GdbSession) -> None:
        if session.mi(f'-data-evaluate-expression "$pc == {reloc}"')["value"] == "1":
            where = session.xen("percpu", "crash_save_done", "2")["cpus"][0]["address"]
            with ram(lab) as memory:
                memory[int(session.xen("vtop", where)["physical"], 16)] = 0

    reloc = symbol(lab, "kexec_reloc")
    report = follow(lab, on_stop=change)
    assert report["verdict"] == "fail"
    assert named(report["findings"]) == [("crash-save-done", 2)] * 2  # there, and after the handover


def test_a_path_that_stalls(lab: Machine) -> None:
    """An endless loop where the crashing CPU would leave: the stages so far are judged, and the end is missed."""

    def block(session: GdbSession) -> None:
        with ram(lab) as memory:
            at = int(session.xen("vtop", "machine_kexec")["physical"], 16)
            memory[at : at + 2] = b"\xeb\xfe"  # jmp to itself

    report = follow(lab, on_stop=block, stall=2)
    assert report["verdict"] == "fail"
    assert named(report["findings"]) == [("trace-complete", 0)]
    assert stages(report)[-1] == "exec-entry"
    assert state(lab) == "running"  # as it was found


def test_no_crash_in_time(lab: Machine) -> None:
    begun = time.monotonic()
    report = follow(lab, trigger=lambda: None, timeout=1)
    assert time.monotonic() - begun < 1 + EARLY
    assert (report["verdict"], report["undecided"]) == ("unknown", "Xen did not crash within 1 s")
    assert stages(report) == ["normal"]
    assert state(lab) == "running"


def test_a_trace_that_comes_too_late(lab: Machine) -> None:
    assert follow(lab)["verdict"] == "pass"
    with pytest.raises(Undecidable, match="has begun to crash already"):
        follow(lab)


def test_the_machine_is_stopped_by_something_else(lab: Machine) -> None:
    def stop() -> None:
        while state(lab) != "running":  # gdb says that it runs before it does
            time.sleep(0.01)
        lab.qmp("stop")

    report = follow(lab, trigger=stop)
    assert report["undecided"] == "the machine was stopped by something else (SIGINT) while it was followed"
    assert report["verdict"] == "unknown"


class Ending:
    """Something that ends a trace from outside, and when."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self.at = 0.0

    def __call__(self, *_: Any) -> None:
        if not self.at:
            self.at = time.monotonic()
            self._end()

    def assert_reported(self, report: Json, says: str) -> None:
        assert self.at and time.monotonic() - self.at < EARLY
        assert re.search(says, report["undecided"]), report["undecided"]
        assert report["verdict"] == "unknown"
        assert stages(report)[0] == "normal" and len(report["findings"]) > 50  # what was found so far


GONE = "QEMU at gdb:.* went away: the guest was reset with -no-reboot, or QEMU ended; see its log"


def test_qemu_is_killed_while_a_crash_is_waited_for(lab: Machine) -> None:
    kill = Ending(lambda: os.kill(lab.qemu_pid, signal.SIGKILL))
    kill.assert_reported(follow(lab, trigger=kill), GONE)


@pytest.mark.parametrize("stage", ["shootdown", "cpu-save", "handover"])
def test_qemu_is_killed_at_a_stage(lab: Machine, stage: str) -> None:
    kill = Ending(lambda: os.kill(lab.qemu_pid, signal.SIGKILL))
    report = follow(lab, progress=lambda seen, _: kill() if seen["stage"] == stage else None)
    kill.assert_reported(report, GONE)
    # Several other CPUs may have stopped at once.
    assert stages(report)[-1] in ({"nmi-taken", "cpu-save", "cpu-stop"} if stage == "cpu-save" else {stage})
    assert ("whether the other CPUs came to rest was not seen" in report["undecided"]) is (stage == "handover")


def test_the_guest_is_reset(lab: Machine) -> None:
    """With -no-reboot, as the lab starts it, QEMU then ends."""
    reset = Ending(lambda: lab.qmp("system_reset"))
    reset.assert_reported(follow(lab, trigger=reset), GONE)


def test_the_guest_is_reset_and_boots_again() -> None:
    with guest(qemu_args=("-action", "reboot=reset")) as lab:
        reset = Ending(lambda: lab.qmp("system_reset"))
        report = follow(lab, trigger=reset)
        reset.assert_reported(report, "^the machine was reset before a crash began$")


@pytest.mark.parametrize("stage", ["shutdown-entry", "nmi-taken", "crash-info", "handover"])
def test_the_guest_is_reset_on_the_path_and_boots_again(stage: str) -> None:
    """No breakpoint is left for that: the machine is looked at once nothing more comes."""
    with guest(qemu_args=("-action", "reboot=reset")) as lab:
        reset = Ending(lambda: lab.qmp("system_reset"))
        report = follow(lab, progress=lambda seen, _: reset() if seen["stage"] == stage else None, stall=30)
        reset.assert_reported(report, "^the guest was reset while its crash was followed: the dump is lost; see its")
        assert state(lab) == "running"


def test_gdb_is_killed(lab: Machine) -> None:
    kill = Ending(lambda: [os.kill(pid, signal.SIGKILL) for pid in _gdbs()])
    report = follow(lab, trigger=kill)
    kill.assert_reported(report, "gdb was killed by SIGKILL; gdb:.* is left as it is")


def test_an_error_of_the_trigger_reaches_the_caller(lab: Machine) -> None:
    def fail() -> None:
        raise ValueError("of the caller's")

    with pytest.raises(ValueError, match="of the caller's"):
        follow(lab, trigger=fail)
    assert state(lab) == "running"


# -- inside gdb -------------------------------------------------------------------------------


WAITING = "waiting for Xen to crash"


def interrupt(process: subprocess.Popen[str]) -> None:
    time.sleep(0.5)  # until it runs
    process.send_signal(signal.SIGINT)


def test_the_command_inside_gdb(lab: Machine) -> None:
    output = gdb(lab, "xen crash trace --timeout 20", "info breakpoints", "xen crash report", "maint info breakpoints",
                 when={WAITING: lambda _: lab.serial.send(b"C")})  # fmt: skip
    # gdb itself says that it was interrupted, for the look after the handover.
    said = re.sub(r"^\nThread 1 received signal SIGINT, Interrupt\.\n.*\n", "", output, flags=re.MULTILINE)
    lines = [line.split()[0] for line in said.partition("\ntarget ")[0].splitlines()]
    assert lines[:4] == ["waiting", "crash-entry", "shutdown-entry", "shootdown"] and lines[-1] == "after-handover"
    assert len(lines) == 1 + 9 + 3 * 3
    verdicts = re.findall(r"^PASS +(\d+ pass)", output, re.MULTILINE)
    assert len(verdicts) == 2 and verdicts[0] == verdicts[1]  # the trace's report, and the same again
    assert re.search("^No breakpoints", output, re.MULTILINE)
    assert not re.search(r"^-\d+ .*hw breakpoint", output, re.MULTILINE)
    assert "hit" not in output and "Traceback" not in output


def test_the_command_inside_gdb_gives_up(lab: Machine) -> None:
    output = gdb(lab, "xen crash trace --timeout 1", "info breakpoints", "xen crash status")
    assert "not decided: Xen did not crash within 1 s" in output
    assert re.search("^No breakpoints", output, re.MULTILINE)
    assert re.search(r"^stage +normal", output, re.MULTILINE)
    assert state(lab) == "running"


def test_the_command_inside_gdb_sees_a_reset() -> None:
    with guest(qemu_args=("-action", "reboot=reset")) as lab:
        output = gdb(lab, "xen crash trace --timeout 20", when={WAITING: lambda _: lab.qmp("system_reset")})
        assert "not decided: the machine was reset before a crash began" in output
        lab.serial.wait(rb"CPUs ready[^$]*CPUs ready", 30)
        reset = (
            "python import socket\n"
            "def reset(event):\n"
            "    if gdb.newest_frame().pc() != crash_info: return\n"
            "    s = socket.socket(socket.AF_UNIX); s.connect('QMP'); s.recv(4096)\n"
            "    for word in ('qmp_capabilities', 'system_reset'):\n"
            "        s.send(b'{\"execute\": \"%s\"}' % word.encode()); s.recv(4096)\n"
            "gdb.events.stop.connect(reset)"
        ).replace("QMP", str(lab.qmp_socket)).replace("crash_info", str(symbol(lab, "kexec_crash_save_info")))
        output = gdb(lab, reset, "xen crash trace --timeout 20", qmp=False,
                     when={WAITING: lambda _: lab.serial.send(b"C")})  # fmt: skip
    assert "not decided: the guest was reset while its crash was followed: the dump is lost" in output, output
    assert re.search("^crash-info ", output, re.MULTILINE)


def test_the_command_inside_gdb_is_interrupted(lab: Machine) -> None:
    output = gdb(lab, "xen crash trace", "xen crash status", when={WAITING: interrupt})
    assert "not decided: interrupted before the crash path came to its end" in output
    assert re.search(r"^stage +normal", output, re.MULTILINE)


def test_the_command_inside_gdb_loses_qemu(lab: Machine) -> None:
    kill = f"(sleep 1; kill -9 {lab.qemu_pid}) &"  # begun as gdb lets the machine run
    output = gdb(lab, f"python import os; gdb.events.cont.connect(lambda _: os.system({kill!r}))", "xen crash trace")
    assert re.search("not decided: .*(went away|was lost|closed)", output), output
    assert "Traceback" not in output


# -- real Xen ---------------------------------------------------------------------------------


def test_real_xen_crashes_on_a_chosen_cpu() -> None:
    with ready(dom0_vcpus=4) as lab:
        report = follow(lab, trigger=lambda: lab.crash("panic", cpu=2), timeout=60, stall=30)
        assert report["verdict"] == "pass", named(report["findings"])
        assert report["crashing_cpu"] == 2 and stages(report)[-1] == "after-handover"
        assert {stage["cpu"] for stage in report["stages"] if stage["stage"] == "nmi-taken"} == {0, 1, 3}


def test_real_xen_without_a_crash_kernel() -> None:
    with ready(crash_kernel=False) as lab:
        hint = "no crash kernel was loaded: load one with kexec -p in dom0"
        told: list[str] = []
        report = follow(lab, trigger=lab.crash, timeout=3, notice=told.append)  # the key does nothing at all
        assert report["undecided"] == f"Xen did not crash within 3 s; {hint}"
        assert [text[:60] for text in told] == ["this trace will end early: no crash kernel is loaded: kexec_c"[:60]]
        output = gdb(lab, "xen crash trace --timeout 1", "xen preflight")
        assert output.startswith(f"{told[0]}\n{WAITING}")
        assert re.search(r"^fail +crash-image +not loaded\nfail +crash-area +nothing$", output, re.MULTILINE)
        report = follow(lab, trigger=lambda: lab.crash("panic"), timeout=30)
        assert report["undecided"].startswith("no crash kernel is loaded: kexec_crash() returns at once")
        assert stages(report) == ["normal", "crash-entry"]
