"""Write watchpoints on gates: who changed one, if that is seen.

Only on writes: one that also catches reads makes QEMU lose the NMI that reads the gate. A hit is lost where several
CPUs write at once, so what changed is determined by reading the gates again; a watchpoint only adds the writer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import gdb

from gdbplugin.declare import NoteWrite
from gdbplugin.target import cpu_index
from xen_symbols.crashpath.gatechanges import Key
from xen_symbols.x86.gate import SIZE

_watchpoints: list[_Gate] = []


class _Gate(gdb.Breakpoint):
    """One gate's 16 bytes. `note` gets the gate, the CPU that wrote (the target's index), where it goes on, and what
    every gate that is watched holds then."""

    def __init__(self, key: Key, address: int, note: NoteWrite) -> None:
        super().__init__(
            f"*(unsigned long (*)[2]) {address:#x}", type=gdb.BP_WATCHPOINT, wp_class=gdb.WP_WRITE, internal=True
        )
        self.silent = True
        self.key, self.address = key, address
        self._note = note

    def stop(self) -> bool:
        self._note(self.key, cpu_index(gdb.selected_thread()), gdb.newest_frame().pc(), _contents())
        return False


def _contents() -> dict[Key, bytes]:
    """What each gate holds, as the CPU that stopped sees it: code that writes to a gate runs on Xen's page tables."""
    memory = gdb.selected_inferior()
    found = {}
    for point in _watchpoints:
        with contextlib.suppress(gdb.MemoryError):
            found[point.key] = bytes(memory.read_memory(point.address, SIZE))
    return found


def watch(addresses: Mapping[Key, int], note: NoteWrite) -> str | None:
    """Watch gates until `end_watching`. Returns why gdb cannot have the machine do it; None if it can."""
    for key, address in addresses.items():
        point = _Gate(key, address, note)
        _watchpoints.append(point)
        if point.type != gdb.BP_HARDWARE_WATCHPOINT:
            end_watching()
            return "gdb would watch a gate by single steps: set can-use-hw-watchpoints 1"
    return None


def end_watching() -> None:
    while _watchpoints:
        point = _watchpoints.pop()
        if point.is_valid():
            point.delete()
