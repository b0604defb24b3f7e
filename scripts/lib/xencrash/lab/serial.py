"""The serial lines of a machine: Xen's console, and the lab's own line to dom0."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path

from xencrash.lab.errors import LabError
from xencrash.lab.process import Process


class Line:
    """A serial port's socket, connected at first use, kept open and drained: a full one would block the guest's output.

    What is printed is in its log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def send(self, data: bytes) -> None:
        if self._socket is None:
            self._socket = self._connected()
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise LabError(f"typing on a serial line: {error.strerror}") from error

    def _connected(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(str(self._path))
        except OSError as error:
            line.close()
            raise LabError(f"connecting to the serial line {self._path}: {error.strerror}") from error
        threading.Thread(target=_drain, args=(line,), daemon=True).start()
        return line

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None


def _drain(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while line.recv(65536):
            pass


class Serial:
    """Xen's console: what is typed there, and everything that Xen, dom0's kernel and the crash kernel print."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._line = Line(process.paths.console)

    def send(self, data: bytes) -> None:
        """Type on Xen's console."""
        self._line.send(data)

    def size(self) -> int:
        """How much has been printed: a `since` for `wait`."""
        return self._process.log_size(self._process.paths.serial_log)

    def wait(
        self, pattern: str | bytes, timeout: float, since: int = 0, step: str = "waiting for the console"
    ) -> re.Match[bytes]:
        """Wait until what was printed from offset `since` on matches; raises LabError after `timeout` seconds."""
        return self._process.wait_log(self._process.paths.serial_log, pattern, timeout, step, since)

    def to_xen(self) -> None:
        """Switch the console's input from dom0 to Xen."""
        for _ in range(2):  # three Ctrl-A switch the input to the next of dom0 and Xen
            since = self.size()
            self.send(b"\x01\x01\x01")
            # Up to what follows the word: of one that is being printed a part is in the log.
            match = self.wait(rb"\*\*\* Serial input (?:to|->) (\w+)\W", 20, since, "switching the console to Xen")
            if match[1] == b"Xen":
                return
        raise LabError(
            f"switching the console to Xen: Ctrl-A three times had no effect: {self._process.where_to_look()}"
        )

    def close(self) -> None:
        self._line.close()
