"""Commands in dom0, over a serial line that loses bytes."""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from xencrash.lab import dom0
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.qemu import Paths
from xencrash.lab.runs import State


class Shell(threading.Thread):
    """dom0 at the other end of the line. What it ran is in `ran`, and what `echo` says in the line's log, unless it is
    `mute`; of what is typed first the byte at `lost` does not arrive."""

    def __init__(self, paths: Paths, lost: int | None = None, mute: bool = False) -> None:
        super().__init__(daemon=True)
        self.ran: list[str] = []
        self.typed = 0  # times
        self._lost, self._mute, self._log = lost, mute, paths.line_log
        self._log.write_bytes(b"@shell ready\r\n")
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(paths.line))
        self._listening.listen()
        self.start()

    def run(self) -> None:
        line, _ = self._listening.accept()
        unread = bytearray()
        with line, self._listening:
            while data := bytearray(line.recv(1 << 16)):
                self.typed += 1
                if self.typed == 1 and self._lost is not None:
                    del data[self._lost]
                *requests, unread = (unread + data).split(b"\n")
                for request in requests:
                    self._execute(request)

    def _execute(self, request: bytes) -> None:
        try:
            _, code = request.split()
            command = base64.b64decode(code, validate=True).decode()
        except ValueError:
            return
        self.ran.append(command)
        if (said := re.match(r"echo ([^;]+);", command)) and not self._mute:
            with self._log.open("ab") as log:
                log.write(said[1].encode() + b"\r\n")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    state = State(0, 0, "", 1, 4, 4, "Xen 4.17", "7.2", True)
    made = Machine(Paths(tmp_path), state, False, lambda text: None)
    monkeypatch.setattr(made, "alive", lambda: True)
    monkeypatch.setattr(made, "qmp", lambda command, **_: {"status": "running"})
    monkeypatch.setattr(dom0, "_TYPED_AGAIN_AFTER", 0.05)
    yield made
    made.dom0.close()


PANIC = "; taskset -p 4 $$ >/dev/null && { echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; }"


# Of a token of eight digits, a space, the command in base64 and a newline.
@pytest.mark.parametrize("lost", [8, 9, 100, -2, -1])
def test_a_panic_that_does_not_arrive_is_typed_again(lost: int, lab: Machine) -> None:
    shell = Shell(lab.paths, lost)
    lab.crash("panic", 2)
    assert shell.typed > 1
    assert shell.ran[-1].endswith(PANIC)


def test_a_panic_that_arrives_is_typed_once(lab: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dom0, "_TYPED_AGAIN_AFTER", 60.0)
    shell = Shell(lab.paths)
    lab.crash("panic", 2)
    assert shell.typed == len(shell.ran) == 1


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "on the console"])
def test_a_crash_that_is_seen_needs_no_sign_of_dom0(
    stopped: bool, lab: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(lab.paths, mute=True)
    crashed = b"(XEN) Hardware Dom0 crashed: Executing kexec image on cpu2\r\n"
    lab.paths.serial_log.write_bytes(crashed)  # before a reset

    def qmp(command: str, **_: object) -> dict[str, str]:
        now = shell.typed >= 3
        lab.paths.serial_log.write_bytes(crashed * (1 + (now and not stopped)))
        return {"status": "debug" if now and stopped else "running"}

    monkeypatch.setattr(lab, "qmp", qmp)
    lab.crash("panic", 2)
    assert shell.typed >= 3


def test_a_dom0_that_does_not_answer_is_given_up(lab: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    Shell(lab.paths, mute=True)
    monkeypatch.setattr(dom0, "BUSY_ANSWERS", 0.3)
    with pytest.raises(LabError, match="^running 'echo 1 >/proc/sys/kernel/sysrq; .*' in dom0: nothing after 0 s"):
        lab.crash("panic")
