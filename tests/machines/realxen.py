"""Real Xens of the lab: the rows that the tests use, a traced crash, and RAM changed from outside."""

from __future__ import annotations

import functools
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.machines.changed import Machine
from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import Target
from xen_symbols.xen.locate import locate
from xencrash.lab.cells import cells, settled
from xencrash.lab.images import xen_images
from xencrash.lab.machine import Machine as Lab
from xencrash.lab.packages import Cache
from xencrash.lab.rows import SUITES, XENS
from xencrash.trace import trace


@dataclass(frozen=True)
class Row:
    """Rows of the lab; where a Xen differs from others follows from its symbols."""

    xen: str
    qemu: str
    lapic: str
    gdb: str = "debian"

    @functools.cached_property
    def symbols(self) -> SymbolTable:
        return load_symbols(str(xen_images(Cache(), XENS[self.xen]).symbols))

    @property
    def unhooked(self) -> str | None:
        """What the NMI is dispatched to before the crash: exception_table[] held it, until 327db3837a (4.17.0)."""
        return "do_nmi" if self.symbols.has("exception_table") else None

    @property
    def renamed(self) -> bool:
        """Whether the entry points have the names of 4.18 and later."""
        return self.symbols.has("entry_NMI")


# All of Debian 12, and each Xen with the newest QEMU and gdb of the lab.
ROWS = {
    f"{row.xen}-{row.qemu}-{row.lapic}": row
    for row in (
        Row("4.17", "7.2", "xapic"),
        *(Row(xen.name, "10.0", "x2apic", "18.1") for xen in XENS.values() if not SUITES[xen.suite].moving),
    )
}
# With --all-rows: every cell of the lab's matrix.
EVERY_ROW = {cell.name: Row(cell.xen, cell.qemu, cell.lapic, cell.gdb) for cell in settled(cells())}
MAIN = ROWS["4.17-7.2-xapic"]


def follow(lab: Lab, cpu: int, **options: Any) -> dict[str, Any]:
    return trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60,
                 trigger=lambda: lab.crash("panic", cpu), **options)  # fmt: skip


class Ram(Target):
    """The machine's RAM from outside, as a target for finding addresses, and for changing it."""

    kind, format, location = "live", "RAM file", "lab"

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.bytes = mmap.mmap(file.fileno(), 0)

    def read_physical(self, address: int, size: int) -> bytes:
        if address + size > len(self.bytes):
            raise Unreadable("beyond RAM")
        return self.bytes[address : address + size]

    def read_physical_many(self, requests: Any) -> list[bytes | Absent]:
        inside = len(self.bytes)
        return [
            self.read_physical(address, size) if address + size <= inside else Absent("beyond RAM")
            for address, size in requests
        ]

    def physical_ranges(self) -> list[tuple[int, int]]:
        return [(0, len(self.bytes))]

    def cpus(self) -> list[Any]:
        return []

    def notes(self) -> list[Any]:
        return []


class LiveMachine(Machine):
    """The recorded machine's helpers, on a real one; changes can be undone."""

    def __init__(self, lab: Lab, ram: Path | None = None) -> None:
        """`ram`: the file that its RAM is, if not the lab's."""
        self.ram = Ram(ram or Path(lab.ram_file))
        self.symbols = load_symbols(str(lab.symbols))
        self.memory = locate(self.ram, self.symbols)
        self.undo: list[tuple[int, bytes]] = []

    def poke(self, address: int, data: bytes) -> None:
        at = self.memory.physical(address)
        self.undo.append((at, self.ram.bytes[at : at + len(data)]))
        self.write(at, data)

    def write(self, at: int, data: bytes) -> None:
        self.ram.bytes[at : at + len(data)] = data

    def restore(self) -> None:
        while self.undo:
            self.write(*self.undo.pop())
