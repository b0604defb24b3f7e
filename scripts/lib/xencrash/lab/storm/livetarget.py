"""Xen in one of the storm's machines, as a target of `xen_symbols`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.targets.qemu_state import parse_cpus
from xen_symbols.targets.qmp import Qmp
from xencrash.lab.storm.rsp import Rsp


class StormTarget(Target):
    """Call `forget` when the machine has run: its CPUs are read once."""

    kind = "live"
    format = "QEMU gdbstub"

    def __init__(self, rsp: Rsp, qmp: Qmp, ram: Sequence[tuple[int, int]], scratch: Path) -> None:
        self.location = f"gdb:{rsp.path}"
        self._rsp, self._qmp, self._ram, self._scratch = rsp, qmp, ram, scratch
        self._cpus: list[PhysicalCpu] | None = None

    def forget(self) -> None:
        self._cpus = None

    def read_physical(self, address: int, size: int) -> bytes:
        answer = self.read_physical_many([(address, size)])[0]
        if isinstance(answer, Absent):
            raise Unreadable(answer)
        return answer

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        """An address without RAM reads as zeros through the stub, so only RAM is asked for."""
        inside = [request for request in requests if self._is_ram(*request)]
        answers = dict(zip(inside, self._rsp.read_many(inside), strict=True))
        return [
            Absent(f"physical {address:#x} is not RAM of {self.location}")
            if (answer := answers.get((address, size))) is None
            else answer
            for address, size in requests
        ]

    def _is_ram(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= end for start, end in self._ram)

    def physical_ranges(self) -> Sequence[tuple[int, int]]:
        return self._ram

    def cpus(self) -> Sequence[PhysicalCpu]:
        if self._cpus is None:
            self._cpus = parse_cpus(self._device_state())
        return self._cpus

    def _device_state(self) -> bytes:
        descriptor, name = tempfile.mkstemp(dir=self._scratch)
        os.close(descriptor)
        try:
            self._qmp.execute("xen-save-devices-state", filename=name, live=False)
            return Path(name).read_bytes()
        finally:
            Path(name).unlink()

    def notes(self) -> Sequence[Note]:
        return ()
