"""Write watchpoints on gates: who changed one, where that is seen.

Only on writes: one that also catches reads makes QEMU lose the NMI that reads the gate. A hit is lost where several
CPUs write at once, so what changed is told by reading the gates again, and a watchpoint adds the writer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import gdb

from gdbplugin.target import cpu_index
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.gatechanges import Key

Note = Callable[[Key, int, int], None]
_watchpoints: list[gdb.Breakpoint] = []


class _Gate(gdb.Breakpoint):
    """One gate's 16 bytes. `note` is told the gate, the CPU that wrote (the target's index) and where it goes on."""

    def __init__(self, key: Key, address: int, note: Note) -> None:
        super().__init__(
            f"*(unsigned long (*)[2]) {address:#x}", type=gdb.BP_WATCHPOINT, wp_class=gdb.WP_WRITE, internal=True
        )
        self.silent = True
        self._key, self._note = key, note

    def stop(self) -> bool:
        self._note(self._key, cpu_index(gdb.selected_thread()), gdb.newest_frame().pc())
        return False


def watch(addresses: Mapping[Key, int], note: Note) -> None:
    """Watch gates until `end_watching`. Raises Undecidable where the stub has no watchpoints."""
    for key, address in addresses.items():
        point = _Gate(key, address, note)
        _watchpoints.append(point)
        if point.type != gdb.BP_HARDWARE_WATCHPOINT:
            end_watching()
            raise Undecidable("gdb would watch a gate by single steps: set can-use-hw-watchpoints 1")


def end_watching() -> None:
    while _watchpoints:
        point = _watchpoints.pop()
        if point.is_valid():
            point.delete()
