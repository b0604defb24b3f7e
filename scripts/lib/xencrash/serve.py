"""A dump behind gdb's remote protocol, read-only: what `xencrash gdb FILE` connects gdb to.

The protocol is the one of gdb's manual, appendix E. Threads are CPUs: thread id is CPU number + 1, as QEMU's
gdbstub has it. Memory is virtual, by Xen's page tables, or physical after `Qqemu.PhyMemMode:1` (QEMU's packet, so
that a client of QEMU's works here too). `qxencrash.dump` gives the path of the file in hex, and after commas a raw
image's base, or PHYS=OFFSET:SIZE of each stretch of it, for clients that can open the dump themselves. It is one
module, of more than 400 lines, since the packets and what answers them are read side by side.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.targets import Map
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import read_state

# What to set in gdb before it connects: it then says itself that it may not write, where
# a refusing answer only gets "Cannot access memory".
GDB_SETTINGS = ("set may-write-registers off", "set may-write-memory off", "set may-insert-breakpoints off")

READ_ONLY = "this is a dump: it can be read, but not changed or continued"
_PACKET_SIZE = 0x4000
_PAGE = 4096
_EFAULT = b"E14"
_MALFORMED = b"E01"

_FLAGS = ((0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"),
          (14, "NT"), (16, "RF"), (17, "VM"), (18, "AC"), (19, "VIF"), (20, "VIP"), (21, "ID"))  # fmt: skip
_CONTROL = ("k_gs_base", "cr0", "cr2", "cr3", "cr4", "efer")


@dataclass(frozen=True)
class _Register:
    """One register of the target description: gdb's name for it, its width, and the name in PhysicalCpu.registers."""

    name: str
    bits: int
    type: str
    key: str


def _core() -> Iterator[_Register]:
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi"):
        yield _Register(name, 64, "int64", name)
    for name in ("rbp", "rsp"):
        yield _Register(name, 64, "data_ptr", name)
    for number in range(8, 16):
        yield _Register(f"r{number}", 64, "int64", f"r{number}")
    yield _Register("rip", 64, "code_ptr", "rip")
    yield _Register("eflags", 32, "i386_eflags", "rflags")
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        yield _Register(name, 32, "int32", name)
    # gdb asks for the whole of its feature; no dump holds the FPU's registers.
    for number in range(8):
        yield _Register(f"st{number}", 80, "i387_ext", "")
    for name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"):
        yield _Register(name, 32, "int", "")


_FEATURES = {
    "org.gnu.gdb.i386.core": tuple(_core()),
    "org.gnu.gdb.i386.segments": tuple(_Register(name, 64, "int64", name) for name in ("fs_base", "gs_base")),
    "org.xenproject.control": tuple(_Register(name, 64, "int64", name) for name in _CONTROL),
}
_REGISTERS = [register for registers in _FEATURES.values() for register in registers]


def _target_description() -> bytes:
    flags = "".join(f'<field name="{name}" start="{bit}" end="{bit}"/>' for bit, name in _FLAGS)
    parts = ['<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">']
    parts.append("<architecture>i386:x86-64</architecture><osabi>none</osabi>")
    for feature, registers in _FEATURES.items():
        parts.append(f'<feature name="{feature}">')
        if feature.endswith("core"):
            parts.append(f'<flags id="i386_eflags" size="4">{flags}</flags>')
        parts += [f'<reg name="{r.name}" bitsize="{r.bits}" type="{r.type}"/>' for r in registers]
        parts.append("</feature>")
    return "".join([*parts, "</target>"]).encode()


@dataclass(frozen=True)
class Thread:
    """One CPU as gdb shall see it. Registers that are not in the mapping are unavailable, never zero."""

    cpu: int  # Xen's number
    registers: dict[str, int]
    says: str  # beside the thread in `info threads`


@dataclass(frozen=True)
class Served:
    """What is served. `read_virtual(cpu, address, size)` and `read_physical(address, size)` raise Unreadable."""

    path: str
    threads: Sequence[Thread]
    read_virtual: Callable[[int, int, int], bytes]
    read_physical: Callable[[int, int], bytes]
    base: int | None = None  # of a raw image
    maps: Sequence[Map] = ()  # the same, where the user gave them
    current: int = 0  # the CPU that gdb shows first; gdb takes none without a pc


