"""A live machine: physical memory and CPUs through gdb's connection to QEMU's gdbstub.

Memory is read by the stub's physical mode with packets of our own, so neither the selected CPU's page tables nor gdb's
caches matter. The mode is the stub's, global, and outlives a connection: it is switched on for the length of a
`batch` and always off again. In that mode an address without RAM reads as zeros, so only what the machine's memory
map calls RAM or ROM is ever asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import gdb

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.targets import Lapic, Map, PhysicalCpu, Target, hmp
from xen_symbols.targets.dump import Dump, open_dump
from xen_symbols.targets.packets import merged, pieces
from xen_symbols.targets.qemu_state import parse_cpus, unsavable
from xen_symbols.targets.qmp import Qmp, QmpError
from xen_symbols.x86 import gate

_QMP_SECONDS = 30.0  # for each answer: a busy host's QEMU takes its time, and without it a trace is lost
_APIC_IDS = 1 << 12  # no machine of QEMU's has more
# The stub sends the monitor's text line by line and reads nothing before the command ends; gdb acknowledges each line.
# A unix socket holds 277 of these single bytes; then both sides wait forever. `info mtree -f` prints up to 13 lines for
# each CPU (seen: 290 lines with 16 CPUs go well, 500 with 32 do not); over QMP it is one answer.
_CPUS_BY_UNIX_SOCKET = 16


class LiveTarget(Target):
    """The connection that gdb has selected.

    `cpus()` is read once per batch. Raises Undecidable if the stub is not QEMU's or is gone.
    """

    kind = "live"
    format = "QEMU gdbstub"

    def __init__(self, connection: gdb.TargetConnection) -> None:
        self.connection = connection
        self.location = f"gdb:{connection.details}"
        self.qmp_socket: str | None = None
        self.packets = 0  # sent: our own, and one for each of the monitor's commands (gdb's qRcmd)
        self.measured_modes: dict[int, int | Absent] = {}  # IA32_APIC_BASE by CPU index, when rdmsr was asked for
        self._batching = False
        self._cpus: list[PhysicalCpu] | None = None
        self._trusted: str | None = None  # the QMP socket that is known to be this machine's
        self._set_mode(False)  # an earlier client may have left it on

    # -- the stub -----------------------------------------------------------------------------

    def _send(self, packet: str) -> bytes:
        self.packets += 1
        try:
            answer: bytes = self.connection.send_packet(packet)
        except gdb.error as error:
            raise Undecidable(f"the connection to {self.location} was lost: {error}") from None
        return answer

    def _set_mode(self, physical: bool) -> None:
        answer = self._send(f"Qqemu.PhyMemMode:{int(physical)}")
        if answer != b"OK":
            raise Undecidable(
                f"{self.location} is not QEMU's gdbstub, or one older than 5.0: it cannot read physical memory"
            )

    def _monitor(self, command: str) -> str:
        self.packets += 1
        try:
            return hmp.plain(gdb.execute(f"monitor {command}", to_string=True))
        except gdb.error as error:
            raise Undecidable(f"{self.location} did not answer 'monitor {command}': {error}") from None

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Everything inside sees the same moment: the mode is switched once, and the CPUs are read once."""
        if self._batching:
            yield
            return
        self._cpus = None
        self._batching = True
        try:
            self._set_mode(True)
            yield
        finally:
            self._batching = False
            self._cpus = None
            # When the connection is lost the mode cannot be reset from here: attaching does it.
            with contextlib.suppress(Undecidable):
                self._set_mode(False)

    # -- what runs the machine ----------------------------------------------------------------

    @functools.cached_property
    def accelerator(self) -> Literal["kvm", "tcg"] | Absent:
        """`kvm` or `tcg`, by QEMU's monitor."""
        if hmp.is_kvm(self._monitor("info kvm")):
            return "kvm"
        return "tcg" if hmp.is_tcg(self._monitor("info jit")) else Absent("QEMU names neither KVM nor TCG")

    def settable(self, addresses: Sequence[int]) -> int:
        """How many of these can have a hardware breakpoint at the same time: this is tried, and none stays set."""
        return self._accepted([f"1,{address:x},1" for address in addresses])

    def unwatchable(self, gates: Sequence[int]) -> str | None:
        """Why writes to gates cannot be watched, all at the same time; None if they can."""
        if self.accelerator == "kvm":
            return "KVM has four watchpoints of 8 bytes, and each gate has 16"
        if self._accepted([f"2,{address:x},{gate.SIZE:x}" for address in gates]) < len(gates):
            return f"{self.location} takes fewer than {len(gates)} watchpoints of {gate.SIZE} bytes"
        return None

    def _accepted(self, points: Sequence[str]) -> int:
        """How many of some breakpoints, in the remote protocol's words, the stub takes one after the other."""
        taken = []
        try:
            for point in points:
                if self._send(f"Z{point}") != b"OK":
                    break
                taken.append(point)
        finally:
            for point in taken:
                self._send(f"z{point}")
        return len(taken)

    # -- memory -------------------------------------------------------------------------------

    @functools.cached_property
    def _ram(self) -> list[tuple[int, int]]:
        command = "info mtree -f"
        try:
            if self.qmp_socket is None:
                self._require_room()
                return hmp.parse_ram(self._monitor(command))
            with Qmp(self.qmp_socket, _QMP_SECONDS) as qmp:
                self._require_same_machine(qmp)
                return hmp.parse_ram(qmp.execute("human-monitor-command", command_line=command))
        except QmpError as error:
            raise Undecidable(str(error)) from None
        except Unreadable as error:
            raise Undecidable(f"{self.location}: {error}") from None

    def _require_room(self) -> None:
        """Checks that the memory map of this many CPUs fits through the connection."""
        count = len(hmp.parse_host_threads(self._monitor("info cpus")))
        if count > _CPUS_BY_UNIX_SOCKET and Path(self.connection.details).is_socket():
            raise Undecidable(
                f"{self.location} has {count} CPUs, and the monitor's output for that many overruns a unix socket: "
                "set xen qmp-socket PATH (--qmp PATH), or attach over TCP"
            )

    def physical_ranges(self) -> Sequence[tuple[int, int]]:
        return self._ram

    def _absence(self, address: int, size: int) -> Absent | None:
        """Why a range cannot be read; None if it is RAM from end to end."""
        if any(start <= address and address + size <= end for start, end in self._ram):
            return None
        return Absent(f"physical {address:#x} is not RAM of {self.location}")

    def read_physical(self, address: int, size: int) -> bytes:
        if absence := self._absence(address, size):
            raise Unreadable(absence)
        with self.batch():
            return b"".join(self._packet(*piece) for piece in pieces(address, size))

    def _packet(self, address: int, size: int) -> bytes:
        answer = self._send(f"m{address:x},{size:x}")
        if len(answer) != 2 * size:
            raise Unreadable(f"QEMU refused to read physical {address:#x}: {answer[:16].decode(errors='replace')!r}")
        return bytes.fromhex(answer.decode())

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        answers: dict[tuple[int, int], bytes | Absent] = {}
        readable = []
        for request in dict.fromkeys(requests):
            if absence := self._absence(*request):
                answers[request] = absence
            else:
                readable.append(request)
        with self.batch():
            for start, end, members in merged(sorted(readable)):
                try:
                    data = self.read_physical(start, end - start)
                except Unreadable as error:
                    answers |= dict.fromkeys(members, error.absent)
                    continue
                answers |= {(at, size): data[at - start : at - start + size] for at, size in members}
        return [answers[request] for request in requests]

    # -- CPUs ---------------------------------------------------------------------------------

    def cpus(self) -> Sequence[PhysicalCpu]:
        if self._cpus is not None:
            return self._cpus
        with self.batch():
            cpus = self._from_monitor() if self.qmp_socket is None else self._from_device_state(self.qmp_socket)
            self._cpus = known = [self._with_measured(cpu) for cpu in cpus]
        return known  # the end of the batch forgets what it read

    def _from_device_state(self, socket: str) -> list[PhysicalCpu]:
        try:
            with Qmp(socket, _QMP_SECONDS) as qmp:
                self._require_same_machine(qmp)
                if why := unsavable(qmp.execute("query-migrate")):
                    absence = Absent(f"QEMU cannot save this machine's device state ({why})")
                    return hmp.without_qmp(self._from_monitor(), absence)
                return parse_cpus(device_state(qmp))
        except QmpError as error:
            raise Undecidable(str(error)) from None
        except Unreadable as error:
            raise Undecidable(f"{socket}: {error}") from None

    def _from_monitor(self) -> list[PhysicalCpu]:
        try:
            cpus = hmp.parse_registers(self._registers())
        except Unreadable as error:
            raise Undecidable(f"{self.location}: {error}") from None
        found: list[tuple[int, Lapic]] = []
        for apic_id in range(_APIC_IDS):
            if len(found) == len(cpus):
                break
            lapic = hmp.parse_lapic(self._monitor(f"info lapic {apic_id}"), apic_id)
            if lapic is not None:
                found.append(lapic)
        return hmp.with_lapics(cpus, found)

    def _registers(self) -> str:
        """The output of `info registers -a`, read CPU by CPU: for all at once it may overrun the socket."""
        listed = self._monitor("info cpus")
        indexes = range(len(hmp.parse_host_threads(listed)))
        texts = [self._monitor(f"info registers {index}") for index in indexes[:1]]
        if texts and hmp.names_a_cpu(texts[0]):
            return "".join([*texts, *(self._monitor(f"info registers {index}") for index in indexes[1:])])
        return "".join(self._registers_by_selection(indexes, hmp.parse_selected_cpu(listed)))

    def _registers_by_selection(self, indexes: Sequence[int], selected: int) -> Iterator[str]:
        """The same of a QEMU before 7.2, whose `info registers` takes no number."""
        try:
            for index in indexes:
                self._monitor(f"cpu {index}")
                yield self._monitor("info registers")
        finally:
            self._monitor(f"cpu {selected}")

    def _with_measured(self, cpu: PhysicalCpu) -> PhysicalCpu:
        """The LAPIC mode from rdmsr, if QEMU's device state did not give it."""
        base = self.measured_modes.get(cpu.index)
        if base is None or isinstance(cpu.lapic, Absent) or not isinstance(cpu.lapic.apic_base, Absent):
            return cpu
        source = cpu.lapic.source if isinstance(base, Absent) else f"rdmsr, {cpu.lapic.source}"
        return cpu._replace(lapic=cpu.lapic._replace(apic_base=base, source=source))

    def _require_same_machine(self, qmp: Qmp) -> None:
        """A QMP socket of another machine would answer just as well. Checked once for each socket."""
        if qmp.path == self._trusted:
            return
        ours = hmp.parse_host_threads(self._monitor("info cpus"))
        theirs = [cpu["thread-id"] for cpu in qmp.execute("query-cpus-fast")]
        if not ours or ours != theirs:
            raise Undecidable(f"{qmp.path} is the QMP socket of another machine than {self.location}")
        self._trusted = qmp.path

    def notes(self) -> Sequence[Note]:
        return ()


