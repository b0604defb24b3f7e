"""Where bytes and registers come from: a live QEMU, or a dump.

Every target answers the same questions and says what it cannot answer by a typed
absence. Addresses are physical here; Xen's virtual addresses are translated by Xen's
own page tables in one place, `xen_symbols.xen.locate`, for every kind of target.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from xen_symbols.absence import Absent, Kind, Unreadable

_UNASKED = Absent("it is not in memory, and the target holds no device state", Kind.NOT_HELD)

READ_MAX = 64 << 20  # bytes; Xen keeps nothing larger in one piece (conring_size= ends there)


PHYSICAL_END = 1 << 52  # the most physical memory that x86-64 has: SDM vol. 3, 4.1.4


def bounded(address: int, size: int) -> None:
    """Raises Unreadable for more than one read may ask for, which a length in damaged memory may, and for less than
    nothing."""
    if size > READ_MAX:
        raise Unreadable(f"{size} bytes at {address:#x} are too many for one read; {READ_MAX} are the most")
    if size < 0 or address < 0:
        raise Unreadable(f"{size} bytes at {address:#x} are no memory")


class Lapic(NamedTuple):
    """A local APIC's registers (Intel SDM vol. 3, table 11-1). None of them is in memory."""

    source: str
    apic_base: int | Absent  # IA32_APIC_BASE, SDM fig. 11-5
    apic_id: int | Absent = _UNASKED
    spiv: int | Absent = _UNASKED  # spurious-interrupt vector register
    icr_low: int | Absent = _UNASKED
    icr_high: int | Absent = _UNASKED  # destination: bits 31-24 in xAPIC mode, all in x2APIC mode
    lvt: tuple[int, ...] | Absent = _UNASKED  # timer, thermal, perf, LINT0, LINT1, error


class PhysicalCpu(NamedTuple):
    """One physical (virtual-machine) CPU as the target knows it, before Xen's number for it is known.

    `index` is the target's own number (QEMU's cpu_index, a note's position).
    Registers by their lower-case manual names: rip, rsp, rflags, cr0, cr3, cr4, efer, cs, …
    """

    index: int  # type: ignore[assignment] # hides tuple.index, which nobody asks a record for
    registers: dict[str, int]
    xen_cpu: int | None = None  # when the source itself says which Xen CPU this is (Xen's notes)
    apic_id: int | Absent = _UNASKED  # initial APIC id
    idtr: tuple[int, int] | Absent = _UNASKED  # base, limit
    tr_base: int | Absent = _UNASKED
    halted: bool | Absent = _UNASKED
    nmi_blocked: bool | Absent = _UNASKED
    nmi_pending: bool | Absent = _UNASKED
    guest_mode: bool | Absent = _UNASKED  # in an SVM/VMX guest: cr3, rip and segments are the guest's
    lapic: Lapic | Absent = _UNASKED
    current: bool = True  # false when the registers are those that Xen saved in its notes
    source: str = ""


class Note(NamedTuple):
    """One ELF note (gABI, chapter 5). `name` without its NUL."""

    name: str
    type: int
    desc: bytes


class Target(Protocol):
    """A machine with Xen in it, live or dumped."""

    kind: str  # "live" or "dump"
    format: str  # what it is, e.g. "QEMU gdbstub", "ELF vmcore"
    location: str  # how the user named it

    def read_physical(self, address: int, size: int) -> bytes:
        """`size` bytes at a physical address; raises Unreadable, never returns fewer or made-up bytes.

        A dump refuses more than READ_MAX at once.
        """
        ...

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        """Several reads in one go, in order."""
        ...

    def physical_ranges(self) -> Sequence[tuple[int, int]]:
        """(start, end) of the physical memory that can be read, ascending; ends are exclusive."""
        ...

    def cpus(self) -> Sequence[PhysicalCpu]:
        """Every CPU with what this target knows of it."""
        ...

    def notes(self) -> Sequence[Note]:
        """ELF notes of a dump, in file order; empty for a live machine."""
        ...
