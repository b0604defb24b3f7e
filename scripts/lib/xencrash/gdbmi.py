"""gdb driven from outside over its machine interface: by tokens and results, never by waiting times.

One `GdbSession` is one gdb with the plugin loaded. It always ends that gdb, and leaves the machine as it was found:
running, or stopped. What goes wrong is an Undecidable of one line: gdb ended, the machine went away, nobody answers.
It is one module, of more than 400 lines, since each step from start to end depends on what state the others left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from xen_symbols.absence import Undecidable
from xen_symbols.targets.qmp import Qmp, QmpError
from xen_symbols.xen.given import NOTHING_GIVEN, Given
from xencrash.gdbprogram import find_gdb, gdb_arguments, path_for_gdb, plugin_script, plugin_settings
from xencrash.mi import Record, Records
from xencrash.options import parse_live

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


ATTACH_SECONDS = 4.0  # QEMU's stub answers within milliseconds; one that serves another gdb never does
FREE_SECONDS = 60.0  # where QMP says that it serves nobody: on a busy host it may be slow
COMMAND_SECONDS = 120.0  # a busy host takes its time, a slow line for each of a thousand packets
_INTERRUPT_AGAIN = 3.0
_LEAVE_SECONDS = 3.0
_SAID_EVERY = 5.0
_POLL_SECONDS = 0.05


class GdbDied(Undecidable):
    """The gdb that was driven ended by itself, or was killed."""


class TargetLost(Undecidable):
    """QEMU, or the connection to it, is gone."""


class MiError(Undecidable):
    """gdb answered ^error; the message is gdb's, or the plugin's."""


class NotRun(Undecidable):
    """gdb said that the machine runs, and then why it does not."""


class Timeout(Undecidable):
    """Something that should have been answered was not."""


@dataclass(frozen=True)
class Stopped:
    """A *stopped record: gdb's reason (None when gdb gives none), and the signal if that was it."""

    reason: str | None
    signal: str | None = None


_NOT_SET = re.compile(r"(?:Cannot|Could not) insert hardware|too many hardware breakpoints")  # gdb's words
_GONE_REASONS = ("exited", "exited-normally", "exited-signalled")
# gdb's words when its connection breaks, and the plugin's.
_GONE_WORDS = re.compile(
    r"Remote connection closed|Remote communication error|connection to \S+ was lost|machine is gone|"
    r"target is not responding|Command aborted|not connected to QEMU",
    re.IGNORECASE,
)


