"""The gdb session without a machine: what a TARGET is, which gdb is accepted, and the messages when nothing answers."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xen_symbols.absence import Undecidable
from xencrash import gdbmi
from xencrash.gdbmi import GdbDied, GdbSession, MiError, Stopped, Timeout, open_session
from xencrash.gdbprogram import find_gdb, parse_version, plugin_script
from xencrash.options import parse_live


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("gdb:localhost:1234", "localhost:1234"),
        ("gdb::1234", "localhost:1234"),
        ("gdb:[::1]:1234", "[::1]:1234"),
        ("gdb:/run/xen/gdb.sock", "/run/xen/gdb.sock"),
    ],
)
def test_a_live_target(target: str, address: str) -> None:
    assert parse_live(target) == address


@pytest.mark.parametrize("target", ["vmcore", "gdb:", "gdb:local", "gdb:local:", "gdb:a:0", "gdb:a:65536", "gdb:a:x"])
def test_what_is_not_a_live_target(target: str) -> None:
    with pytest.raises(Undecidable, match="gdb:HOST:PORT"):
        parse_live(target)


@pytest.mark.parametrize(
    ("words", "version"),
    [
        ("GNU gdb (Debian 13.1-3) 13.1\nCopyright", 13),
        ("GNU gdb (GDB) 18.1\n", 18),
        ("GNU gdb (GDB) Red Hat Enterprise Linux 8.2-20.el8", 8),
        ("GNU gdb (Ubuntu 12.1-0ubuntu1~22.04) 12.1", 12),
        ("lldb version 14.0.6", None),
        ("", None),
    ],
)
def test_a_gdb_version(words: str, version: int | None) -> None:
    assert parse_version(words) == version


@pytest.fixture
def fake_gdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "gdb"
    monkeypatch.setenv("XENCRASH_GDB", str(path))
    return path


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_missing_gdb(fake_gdb: Path) -> None:
    with pytest.raises(Undecidable, match=r"was not found: install gdb"):
        find_gdb()


def test_a_gdb_that_is_too_old(fake_gdb: Path) -> None:
    _script(fake_gdb, "echo 'GNU gdb (GDB) 11.2'")
    with pytest.raises(Undecidable, match=r"is gdb 11: 12 or newer"):
        find_gdb()


def test_nobodys_settings_are_run_to_ask_for_the_version(fake_gdb: Path) -> None:
    """gdb runs an early init file even then (gdb 11 and later)."""
    _script(fake_gdb, "[ \"$*\" = '-nx --version' ] && echo 'GNU gdb (GDB) 13.1'")
    assert find_gdb() == str(fake_gdb)


def test_a_gdb_that_does_not_start(fake_gdb: Path) -> None:
    _script(fake_gdb, "exit 1")
    with pytest.raises(Undecidable, match=r"--version failed"):
        find_gdb()


def test_a_gdb_that_ends_at_once(fake_gdb: Path) -> None:
    _script(fake_gdb, "[ \"$1\" = -nx ] && echo 'GNU gdb (GDB) 13.1' || echo 'no python here' >&2")
    with pytest.raises(GdbDied, match="no python here|gdb ended"):
        GdbSession()


def _reaped(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_gdb_is_reaped() -> None:
    with GdbSession() as session:
        pid = session._process.pid
        assert session.mi("-gdb-version") == {}
    assert _reaped(pid)


def test_gdb_is_reaped_when_killed() -> None:
    with GdbSession() as session:
        os.kill(session._process.pid, signal.SIGKILL)
        with pytest.raises(GdbDied, match="killed by SIGKILL"):
            session.mi("-gdb-version")
    assert _reaped(session._process.pid)


def test_results_belong_to_their_commands() -> None:
    with GdbSession() as session:
        for number in range(20):
            assert session.mi(f'-data-evaluate-expression "{number} + 1"')["value"] == str(number + 1)
        assert session.cli("print 6 * 7") == "$1 = 42\n"
        with pytest.raises(MiError, match='No symbol "nonsense"|No symbol table'):
            session.mi("-data-evaluate-expression nonsense")


def test_a_command_takes_any_text() -> None:
    with GdbSession() as session:
        assert session.cli('echo a "quoted" \\\\ word') == 'a "quoted" \\ word'


def test_what_takes_long_is_told_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    enough = tmp_path / "enough"

    def notice(text: str) -> None:
        told.append(text)
        if len(told) == 4:
            enough.touch()

    with GdbSession(notice=notice) as session:
        session.location = "gdb:localhost:1234"
        told.clear()
        monkeypatch.setattr(gdbmi, "_SAID_EVERY", 0.2)
        begun = time.monotonic()
        session.cli(
            "python import os, time; "
            f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(enough)!r}), True)]"
        )
        lasted = time.monotonic() - begun
    said = [re.fullmatch(r"gdb:localhost:1234 answers slowly: reading for (\d+) s so far", text) for text in told]
    seconds = [int(found[1]) for found in said if found]
    assert len(seconds) == len(told) and 4 <= len(told) <= lasted / 0.2
    assert seconds == sorted(seconds) and seconds[-1] <= round(lasted)



def test_without_a_machine_every_command_says_so() -> None:
    with GdbSession() as session:
        for name in ("idt", "cpus", "lapic", "crash-status", "crash-check", "crash-trace-begin"):
            with pytest.raises(Undecidable, match="gdb is not connected to QEMU"):
                session.xen(name)
        with pytest.raises(MiError, match="usage: xen idt"):
            session.xen("idt", "1", "2", "3")
        with pytest.raises(MiError, match="no trace has begun"):
            session.xen("crash-trace-stop")


def test_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(Undecidable, match=r"nothing to attach to at gdb:.*No such file or directory; start QEMU"):
        open_session(f"gdb:{tmp_path}/none")


@pytest.fixture
def silent_stub(tmp_path: Path) -> Iterator[Path]:
    """A stub that accepts connections and never answers, as QEMU's does while it serves another gdb."""
    path = tmp_path / "stub"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path