class ServedDump(Dump):
    """A dump that `xencrash gdb` serves: the same file, opened here, is faster than the connection."""

    def __init__(self, connection: gdb.TargetConnection, dump: Dump) -> None:
        super().__init__(dump.location, dump.opened, dump.base)
        self.connection = connection
        self.qmp_socket: str | None = None


def open_target(connection: gdb.TargetConnection) -> LiveTarget | ServedDump:
    """What gdb is connected to. Raises Undecidable if it is neither QEMU nor a dump of ours."""
    try:
        served = connection.send_packet("qxencrash.dump")
    except gdb.error as error:
        raise Undecidable(f"gdb:{connection.details} did not answer: {error}") from None
    if not served:
        return LiveTarget(connection)
    path, *placed = served.decode().split(",")
    bases = [int(text, 16) for text in placed if "=" not in text]
    maps = [Map(*(int(part, 16) for part in re.split("[=:]", text))) for text in placed if "=" in text]
    dump = open_dump(os.fsdecode(bytes.fromhex(path)), base=bases[0] if bases else None, maps=maps)
    return ServedDump(connection, dump)


def cpu_index(thread: gdb.InferiorThread) -> int:
    """QEMU's number of a thread's CPU: the stub numbers them from 1 (gdbstub.c, gdb_get_cpu_index)."""
    return int(thread.ptid[1]) - 1


def device_state(qmp: Qmp) -> bytes:
    """QEMU's device state. QEMU writes it to a file in a private folder, which is removed at once."""
    shared = "/dev/shm"
    parent = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="xencrash-", dir=parent) as folder:
        path = Path(folder) / "state"
        # live=True, QEMU's default, inactivates the disks of a stopped machine, and the second call aborts QEMU 7.2.
        qmp.execute("xen-save-devices-state", filename=str(path), live=False)
        return path.read_bytes()
