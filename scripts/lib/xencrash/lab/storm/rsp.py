"""A bare client of QEMU's gdbstub: it runs one CPU while the others are stopped, and reads and writes memory.

Only the lab may write to a machine, and only to its own. Packets are those of the GDB
manual, appendix E, "Remote Protocol", and QEMU's own (gdbstub.c: `Qqemu.sstep`, `Qqemu.PhyMemMode`).

CPUs are QEMU's cpu_index here; the stub numbers threads from 1.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xencrash.lab.errors import LabError

PACKET = 2048  # bytes: the most that QEMU up to 10.0 returns for one read

SIGTRAP = 5  # a breakpoint, or a step that is complete

# What a step masks (gdbstub.c): with only SSTEP_ENABLE an event that is pending is delivered by the step.
SSTEP_ENABLE, SSTEP_NOIRQ, SSTEP_NOTIMER = 1, 2, 4
SSTEP_MASKED = SSTEP_ENABLE | SSTEP_NOIRQ | SSTEP_NOTIMER

# The beginning of a `g` packet (QEMU's gdb-xml/i386-64bit.xml), little-endian.
_GENERAL = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip".split()
_SEGMENTS = "eflags cs ss ds es fs gs".split()
_CONTROL = "fs_base gs_base k_gs_base cr0 cr2 cr3 cr4 cr8 efer".split()
_REGISTERS = struct.Struct("<17Q7I9Q")
_THREAD = re.compile(r"thread:(?:p[0-9a-f]+\.)?([0-9a-f]+);")
_NAMES = (*_GENERAL, *_SEGMENTS, *_CONTROL)


class Gone(LabError):
    """QEMU closed the connection, or said that the machine has ended."""


class Stop(NamedTuple):
    """Why the machine is stopped: a signal (5: a breakpoint or a step), on which CPU."""

    signal: int
    cpu: int


def framed(packet: str) -> bytes:
    """A packet with its checksum. Ours have none of the characters that would need escaping."""
    body = packet.encode()
    return b"$" + body + b"#" + b"%02x" % (sum(body) & 0xFF)


def parse_registers(answer: str) -> dict[str, int]:
    """The general, segment and control registers of an answer to `g`. Raises ValueError for another layout."""
    data = bytes.fromhex(answer)
    if len(data) < _REGISTERS.size:
        raise ValueError(f"{len(data)} bytes of registers; QEMU's x86-64 layout has {_REGISTERS.size} and more")
    return dict(zip(_NAMES, _REGISTERS.unpack_from(data), strict=True))


def parse_stop(answer: str) -> Stop | None:
    """A stop reply; None for the end of the machine (`W`, `X`). Raises ValueError for another packet."""
    if answer[:1] in ("W", "X"):
        return None
    if answer[:1] not in ("S", "T"):
        raise ValueError(f"no stop reply: {answer[:40]!r}")
    thread = _THREAD.search(answer)
    return Stop(int(answer[1:3], 16), int(thread[1], 16) - 1 if thread else 0)


class Rsp:
    """One connection; the machine is stopped when the constructor returns. Raises Gone, or LabError in time."""

    def __init__(self, path: str | Path, timeout: float = 10.0) -> None:
        self.path = str(path)
        self.timeout = timeout
        self._pending = b""
        self._physical = False
        self._selected: int | None = None
        self._sstep: int | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(self.path)
            self._greet()
        except OSError as error:
            self._socket.close()
            raise Gone(f"connecting to {self.path}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def _greet(self) -> None:
        """QEMU 7.2 sends an unsolicited stop reply, others do not: the answer to `qSupported` comes last."""
        self._socket.sendall(framed("qSupported"))
        while "PacketSize" not in self._packet(time.monotonic() + self.timeout):
            pass

    def __enter__(self) -> Rsp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    # Packets.

    def _packet(self, deadline: float) -> str:
        """The next packet. QEMU takes our next one as its acknowledgement (gdb_read_byte)."""
        while True:
            start = self._pending.find(b"$")
            end = self._pending.find(b"#", start)
            if start >= 0 and 0 <= end <= len(self._pending) - 3:
                body = self._pending[start + 1 : end]
                self._pending = self._pending[end + 3 :]
                return body.decode("ascii", "replace")
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise Gone(f"QEMU is gone: {error.strerror or error}") from error
            if not received:
                raise Gone("QEMU is gone: it closed the debugger's connection")
            self._pending += received

    def ask_many(self, packets: Sequence[str]) -> list[str]:
        """The answers to packets that are sent together, which takes a fifth of the time."""
        deadline = time.monotonic() + self.timeout
        try:
            self._socket.sendall(b"".join(map(framed, packets)))
            return [self._packet(deadline) for _ in packets]
        except TimeoutError:
            raise LabError(f"QEMU's gdbstub did not answer {packets[0][:40]!r} within {self.timeout:.0f} s") from None
        except OSError as error:
            raise Gone(f"QEMU is gone: {error.strerror or error}") from error

    def ask(self, packet: str) -> str:
        return self.ask_many([packet])[0]

    def _must(self, packet: str) -> None:
        if (answer := self.ask(packet)) != "OK":
            raise LabError(f"QEMU's gdbstub refused {packet[:40]!r}: it answered {answer[:40]!r}")

    # Running.

    def masking(self, flags: int) -> None:
        """What a step masks from now on: SSTEP_MASKED, or SSTEP_ENABLE to let what is pending in."""
        if flags != self._sstep:
            self._must(f"Qqemu.sstep={flags:x}")
            self._sstep = flags

    def step(self, cpu: int, timeout: float = 1.0) -> Stop | None:
        """Run one instruction on one CPU; None if it did not complete in time (the CPU halts), and the machine is
        stopped again. Raises Gone."""
        return self._run(f"vCont;s:{cpu + 1:x}", timeout)

    def run(self, cpus: Iterable[int], timeout: float) -> Stop | None:
        """Let some CPUs run until one stops, while the others are stopped; None if none did in time, and the machine is
        stopped again. Raises Gone.

        A breakpoint where a CPU is now is hit at once: step that CPU first.
        """
        return self._run("vCont;" + ";".join(f"c:{cpu + 1:x}" for cpu in cpus), timeout)

    def run_all(self, timeout: float) -> Stop | None:
        return self._run("vCont;c", timeout)

    def begin_all(self) -> None:
        """Let the machine run, and return at once; `wait` or `interrupt` comes next."""
        self._begin_run("vCont;c")

    def wait(self, timeout: float) -> Stop | None:
        """The next stop of the machine that runs; None if none came in time, and the machine is stopped."""
        try:
            return self._stopped(timeout)
        except TimeoutError:
            stop = self.interrupt()
            return stop if stop.signal == SIGTRAP else None  # it came just now

    def _run(self, packet: str, timeout: float) -> Stop | None:
        self._begin_run(packet)
        return self.wait(timeout)

    def _begin_run(self, packet: str) -> None:
        self._selected = None
        try:
            self._socket.sendall(framed(packet))
        except OSError as error:
            raise Gone(f"QEMU is gone: {error.strerror or error}") from error

    def _stopped(self, timeout: float) -> Stop:
        stop = parse_stop(self._packet(time.monotonic() + timeout))
        if stop is None:
            raise Gone("the machine ended")
        return stop

    def interrupt(self) -> Stop:
        """Stop the machine that runs."""
        try:
            self._socket.sendall(b"\x03")
            return self._stopped(self.timeout)
        except TimeoutError:
            raise LabError(f"QEMU's gdbstub did not stop the machine within {self.timeout:.0f} s") from None
        except OSError as error:
            raise Gone(f"QEMU is gone: {error.strerror or error}") from error

    def break_at(self, addresses: Iterable[int], on: bool = True) -> None:
        packets = [f"{'Z' if on else 'z'}1,{address:x},1" for address in addresses]
        if packets and any(answer != "OK" for answer in self.ask_many(packets)):
            raise LabError("QEMU's gdbstub refused a breakpoint")

    # Registers and memory.

    def registers(self, cpu: int) -> dict[str, int]:
        packets = ["g"] if self._selected == cpu else [f"Hg{cpu + 1:x}", "g"]
        self._selected = cpu
        return parse_registers(self.ask_many(packets)[-1])

    def write_register(self, cpu: int, name: str, value: int) -> None:
        """Raises LabError if the stub refuses. General registers and rip only."""
        number = _GENERAL.index(name)
        self.registers(cpu)  # selects it
        self._must(f"P{number:x}={value.to_bytes(8, 'little').hex()}")

    @contextlib.contextmanager
    def physical(self) -> Iterator[None]:
        """Addresses are physical inside. The mode is the stub's, and outlives a connection."""
        if self._physical:
            yield
            return
        self._must("Qqemu.PhyMemMode:1")
        self._physical = True
        try:
            yield
        finally:
            self._physical = False
            with contextlib.suppress(LabError):
                self._must("Qqemu.PhyMemMode:0")

    def is_halted(self, cpu: int) -> bool:
        """From what the stub says for `info threads` (gdb_handle_query_thread_extra)."""
        return "halted" in bytes.fromhex(self.ask(f"qThreadExtraInfo,{cpu + 1:x}")).decode(errors="replace")

    def read_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Each (address, size) of physical memory; None for what the stub refuses. An address without RAM reads as
        zeros."""
        pieces = [
            (number, at, min(PACKET, address + size - at))
            for number, (address, size) in enumerate(requests)
            for at in range(address, address + size, PACKET)
        ]
        found: list[bytes | None] = [b""] * len(requests)
        with self.physical():
            for start in range(0, len(pieces), 64):  # the answers must not fill the socket while we still send
                some = pieces[start : start + 64]
                for (number, _, size), answer in zip(
                    some, self.ask_many([f"m{at:x},{size:x}" for _, at, size in some]), strict=True
                ):
                    before = found[number]
                    fits = before is not None and len(answer) == 2 * size
                    found[number] = before + bytes.fromhex(answer) if before is not None and fits else None
        return found

    def read(self, address: int, size: int) -> bytes:
        """Physical memory. Raises Unreadable."""
        data = self.read_many([(address, size)])[0]
        if data is None:
            raise Unreadable(f"QEMU refused to read physical {address:#x}")
        return data

    def read_virtual(self, cpu: int, address: int, size: int) -> bytes:
        """By the page tables that a CPU uses; empty where they do not map it."""
        answer = self.ask_many([f"Hg{cpu + 1:x}", f"m{address:x},{size:x}"])[1]
        self._selected = cpu
        return b"" if answer.startswith("E") else bytes.fromhex(answer)

    def write_virtual(self, cpu: int, address: int, data: bytes) -> None:
        """By the page tables that a CPU uses, whatever they protect. Raises Unreadable where they do not map it."""
        if self.ask_many([f"Hg{cpu + 1:x}", f"M{address:x},{len(data):x}:{data.hex()}"])[1] != "OK":
            raise Unreadable(f"CPU {cpu} does not map {address:#x}")
        self._selected = cpu

    def write(self, address: int, data: bytes) -> None:
        """Physical memory, or a device there."""
        with self.physical():
            self._must(f"M{address:x},{len(data):x}:{data.hex()}")