class GdbSession:
    """A gdb of ours and, after `attach`, the machine that it stopped. A context manager."""

    def __init__(self, gdb: str | None = None, notice: Callable[[str], None] | None = None) -> None:
        """`gdb` is the program to use (None: `find_gdb`). `notice` is told, every few seconds, that an answer takes
        long."""
        self.location = ""
        self._notice = notice
        self._found_running: bool | None = None
        self._attached = False
        self._running = False
        self._token = 0
        self._results: dict[int, Record] = {}
        self._stops: deque[Stopped] = deque()
        self._console: list[str] = []
        self._log: deque[str] = deque(maxlen=20)
        self._breakpoints: dict[int, str] = {}  # gdb's numbers of them, by address
        self._run_token: str | int | None = None  # of the last command that gdb answered with ^running
        self._refused: str | None = None  # why the machine did not run, after all
        self._lost = False
        command = [gdb or find_gdb(), *gdb_arguments(), "--interpreter=mi3"]
        # Its own session: Ctrl-C on the terminal is ours to handle.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            start_new_session=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="xencrash-")  # ended with gdb, which may not have started
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._records = self._process.stdin, Records(self._process.stdout)
        try:
            for name, value in (("mi-async", "on"), ("pagination", "off"), ("width", "0")):
                self.mi(f"-gdb-set {name} {value}")
            self.cli(f"source {plugin_script()}")
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> GdbSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- commands -----------------------------------------------------------------------------

    def mi(self, command: str, timeout: float = COMMAND_SECONDS) -> Json:
        """The payload of an MI command's result. Raises MiError, or the reason why there is no result."""
        self._token += 1
        token = self._token
        self._send(f"{token}{command}")
        begun = said = time.monotonic()
        while token not in self._results:
            now = time.monotonic()
            if now > begun + timeout:
                raise Timeout(f"gdb did not answer {command.split()[0]} within {timeout:.0f} s")
            if self._notice is not None and now > said + _SAID_EVERY:
                said = now
                self._notice(f"{self.location or 'gdb'} answers slowly: reading for {now - begun:.0f} s so far")
            self._receive()
        result = self._results.pop(token)
        payload: Json = result["payload"] or {}
        if result["message"] == "error":
            message = " ".join(str(payload.get("msg", "")).split())
            if self._attached and (self._lost or _GONE_WORDS.search(message)):
                raise self._target_lost()
            raise MiError(message)
        return payload

    def cli(self, command: str, timeout: float = COMMAND_SECONDS) -> str:
        """What a command of gdb's command line printed."""
        self._console.clear()
        self.mi(f"-interpreter-exec console {_quoted(command)}", timeout)
        return "".join(self._console)

    def xen(self, name: str, *arguments: str, timeout: float = COMMAND_SECONDS) -> Json:
        """The answer of one of the plugin's commands: `xen("idt", "0")`, `xen("crash-check")`."""
        words = "".join(f" {_quoted(argument)}" for argument in arguments)
        answer: Json = json.loads(self.mi(f"-xen-{name}{words}", timeout)["json"])
        return answer

    def set(self, name: str, value: str) -> None:
        """One of the plugin's settings."""
        self.cli(f"set xen {name} {value}")

    # -- the machine --------------------------------------------------------------------------

    def open(
        self,
        target: str,
        symbols: str | None = None,
        qmp: str | None = None,
        given: Given = NOTHING_GIVEN,
    ) -> None:
        """Tell the plugin what the user said, and attach to the machine; one after another, if wished. Settings that
        are not given stay as they are. Raises Undecidable."""
        ours = path_for_gdb(symbols, Path(self._folder.name)) if symbols else None
        for name, value in plugin_settings(ours, qmp, given).items():
            self.set(name, value)
        self.attach(target, qmp)

    def attach(self, target: str, qmp: str | None = None) -> None:
        """Connect to a machine and stop it. `target` as the user named it. Raises Undecidable.

        Whether it ran before is known from QMP, or else from the monitor: a machine that QEMU calls just `paused` was
        running until gdb's arrival, unless somebody had paused it by hand; without QMP that is not known, and it
        runs on afterwards.
        """
        address = parse_live(target)
        self.location = target
        running = _ask_before_attaching(target, qmp) if qmp else None
        try:
            self.mi(f"-target-select remote {address}", ATTACH_SECONDS if running is None else FREE_SECONDS)
        except Timeout:
            self._process.kill()  # it would go on trying
            raise Timeout(
                f"{target} accepts connections but does not answer: another debugger is attached (QEMU serves one "
                "at a time: detach that one), or it is not a gdbstub"
            ) from None
        except MiError as error:
            why = str(error).rstrip(".")
            raise Undecidable(
                f"nothing to attach to at {target}: {why}; start QEMU with -gdb, or check that it still runs"
            ) from None
        self._attached, self._lost = True, False
        self._stops.clear()
        self._running = False
        if running is None:
            try:
                status = self.cli("monitor info status")
            except MiError as error:
                raise Undecidable(f"{target} is not QEMU's gdbstub: it has no monitor ({error})") from None
            running = re.search(r"VM status: (?:running|paused)\s*$", status) is not None
        self._found_running = running

    def break_at(self, address: int) -> None:
        """A hardware breakpoint, removed again when the machine is left."""
        if address not in self._breakpoints:
            self._breakpoints[address] = self.mi(f"-break-insert -h *{address:#x}")["bkpt"]["number"]

    def set_breakpoints(self, addresses: Iterable[int]) -> None:
        """Hardware breakpoints at these addresses, and no others of ours."""
        wanted = dict.fromkeys(addresses)
        if gone := [address for address in self._breakpoints if address not in wanted]:
            self.mi(f"-break-delete {' '.join(self._breakpoints.pop(address) for address in gone)}")
        for address in wanted:
            self.break_at(address)

    def run(self) -> None:
        """Let the machine run; `wait_stop` says when it stops."""
        self._stops.clear()
        self._log.clear()
        self._refused = None
        self.mi("-exec-continue")
        self._running = True

    def wait_stop(self, timeout: float | None) -> Stopped | None:
        """The next stop; None when there is none within `timeout` seconds. Raises TargetLost or GdbDied."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._stops:
            if self._lost:
                raise self._target_lost()
            if self._refused is not None:
                self._running = False
                raise NotRun(self._refused)
            if deadline is not None and time.monotonic() > deadline:
                return None
            self._receive()
        self._running = False
        stopped = self._stops.popleft()
        if self._lost or stopped.reason in _GONE_REASONS:
            raise self._target_lost()
        return stopped

    def interrupt(self) -> None:
        """Stop the running machine."""
        if not self._running:
            return
        deadline = time.monotonic() + COMMAND_SECONDS
        while time.monotonic() < deadline:
            # QEMU passes over an interrupt that comes while it is stopped, after a step over a breakpoint, and gdb then
            # lets it run on. One too many is passed over, too: to ask again does no harm.
            self.mi("-exec-interrupt --all")
            if self.wait_stop(_INTERRUPT_AGAIN) is not None:
                return
        raise Timeout(f"{self.location} does not stop: QEMU hangs, or is very busy")

    def leave(self, running: bool | None = None) -> None:
        """Let go of the machine: running or stopped as asked, or as it was found."""
        if not self._attached:
            return
        running = bool(self._found_running) if running is None else running
        self.interrupt()
        self.set_breakpoints(())
        self.mi("-target-detach" if running else "-target-disconnect")
        self._attached = False

    def close(self) -> None:
        """Leave the machine as it was found, if it is still there, and end gdb."""
        try:
            if self._attached and not self._lost and self._process.poll() is None:
                with contextlib.suppress(Undecidable):  # it is going away, and so are we
                    self.leave()
        finally:
            self._end()

    # -- gdb itself ---------------------------------------------------------------------------

    def _send(self, line: str) -> None:
        try:
            self._stdin.write(f"{line}\n".encode())
        except OSError:
            raise self._died() from None

    def _receive(self) -> None:
        """Take in what gdb has sent; wait for it a short while."""
        ended = self._process.poll() is not None  # before reading: what it said last is seen
        records = self._records.read(_POLL_SECONDS)
        for record in records:
            self._take(record)
        if ended and not records:
            raise self._died()

    def _take(self, record: Record) -> None:
        kind, payload = record["type"], record["payload"]
        if kind == "result" and record["token"] is not None:
            self._take_result(record)
        elif kind == "notify" and record["message"] == "stopped":
            self._stops.append(Stopped(payload.get("reason"), payload.get("signal-name")))
        elif kind == "notify" and record["message"] == "thread-group-exited":
            self._lost = self._attached
        elif kind in ("console", "target") and payload:  # the second is what QEMU's monitor prints
            self._console.append(payload)
        elif kind in ("log", "output") and str(payload).strip():
            self._log.append(str(payload).strip())

    def _take_result(self, record: Record) -> None:
        """A command has one result, but for one that lets the machine run: gdb may find afterwards that it cannot."""
        token = record["token"]
        if record["message"] == "running":
            self._run_token = token
        if token == self._run_token and record["message"] == "error":
            self._refused = self._why_not_run(str((record["payload"] or {}).get("msg", "")))
        else:
            self._results[token] = record

    def _why_not_run(self, message: str) -> str:
        """What gdb says in its log, of breakpoints that it could not set, or else in its second result."""
        said = " ".join([*self._log, message])
        if not _NOT_SET.search(said):
            return f"gdb did not let the machine run: {' '.join(said.split())}"
        return (
            f"gdb could not set its breakpoints: {self.location} takes no more hardware breakpoints (KVM has four, "
            "watchpoints included)"
        )

    def _died(self) -> GdbDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_SECONDS)  # its pipes break a little before it can be reaped
        status = self._process.poll()
        killed = status is not None and status < 0
        how = f"was killed by {signal.Signals(-status).name}" if status is not None and killed else "ended"
        said = f" ({self._log[-1]})" if self._log and not killed else ""
        left = f"; {self.location} is left as it is, breakpoints and all: attach again and detach" * self._attached
        return GdbDied(f"gdb {how}{said}{left}")

    def _target_lost(self) -> TargetLost:
        self._attached = False
        return TargetLost(
            f"QEMU at {self.location} went away: the guest was reset with -no-reboot, or QEMU ended; see its log"
        )

    def _end(self) -> None:
        """End gdb, by asking and then by force, and reap it."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            # An attached gdb would detach, and so let the machine run: what we could not leave is left stopped.
            if self._attached:
                self._process.kill()
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()  # type: ignore[union-attr]
            self._folder.cleanup()