def test_a_stub_that_does_not_answer(silent_stub: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(Timeout, match="another debugger is attached"):
        open_session(f"gdb:{silent_stub}")
    assert time.monotonic() - begun < 10


def test_a_qmp_socket_that_is_not_there(silent_stub: Path, tmp_path: Path) -> None:
    with pytest.raises(Undecidable, match="cannot connect to QMP"):
        open_session(f"gdb:{silent_stub}", qmp=str(tmp_path / "none"))


def _packet(text: str) -> bytes:
    return f"${text}#{sum(text.encode()) & 0xFF:02x}".encode()


def _serve(listener: socket.socket) -> None:
    """A gdbstub that is not QEMU's: one stopped x86-64 thread, and only the oldest packets."""
    client, _ = listener.accept()
    answers = {"?": "S05", "g": "0" * 328, "qC": "QC1", "qfThreadInfo": "m1", "qsThreadInfo": "l", "qAttached": "1"}
    with client:
        pending = b""
        while received := client.recv(4096):
            pending += received
            while b"$" in pending and (end := pending.find(b"#", pending.index(b"$"))) >= 0 and len(pending) > end + 2:
                command = pending[pending.index(b"$") + 1 : end].decode()
                pending = pending[end + 3 :]
                client.sendall(b"+" + _packet("OK" if command[0] in "HDT" else answers.get(command, "")))


def test_a_stub_that_is_not_qemus(tmp_path: Path) -> None:
    path = tmp_path / "stub"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        with pytest.raises(Undecidable, match="is not QEMU's gdbstub"):
            open_session(f"gdb:{path}")


@pytest.mark.parametrize("lost", [0, 2])
def test_an_interrupt_that_is_lost_is_sent_again(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As QEMU loses one that comes between a step over a breakpoint and the machine's running on."""
    sent: list[str] = []
    monkeypatch.setattr(GdbSession, "mi", lambda self, command, timeout=0.0: sent.append(command))
    stop = Stopped("signal-received", "SIGINT")
    monkeypatch.setattr(GdbSession, "wait_stop", lambda self, timeout: stop if len(sent) > lost else None)
    session = GdbSession.__new__(GdbSession)
    session._running = True
    session.interrupt()
    assert sent == ["-exec-interrupt --all"] * (lost + 1)


def test_a_machine_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GdbSession, "mi", lambda self, command, timeout=0.0: None)
    monkeypatch.setattr(GdbSession, "wait_stop", lambda self, timeout: time.sleep(0.01))
    monkeypatch.setattr(gdbmi, "COMMAND_SECONDS", 0.1)
    session = GdbSession.__new__(GdbSession)
    session._running, session.location = True, "gdb:localhost:1234"
    with pytest.raises(Timeout, match="^gdb:localhost:1234 does not stop: QEMU hangs, or is very busy$"):
        session.interrupt()


def test_the_plugin_is_found_without_importing_it() -> None:
    assert plugin_script().name == "load.py"
    assert plugin_script().is_file()


@pytest.mark.parametrize("name", [os.fsdecode(b"xen-\xff\xe4"), "xen-syms", "with a space"])
def test_a_symbols_path_that_gdb_could_not_hand_to_python(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("the file")
    monkeypatch.setattr(GdbSession, "attach", lambda self, target, qmp=None: None)
    with GdbSession() as session:
        for _ in range(2):  # one machine after another
            session.open("gdb:localhost:1234", str(tmp_path / name))
            shown = session.cli("python print(open(gdb.parameter('xen symbols')).read())")
            assert shown == "the file\n"
        folder = Path(session._folder.name)
    assert not folder.exists()
