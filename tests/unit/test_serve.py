"""A dump behind gdb's remote protocol: packet by packet, and with the real gdb."""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.machines import dumpwriter as writer
from xen_symbols.absence import Unreadable
from xen_symbols.targets.dump import open_dump
from xencrash.serve import GDB_SETTINGS, READ_ONLY, Served, Thread, serving

BASE = 0xFFFF82D040000000  # what the test's page tables map: three pages from physical address 0
CONTENT = {0x1008: struct.pack("<QQ", 0x1122334455667788, BASE + 0x1FF8), 0x2FF0: b"last 16 of them!"}
REGISTERS = [
    {"rip": BASE + 0x1234, "rsp": BASE + 0x2000, "rbp": 0, "rflags": 0x246, "cs": 0xE008, "cr3": 0x5000},
    {},
    {"rip": BASE + 0x1300, "rsp": BASE + 0x2100, "rax": 0xFFFFFFFFFFFFFFFE, "fs_base": 0x77, "cr0": 0x80050033},
]


def served_from(file: Path, threads: Sequence[Thread], current: int = 0) -> Served:
    file.write_bytes(writer.made(writer.write_elf, [(0, 0x3000)], CONTENT, b""))
    dump = open_dump(str(file))

    def read_virtual(cpu: int, address: int, size: int) -> bytes:
        """CPU 2 sees all three pages, the others the first two."""
        if not BASE <= address <= address + size <= BASE + (0x3000 if cpu == 2 else 0x2000):
            raise Unreadable(f"{address:#x} is not mapped")
        return dump.read_physical(address - BASE, size)

    return Served(str(file), threads, read_virtual, dump.read_physical, current=current)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    threads = [Thread(cpu, registers, f"CPU {cpu}") for cpu, registers in enumerate(REGISTERS)]
    return served_from(tmp_path / "vmcore", threads, current=2)