def _quoted(text: str) -> str:
    """A C string, as MI takes it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _ask_before_attaching(target: str, socket: str) -> bool:
    """Whether the machine runs, by QMP. Raises Undecidable, also when a debugger is attached already: a second one
    would wait, and stop the machine whenever the first leaves."""
    if Path(target.removeprefix("gdb:")).resolve() == Path(socket).resolve():  # connecting would stop the machine
        raise Undecidable(f"{socket} is the gdbstub's socket: --qmp takes that of QEMU's option -qmp")
    try:
        with Qmp(socket) as qmp:
            stubs = [device["filename"] for device in qmp.execute("query-chardev") if device["label"] == "gdb"]
            if stubs and not stubs[0].startswith("disconnected:"):
                raise Undecidable(f"another debugger is attached to {target}: QEMU serves one at a time: detach it")
            return bool(qmp.execute("query-status")["status"] == "running")
    except QmpError as error:
        raise Undecidable(str(error)) from None


def open_session(
    target: str,
    symbols: str | None = None,
    qmp: str | None = None,
    given: Given = NOTHING_GIVEN,
    *,
    gdb: str | None = None,
    notice: Callable[[str], None] | None = None,
) -> GdbSession:
    """A session attached to a machine, with the user's options set in the plugin; the rest as for GdbSession. Raises
    Undecidable."""
    parse_live(target)
    session = GdbSession(gdb, notice)
    try:
        session.open(target, symbols, qmp, given)
    except BaseException:
        session.close()
        raise
    return session