def served(memory: XenMemory, base: int | None = None, maps: Sequence[Map] = ()) -> Served:
    """A dump with Xen in it: a thread for each CPU that Xen has, and for each that could not be matched to one.

    gdb begins at the CPU that crashed, or else at the first with registers. `base` and `maps` as for open_dump. Raises
    Undecidable.
    """
    try:
        state = read_state(memory)
    except Unreadable as error:
        raise Undecidable(f"{memory.target.location}: {error}") from None
    threads = []
    for cpu, known in state.cpus.items():
        if not isinstance(known.physical, Absent):
            threads.append(Thread(cpu, known.physical.registers, f"CPU {cpu}, {known.physical.source}"))
        elif known.exists:
            threads.append(Thread(cpu, {}, f"CPU {cpu}: {known.physical}"))
    for number, other in enumerate(state.unmatched, start=len(state.cpus)):
        threads.append(
            Thread(number, other.registers, f"{other.source} of its CPU {other.index}, matched to no Xen CPU")
        )
    first = state.system["crash_owner"].value
    able = [thread.cpu for thread in threads if "rip" in thread.registers]
    if not able:
        able = [len(state.cpus) + len(state.unmatched)]
        threads.append(Thread(able[0], {"rip": 0}, "no CPU: the dump has no registers, and gdb needs a thread"))
    target = memory.target
    return Served(
        path=target.location,
        threads=threads,
        read_virtual=lambda _, address, size: memory.read(address, size),
        read_physical=target.read_physical,
        base=base,
        maps=maps,
        current=first if first in able else able[0],
    )


class _Ended(Exception):
    """The client wants no more: detached, or (`kill`) the server is to end as well."""

    def __init__(self, kill: bool = False) -> None:
        self.kill = kill


class Conversation:
    """One client's connection: its packets in, the answers out. Holds what the client has selected."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._threads = {thread.cpu + 1: thread for thread in served.threads}
        self._selected = served.current + 1
        self._physical = False
        self._to_list: list[int] = []
        self._description = _target_description()
        self.acknowledges = True
        self.console = b""  # to be shown by gdb before the answer

    def answer(self, packet: bytes) -> bytes:
        """The answer to one packet; empty for what this server does not know. Raises _Ended."""
        method, arguments = _method(packet)
        if method is None:
            return b""
        try:
            return method(self, arguments.decode("ascii"))
        except (ValueError, IndexError):
            return _MALFORMED

    # -- threads ------------------------------------------------------------------------------

    def stop_reason(self, _: str) -> bytes:
        return b"T00thread:%x;" % self._selected

    def list_threads(self, _: str) -> bytes:
        self._to_list = sorted(self._threads)
        return self.list_more("")

    def list_more(self, _: str) -> bytes:
        room = _PACKET_SIZE // 9  # eight digits and a comma
        batch, self._to_list = self._to_list[:room], self._to_list[room:]
        return b"m" + b",".join(b"%x" % thread for thread in batch) if batch else b"l"

    def describe_thread(self, text: str) -> bytes:
        thread = self._threads.get(int(text, 16))
        return thread.says.encode().hex().encode() if thread else _MALFORMED

    def is_alive(self, text: str) -> bytes:
        return b"OK" if int(text, 16) in self._threads else _MALFORMED

    def select(self, text: str) -> bytes:
        number = int(text[1:], 16)
        if text[0] == "g" and number > 0:
            if number not in self._threads:
                return _MALFORMED
            self._selected = number
        return b"OK"

    def current_thread(self, _: str) -> bytes:
        return b"QC%x" % self._selected

    # -- registers and memory -----------------------------------------------------------------

    def registers(self, _: str) -> bytes:
        return "".join(self._hex(register) for register in _REGISTERS).encode()

    def register(self, text: str) -> bytes:
        number = int(text, 16)
        return self._hex(_REGISTERS[number]).encode() if 0 <= number < len(_REGISTERS) else _MALFORMED

    def _hex(self, register: _Register) -> str:
        size = register.bits // 8
        value = self._threads[self._selected].registers.get(register.key)
        return "xx" * size if value is None else (value % (1 << register.bits)).to_bytes(size, "little").hex()

    def memory(self, text: str) -> bytes:
        address, size = (int(part, 16) for part in text.split(","))
        if address < 0 or size < 0:
            return _MALFORMED
        data = self._readable(address, min(size, _PACKET_SIZE // 2))
        return data.hex().encode() if data or not size else _EFAULT

    def _readable(self, address: int, size: int) -> bytes:
        """What can be read from the beginning: gdb takes less than it asked for as far as it goes."""
        data = b""
        while len(data) < size:
            at = address + len(data)
            part = min(size - len(data), _PAGE - at % _PAGE)
            try:
                data += (
                    self._served.read_physical(at, part)
                    if self._physical
                    else self._served.read_virtual(self._selected - 1, at, part)
                )
            except Unreadable:
                break
        return data

    def physical_mode(self, _: str) -> bytes:
        return b"%d" % self._physical

    def set_physical_mode(self, text: str) -> bytes:
        self._physical = int(text) != 0
        return b"OK"

    # -- the rest -----------------------------------------------------------------------------

    def supported(self, _: str) -> bytes:
        return b"PacketSize=%x;qXfer:features:read+;QStartNoAckMode+" % _PACKET_SIZE

    def no_acknowledgement(self, _: str) -> bytes:
        self.acknowledges = False
        return b"OK"

    def description(self, text: str) -> bytes:
        offset, size = (int(part, 16) for part in text.split(","))
        part = self._description[offset : offset + min(size, _PACKET_SIZE - 1)]
        return (b"m" if offset + len(part) < len(self._description) else b"l") + part

    def path(self, _: str) -> bytes:
        path = os.fsencode(os.path.abspath(self._served.path)).hex().encode()  # noqa: PTH100 - no links resolved
        base, maps = self._served.base, self._served.maps
        return b",".join([path, *([b"%x" % base] if base is not None else []), *(b"%x=%x:%x" % one for one in maps)])

    def monitor(self, _: str) -> bytes:
        return f"{READ_ONLY}; there is no monitor\n".encode().hex().encode()

    def attached(self, _: str) -> bytes:
        return b"1"  # quitting gdb detaches

    def stay(self, _: str) -> bytes:
        self.console = f"{READ_ONLY}\n".encode()
        return self.stop_reason("")

    def refuse(self, _: str) -> bytes:
        return f"E.{READ_ONLY}".encode()

    def detach(self, _: str) -> bytes:
        raise _Ended

    def kill(self, _: str) -> bytes:
        raise _Ended(kill=True)

    def actions(self, _: str) -> bytes:
        return b"vCont;c;C;s;S"


_WHOLE: dict[bytes, Callable[[Conversation, str], bytes]] = {
    b"?": Conversation.stop_reason,
    b"g": Conversation.registers,
    b"qC": Conversation.current_thread,
    b"qfThreadInfo": Conversation.list_threads,
    b"qsThreadInfo": Conversation.list_more,
    b"qqemu.PhyMemMode": Conversation.physical_mode,
    b"qxencrash.dump": Conversation.path,
    b"QStartNoAckMode": Conversation.no_acknowledgement,
    b"vCont?": Conversation.actions,
}
_BY_PREFIX: tuple[tuple[bytes, Callable[[Conversation, str], bytes]], ...] = (
    (b"qSupported", Conversation.supported),
    (b"qXfer:features:read:target.xml:", Conversation.description),
    (b"qThreadExtraInfo,", Conversation.describe_thread),
    (b"qAttached", Conversation.attached),
    (b"Qqemu.PhyMemMode:", Conversation.set_physical_mode),
    (b"qRcmd,", Conversation.monitor),
    (b"H", Conversation.select),
    (b"T", Conversation.is_alive),
    (b"p", Conversation.register),
    (b"m", Conversation.memory),
    *((action, Conversation.stay) for action in (b"vCont;", b"c", b"C", b"s", b"S")),
    *((change, Conversation.refuse) for change in (b"G", b"P", b"M", b"X", b"Z", b"z")),
    (b"D", Conversation.detach),
    (b"k", Conversation.kill),
    (b"vKill", Conversation.kill),
)


def _method(packet: bytes) -> tuple[Callable[[Conversation, str], bytes] | None, bytes]:
    """What answers a packet, and the packet's arguments."""
    if packet in _WHOLE:
        return _WHOLE[packet], b""
    for prefix, method in _BY_PREFIX:
        if packet.startswith(prefix):
            return method, packet[len(prefix) :]
    return None, b""


