"""What the code says of a CPU that may be halted: whether it is behind a HLT, and what it goes on with."""

from __future__ import annotations

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.x86 import halt
from xen_symbols.xen.memory import XenMemory


class Halts:
    """Each place is read once: other CPUs halt at the same one."""

    def __init__(self, memory: XenMemory) -> None:
        self._memory = memory
        self._behind: dict[int, bool | Absent] = {}
        self._again: dict[int, bool | Absent] = {}

    def behind_hlt(self, rip: int) -> bool | Absent:
        """Whether the instruction before is HLT: a halted CPU's RIP is behind it."""
        if rip not in self._behind:
            try:
                self._behind[rip] = self._memory.read(rip - 1, 1) == halt.HLT
            except Unreadable as error:
                self._behind[rip] = error.absent
        return self._behind[rip]

    def again(self, rip: int, function: str) -> bool | Absent:
        """Whether what is at `rip`, behind a HLT of this function, brings a CPU that was woken back to the HLT."""
        if rip not in self._again:
            try:
                start, end = self._memory.symbols.extent(function)
                code = self._memory.read(rip, min(halt.READ, end - rip))
                self._again[rip] = halt.halts_again(code, rip, (start, end))
            except Unreadable as error:
                self._again[rip] = error.absent
        return self._again[rip]