class Client:
    """A client of the protocol that turns acknowledgements off."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(path)
        self.pending = b""
        assert self.ask("QStartNoAckMode") == "OK"

    def ask(self, packet: str) -> str:
        self.socket.sendall(b"$%s#%02x" % (packet.encode(), sum(packet.encode()) & 0xFF))
        return self.receive()

    def receive(self) -> str:
        while not (match := re.match(rb"\+?\$([^#]*)#(..)", self.pending, re.DOTALL)):
            more = self.socket.recv(65536)
            assert more, "the server closed the connection"
            self.pending += more
        self.pending = self.pending[match.end() :]
        assert int(match[2], 16) == sum(match[1]) & 0xFF
        return match[1].decode()

    def is_closed(self) -> bool:
        return self.socket.recv(1) == b""


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with serving(served) as path:
        yield Client(path)


def test_the_socket_is_private_and_goes(served: Served) -> None:
    with serving(served) as path:
        assert stat.S_ISSOCK(Path(path).stat().st_mode)
        assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    assert not Path(path).parent.exists()


def test_threads_are_cpus(client: Client) -> None:
    assert client.ask("qfThreadInfo") == "m1,2,3"
    assert client.ask("qsThreadInfo") == "l"
    assert client.ask("qC") == "QC3"
    assert client.ask("?") == "T00thread:3;"
    assert bytes.fromhex(client.ask("qThreadExtraInfo,2")) == b"CPU 1"
    assert (client.ask("T3"), client.ask("T4")) == ("OK", "E01")
    assert (client.ask("Hg2"), client.ask("Hg9"), client.ask("Hc-1"), client.ask("qC")) == ("OK", "E01", "OK", "QC2")


def test_four_thousand_threads_fit(tmp_path: Path) -> None:
    with serving(served_from(tmp_path / "vmcore", [Thread(cpu, {}, "") for cpu in range(4096)])) as path:
        client = Client(path)
        parts = [client.ask("qfThreadInfo")]
        while parts[-1] != "l":
            assert len(parts[-1]) <= 0x4000
            parts.append(client.ask("qsThreadInfo"))
        assert [int(each, 16) for part in parts[:-1] for each in part[1:].split(",")] == list(range(1, 4097))


def test_registers_that_are_not_known_are_unavailable(client: Client) -> None:
    everything = client.ask("g")
    assert everything.startswith("feffffffffffffff" + "x" * 16)
    assert client.ask("p10") == (BASE + 0x1300).to_bytes(8, "little").hex()
    assert client.ask("p11") == "x" * 8, "eflags is not in this thread's registers"
    assert client.ask("p18") == "x" * 20, "st0"
    client.ask("Hg1")
    assert client.ask("p11") == "46020000"
    client.ask("Hg2")
    assert set(client.ask("g")) == {"x"}
    assert client.ask("p999") == "E01"


def test_virtual_memory_is_the_selected_cpus(client: Client) -> None:
    assert client.ask(f"m{BASE + 0x1008:x},8") == "8877665544332211"
    assert client.ask(f"m{BASE + 0x1FFE:x},4") == "00000000", "across a page"
    assert client.ask(f"m{BASE + 0x2FF8:x},10") == b"of them!".hex(), "as far as it goes"
    assert client.ask(f"m{BASE + 0x3000:x},1") == "E14"
    assert client.ask(f"m{BASE + 0x3000:x},0") == ""
    client.ask("Hg1")
    assert client.ask(f"m{BASE + 0x2FF0:x},1") == "E14"
    assert len(client.ask(f"m{BASE:x},ffffffff")) == 0x4000


def test_physical_memory_as_with_qemu(client: Client) -> None:
    assert client.ask("qqemu.PhyMemMode") == "0"
    assert client.ask("Qqemu.PhyMemMode:1") == "OK"
    assert client.ask("qqemu.PhyMemMode") == "1"
    assert bytes.fromhex(client.ask("m2ff0,10")) == b"last 16 of them!"
    assert client.ask("m3000,8") == "E14", "a hole is not zeros"
    assert client.ask(f"m{BASE:x},8") == "E14"
    assert client.ask("Qqemu.PhyMemMode:0") == "OK"
    assert client.ask("m2ff0,10") == "E14"


def test_the_dump_is_named(client: Client, served: Served) -> None:
    assert bytes.fromhex(client.ask("qxencrash.dump")).decode() == served.path
    with serving(replace(served, base=0x100000)) as path:
        assert Client(path).ask("qxencrash.dump").split(",") == [served.path.encode().hex(), "100000"]


@pytest.mark.parametrize("packet", ["G00", "P0=00", "M0,1:00", "X0,1:\0", "Z0,0,1", "z1,0,1"])
def test_writing_is_refused(client: Client, packet: str) -> None:
    assert client.ask(packet) == f"E.{READ_ONLY}"


@pytest.mark.parametrize("packet", ["c", "s", "vCont;c", "vCont;s:1;c", "C05"])
def test_continuing_is_refused(client: Client, packet: str) -> None:
    assert bytes.fromhex(client.ask(packet)[1:]).decode() == READ_ONLY + "\n"
    assert client.receive() == "T00thread:3;"


@pytest.mark.parametrize("packet", ["", "vMustReplyEmpty", "qSymbol::", "vFile:open:", "bc", "R00", "qCRC:0,1", "!"])
def test_what_it_does_not_know_is_answered_empty(client: Client, packet: str) -> None:
    assert client.ask(packet) == ""


@pytest.mark.parametrize("packet", ["m", "m0", "mzz,1", "m-1,4", "p", "H", "Hgx", "Tzz", "qThreadExtraInfo,", "m0,1,2"])
def test_malformed_packets_are_answered(client: Client, packet: str) -> None:
    assert client.ask(packet) == "E01"
    assert client.ask("qC") == "QC3"


def test_a_damaged_packet_is_asked_for_again(client: Client) -> None:
    client.socket.sendall(b"junk\x03$qC#00")
    assert client.socket.recv(1) == b"-"
    assert client.ask("qC") == "QC3"


def test_a_client_that_never_ends_a_packet_is_dropped(client: Client) -> None:
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            client.socket.sendall(b"$" + b"m" * 65536)


def test_after_detach_another_client_may_come(served: Served) -> None:
    with serving(served) as path:
        first = Client(path)
        assert first.ask("D") == "OK"
        assert first.is_closed()
        second = Client(path)
        second.socket.close()  # without saying anything
        third = Client(path)
        assert third.ask("k") == "OK"
        assert third.is_closed()
        with pytest.raises((ConnectionError, TimeoutError, AssertionError)):
            Client(path)


def gdb(path: str, *commands: str, settings: tuple[str, ...] = GDB_SETTINGS) -> str:
    """gdb's output, both streams together."""
    arguments = ["gdb", "-q", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
    arguments += [part for setting in settings for part in ("-iex", setting)]
    arguments += [part for command in (f"target remote {path}", *commands) for part in ("-ex", command)]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def path(served: Served) -> Iterator[str]:
    with serving(served) as path:
        yield path


def test_gdb_shows_cpus_memory_and_registers(path: str) -> None:
    said = gdb(
        path, "info threads", f"x/2gx {BASE + 0x1008:#x}", f"x/s {BASE + 0x2FF0:#x}", "p/x $rax", "p $rbx",
        "thread 1", "p/x $cr3", "p $eflags", f"x/1bx {BASE + 0x2FF0:#x}",
    )  # fmt: skip
    assert re.search(r"\* 3 +Thread 3 \(CPU 2\) +0xffff82d040001300 in", said)
    assert re.search(r"  1 +Thread 1 \(CPU 0\) +0xffff82d040001234 in", said)
    assert re.search(r"  2 +Thread 2 \(CPU 1\) +<unavailable> in", said), "a CPU that saved nothing"
    assert "0xffff82d040001008:\t0x1122334455667788\t0xffff82d040001ff8" in said
    assert "last 16 of them!" in said
    assert "$1 = 0xfffffffffffffffe" in said
    assert "$2 = <unavailable>" in said
    assert "$3 = 0x5000" in said
    assert "$4 = [ PF ZF IF ]" in said
    assert "Cannot access memory at address 0xffff82d040002ff0" in said


def test_gdb_may_not_write_and_says_so(path: str) -> None:
    assert "Writing to memory is not allowed" in gdb(path, f"set var *(int*){BASE:#x} = 1")
    assert "Writing to registers is not allowed" in gdb(path, "set var $rax = 1")


def test_gdb_that_tries_anyway_changes_nothing(path: str) -> None:
    write = gdb(path, f"set var *(int*){BASE:#x} = 1", settings=())
    assert f"Cannot access memory at address {BASE:#x}" in write
    register = gdb(path, "set var $rax = 1", settings=())
    assert READ_ONLY in register
    said = gdb(path, "continue", "stepi", "p/x $rip", settings=())
    assert said.count(READ_ONLY) == 2
    assert "$1 = 0xffff82d040001300" in said


def test_gdb_leaves_the_dump_to_the_next(path: str) -> None:
    assert "detached" in gdb(path, "detach")
    assert "$1 = 0xffff82d040001300" in gdb(path, "p/x $rip")