# -- the wire ---------------------------------------------------------------------------------


def _framed(body: bytes) -> bytes:
    return b"$%s#%02x" % (body, sum(body) & 0xFF)


def _packets(connection: socket.socket) -> Iterator[bytes | None]:
    """Packets as they come in; None for one that came damaged. Ends with the connection."""
    pending = b""
    while True:
        start = pending.find(b"$")
        end = pending.find(b"#", start)
        if start < 0 or end < 0 or len(pending) < end + 3:
            if len(pending) > 2 * _PACKET_SIZE:
                return  # no client of this server's sends that
            more = connection.recv(_PACKET_SIZE)
            if not more:
                return
            pending = (pending if start >= 0 else b"") + more
            continue
        body, check = pending[start + 1 : end], pending[end + 1 : end + 3]
        pending = pending[end + 3 :]
        yield body if check.lower() == b"%02x" % (sum(body) & 0xFF) else None


def converse(connection: socket.socket, served: Served) -> bool:
    """Answer one client until it is gone. Returns whether it asked that the server ends too (`kill`)."""
    conversation = Conversation(served)
    for packet in _packets(connection):
        if packet is None:
            connection.sendall(b"-")
            continue
        if conversation.acknowledges:
            connection.sendall(b"+")
        try:
            answer = conversation.answer(packet)
        except _Ended as ended:
            connection.sendall(_framed(b"OK"))
            return ended.kill
        if conversation.console:
            connection.sendall(_framed(b"O" + conversation.console.hex().encode()))
            conversation.console = b""
        connection.sendall(_framed(answer))
    return False


def _serve(listener: socket.socket, served: Served) -> None:
    """Client after client, until one says kill or the listener is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(ConnectionError):
            if converse(connection, served):
                return


@contextlib.contextmanager
def serving(served: Served) -> Iterator[str]:
    """Serve for the length of the block, beside it; gives the path of the socket, which only this user can reach."""
    with tempfile.TemporaryDirectory(prefix="xencrash-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/gdb"
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=_serve, args=(listener, served), daemon=True, name="gdb server of a dump")
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
