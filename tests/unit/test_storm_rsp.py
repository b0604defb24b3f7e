"""The bare client of the remote protocol, against a stub that answers as QEMU's does."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xencrash.lab.errors import LabError
from xencrash.lab.storm import inject
from xencrash.lab.storm.rsp import Gone, Rsp, Stop, framed, parse_registers, parse_stop

Answer = Callable[[str], str | None]  # None: close the connection


class Stub:
    """Takes packets and interrupts in turn, and records them."""

    def __init__(self, path: Path, answer: Answer, greeting: bytes = b"") -> None:
        self.seen: list[str] = []
        self._answer, self._greeting = answer, greeting
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._server.accept()
        with client:
            client.sendall(self._greeting)
            pending = b""
            while received := client.recv(4096):
                pending += received
                while pending:
                    if pending[:1] == b"\x03":
                        packet, pending = "\x03", pending[1:]
                    elif b"#" in pending and len(pending) >= pending.index(b"#") + 3:
                        end = pending.index(b"#")
                        packet, pending = pending[1:end].decode(), pending[end + 3 :]
                    else:
                        break
                    self.seen.append(packet)
                    answer = "PacketSize=1000" if packet == "qSupported" else self._answer(packet)
                    if answer is None:
                        return
                    if answer:
                        client.sendall(b"+" + framed(answer))

    def close(self) -> None:
        self._server.close()
        self._thread.join(5)


@contextlib.contextmanager
def connected(tmp_path: Path, answer: Answer, greeting: bytes = b"") -> Iterator[tuple[Rsp, Stub]]:
    stub = Stub(tmp_path / "gdb.sock", answer, greeting)
    try:
        with Rsp(tmp_path / "gdb.sock", 5) as rsp:
            yield rsp, stub
    finally:
        stub.close()


def test_a_packet_has_its_checksum() -> None:
    assert framed("g") == b"$g#67"
    assert framed("vCont;s:1") == b"$vCont;s:1#23"


def test_registers_are_where_qemu_puts_them() -> None:
    general, segments, control = range(100, 117), range(200, 207), range(300, 309)
    data = struct.pack("<17Q7I9Q", *general, *segments, *control) + bytes(372)
    found = parse_registers(data.hex())
    assert (found["rax"], found["rsp"], found["r15"], found["rip"]) == (100, 107, 115, 116)
    assert (found["eflags"], found["cs"], found["gs"]) == (200, 201, 206)
    assert (found["fs_base"], found["cr0"], found["cr3"], found["cr4"], found["efer"]) == (300, 303, 305, 306, 308)


def test_registers_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match="100 bytes of registers"):
        parse_registers("00" * 100)


@pytest.mark.parametrize(
    ("answer", "stop"),
    [
        ("T05thread:02;", Stop(5, 1)),
        ("T05thread:p1.0b;", Stop(5, 10)),
        ("T02thread:01;", Stop(2, 0)),
        ("S05", Stop(5, 0)),
        ("W00", None),
        ("X0b", None),
    ],
)
def test_stop_replies(answer: str, stop: Stop | None) -> None:
    assert parse_stop(answer) == stop


def test_what_is_not_a_stop_reply_is_refused() -> None:
    with pytest.raises(ValueError, match="no stop reply"):
        parse_stop("OK")


def test_an_unsolicited_stop_reply_is_skipped(tmp_path: Path) -> None:
    """QEMU 7.2 sends one to each new connection."""
    with connected(tmp_path, lambda packet: "OK", framed("T02thread:01;")) as (rsp, _):
        assert rsp.ask("?") == "OK"


def test_one_cpu_runs_and_the_others_stay(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "T05thread:02;") as (rsp, stub):
        assert rsp.step(1) == Stop(5, 1)
        assert rsp.run([0, 3], 1.0) == Stop(5, 1)
        assert rsp.run_all(1.0) == Stop(5, 1)
    assert stub.seen[1:] == ["vCont;s:2", "vCont;c:1;c:4", "vCont;c"]


def test_what_does_not_stop_in_time_is_interrupted(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "T02thread:01;" if packet == "\x03" else "") as (rsp, stub):
        assert rsp.run([0], 0.05) is None
    assert stub.seen[1:] == ["vCont;c:1", "\x03"]


def test_a_breakpoint_that_is_met_just_then_counts(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "T05thread:01;" if packet == "\x03" else "") as (rsp, _):
        assert rsp.run([0], 0.05) == Stop(5, 0)


def test_the_end_of_the_machine_is_its_own_error(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "W00") as (rsp, _), pytest.raises(Gone):
        rsp.run_all(1.0)


def test_a_stub_that_goes_away_is_the_same_error(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: None) as (rsp, _), pytest.raises(Gone):
        rsp.ask("g")


def test_a_refusal_is_reported(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "E22") as (rsp, _), pytest.raises(LabError, match="refused"):
        rsp.break_at([0x1000])


def test_memory_is_read_in_pieces_and_the_physical_mode_left(tmp_path: Path) -> None:
    def answer(packet: str) -> str:
        if not packet.startswith("m"):
            return "OK"
        address, size = (int(word, 16) for word in packet[1:].split(","))
        return "E14" if address == 0xDEAD000 else bytes([address >> 8 & 0xFF] * size).hex()

    with connected(tmp_path, answer) as (rsp, stub):
        assert rsp.read_many([(0x100, 3), (0xDEAD000, 8), (0x2000, 2049)]) == [
            b"\1\1\1",
            None,
            b"\x20" * 2048 + b"\x28",
        ]
    assert stub.seen[1:] == [
        "Qqemu.PhyMemMode:1", "m100,3", "mdead000,8", "m2000,800", "m2800,1", "Qqemu.PhyMemMode:0",
    ]  # fmt: skip


def test_an_nmi_is_a_message_to_one_local_apic(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "OK") as (rsp, stub):
        inject.nmi(rsp, 3)
    assert stub.seen[1:] == ["Qqemu.PhyMemMode:1", "Mfee03000,4:00040000", "Qqemu.PhyMemMode:0"]


def test_an_nmi_does_not_reach_what_its_message_cannot_name(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "OK") as (rsp, stub), pytest.raises(LabError, match="0x100"):
        inject.nmi(rsp, 0x100)
    assert stub.seen == ["qSupported"]


def test_masking_is_sent_when_it_changes(tmp_path: Path) -> None:
    with connected(tmp_path, lambda packet: "OK") as (rsp, stub):
        for flags in (7, 7, 1):
            rsp.masking(flags)
    assert stub.seen[1:] == ["Qqemu.sstep=7", "Qqemu.sstep=1"]
