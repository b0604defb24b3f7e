"""A small synchronous client of QEMU's machine protocol (QMP) over a unix socket or TCP.

It runs anywhere, gdb's own Python included. QEMU serves one client of a QMP socket at a time:
a second one connects and is never greeted, which shows here as a QmpError after the timeout.
Protocol: QEMU's docs/interop/qmp-spec (greeting, qmp_capabilities, return/error/event objects).
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class QmpError(Exception):
    """QEMU refused a command, answered nothing in time, or is gone. The message is one line."""


def place(address: str) -> str | tuple[str, int]:
    """Where to connect to: HOST and PORT of `HOST:PORT`, or else the absolute path of a socket."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdecimal() and not Path(address).exists():
        return host.strip("[]") or "localhost", int(port)
    return str(Path(address).expanduser().absolute())


def absolute(address: str) -> str:
    """The same address for a process in another folder."""
    where = place(address)
    return where if isinstance(where, str) else f"{where[0]}:{where[1]}"


def _connected(address: str, timeout: float) -> socket.socket:
    """Raises QmpError."""
    where = place(address)
    try:
        if not isinstance(where, str):
            return socket.create_connection(where, timeout)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(where)
        except BaseException:
            connection.close()
            raise
    except socket.gaierror as error:
        raise QmpError(f"cannot connect to QMP at {address}: unknown host {where[0]} ({error.strerror})") from error
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise QmpError(f"cannot connect to QMP at {address}: {why}; QEMU's option -qmp says where it is") from error
    return connection


class Qmp:
    """One connection, negotiated when the constructor returns. `path` is a unix socket's, or HOST:PORT.

    `timeout` is in seconds and bounds the connection, and each command unless it brings its own.
    Events that arrive meanwhile are kept in `events`, oldest first, as QEMU sent them.
    """

    def __init__(self, path: str | Path, timeout: float = 5.0) -> None:
        self.path = str(path)
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []
        self._pending = b""
        self._sent = 0
        self._socket = _connected(self.path, timeout)
        try:
            self._greet(time.monotonic() + timeout)
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """What `command` returned. An underscore in an argument's name stands for QMP's hyphen."""
        return self.execute_for(self.timeout, command, **arguments)

    def execute_for(self, timeout: float, command: str, /, **arguments: Any) -> Any:
        """As `execute`, for a command that may take `timeout` seconds (a dump, say)."""
        deadline = time.monotonic() + timeout
        self._sent += 1
        request: dict[str, Any] = {"execute": command, "id": self._sent}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"QEMU is gone: {self.path} took no {command}: {error.strerror or error}") from error
        while True:
            message = self._message(deadline, f"the answer to {command}")
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == self._sent:
                if "error" in message:
                    raise QmpError(f"QEMU refused {command}: {message['error'].get('desc', message['error'])}")
                return message.get("return")
            elif "error" in message and "id" not in message:  # the request itself could not be parsed
                raise QmpError(f"QEMU did not understand {command}: {message['error'].get('desc')}")
            # Else the late answer to a command that timed out: nobody waits for it any more.

    def last_events(self, timeout: float = 1.0) -> list[dict[str, Any]]:
        """Every event so far, with those that a QEMU which has ended left in the socket."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                message = self._message(deadline, "its end")
                if "event" in message:
                    self.events.append(message)
        except QmpError:
            return self.events

    def _greet(self, deadline: float) -> None:
        """Read the greeting. QEMU may send an event before it: its monitor forgets only with the greeting that the
        client before this one had finished the negotiation."""
        while "QMP" not in (message := self._message(deadline, "its greeting (another client may be connected)")):
            if "event" not in message:
                raise QmpError(f"{self.path} does not speak QMP: it began with {json.dumps(message)[:80]}")
            self.events.append(message)

    def _message(self, deadline: float, awaited: str) -> dict[str, Any]:
        """The next JSON object: QMP sends one a line."""
        while b"\n" not in self._pending:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise QmpError(f"timed out at {self.path} waiting for {awaited}")
            self._socket.settimeout(remaining)
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise QmpError(f"QEMU is gone: {self.path}: {error.strerror or error}") from error
            if not received:
                raise QmpError(f"QEMU closed {self.path} before {awaited}")
            self._pending += received
        line, self._pending = self._pending.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QmpError(f"{self.path} does not speak QMP: it sent {line[:80]!r}") from error
        if not isinstance(message, dict):
            raise QmpError(f"{self.path} does not speak QMP: it sent {line[:80]!r}")
        return message
