"""A gdbstub with few hardware breakpoints, as KVM's has: a proxy before QEMU's TCG, which takes any number."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from xencrash.lab.machine import Machine

_UNIT = re.compile(rb"[+\x03-]|\$([^#]*)#..", re.DOTALL)
_POINT = re.compile(rb"([zZ])([12]),([0-9a-f]+),([0-9a-f]+)")
_REFUSED = b"+$E22#a9"  # EINVAL, as KVM's kvm_arch_insert_hw_breakpoint answers


class Stub:
    """`breakpoints` at a time are taken, of the watchpoints those of at most `watched` bytes; the first `generously`
    requests are taken whatever they are. `refused` counts the others."""

    def __init__(self, breakpoints: int, watched: int = 16, generously: int = 0) -> None:
        self.breakpoints, self.watched, self.generously = breakpoints, watched, generously
        self.most = self.refused = 0
        self._set: set[bytes] = set()

    def takes(self, packet: bytes) -> bool:
        point = _POINT.fullmatch(packet)
        if point is None:
            return True
        way, kind, _, size = point.groups()
        if way == b"z":
            self._set.discard(packet[1:])
            return True
        if self.generously > 0:
            self.generously -= 1
        elif int(size, 16) > self.watched if kind == b"2" else len(self._set) >= self.breakpoints:
            self.refused += 1
            return False
        if kind == b"1":
            self._set.add(packet[1:])
            self.most = max(self.most, len(self._set))
        return True


def _from_client(client: socket.socket, server: socket.socket, stub: Stub) -> None:
    pending = b""
    with contextlib.suppress(OSError):
        while received := client.recv(65536):
            pending += received
            while unit := _UNIT.match(pending):
                pending = pending[unit.end() :]
                if unit[1] is None or stub.takes(unit[1]):
                    server.sendall(unit[0])
                else:
                    client.sendall(_REFUSED)
        server.shutdown(socket.SHUT_RDWR)


def _from_server(server: socket.socket, client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while received := server.recv(65536):
            client.sendall(received)
        client.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket, behind: Path, stub: Stub) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client, socket.socket(socket.AF_UNIX) as server:
                server.connect(str(behind))
                back = threading.Thread(target=_from_server, args=(server, client))
                back.start()
                _from_client(client, server, stub)
                back.join()


@contextlib.contextmanager
def limited(lab: Machine, stub: Stub) -> Iterator[Path]:
    """The socket of a gdbstub that serves this machine within the stub's limits."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "gdb"
        listener.bind(os.fspath(path))
        listener.listen()
        thread = threading.Thread(target=_serve, args=(listener, lab.gdb_socket, stub))
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
