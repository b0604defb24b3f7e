"""Where bytes and registers come from: a live QEMU, or a dump.

Every target answers the same questions and says what it cannot answer by a typed
absence. Addresses are physical here; Xen's virtual addresses are translated by Xen's
own page tables in one place, `xen_symbols.xen.locate`, for every kind of target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.formats.content import Content
from xen_symbols.formats.elfnotes import Note
from xen_symbols.records import NamedTuple

_UNASKED = Absent("it is not in memory, and the target holds no device state", Kind.NOT_HELD)

READ_MAX = 64 << 20  # bytes; Xen keeps nothing larger in one piece (conring_size= ends there)


PHYSICAL_END = 1 << 52  # the most physical memory that x86-64 has: SDM vol. 3, 4.1.4


def bounded(address: int, size: int) -> None:
    """Raises Unreadable for more than one read may ask for, which a length in damaged memory may, and for less than
    nothing."""
    if size > READ_MAX:
        raise Unreadable(f"{size} bytes at {address:#x} are too many for one read, which takes at most {READ_MAX}")
    if size < 0 or address < 0:
        raise Unreadable(f"{size} bytes at {address:#x}: not a valid range of memory")


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
    xen_cpu: int | None = None  # at whose place it is in the source (Xen's notes, in the order of Xen's numbers)
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
    of_memory: bool = False  # these notes are in Xen's memory, and not the target's own


class Target(Protocol):
    """A machine with Xen in it, live or dumped: all that others use of one. A subclass has what is common already."""

    kind: Literal["live", "dump"]
    format: str  # what it is, e.g. "QEMU gdbstub", "ELF vmcore"
    location: str  # how the user named it
    base: int | None = None  # of a raw image: the physical address of its first byte, which the user gave
    truncated: str | None = None  # of a dump: that its file lost its end, and where it ends
    memory: Memory | None = None  # of a dump: how its format holds it

    @property
    def accelerator(self) -> Literal["kvm", "tcg"] | Absent:
        """What runs a live machine's CPUs: `kvm` or `tcg`."""
        return Absent("a dump does not say what ran the machine" if self.kind == "dump" else "not known")

    def read_physical(self, address: int, size: int) -> bytes:
        """`size` bytes at a physical address; raises Unreadable, never returns fewer or made-up bytes.

        A dump refuses more than READ_MAX at once.
        """
        ...

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        """Several reads in one go, in order: each its bytes, or why it has none."""
        answers: list[bytes | Absent] = []
        for address, size in requests:
            try:
                answers.append(self.read_physical(address, size))
            except Unreadable as error:
                answers.append(error.absent)
        return answers

    def physical_ranges(self) -> Sequence[tuple[int, int]]:
        """(start, end) of the physical memory that can be read, ascending; ends are exclusive."""
        ...

    def written_ranges(self) -> Iterable[tuple[int, int]]:
        """The same without what is known to be zeros, and need not be read for that."""
        return self.physical_ranges()

    def cpus(self) -> Sequence[PhysicalCpu]:
        """Every CPU with what this target knows of it."""
        ...

    def notes(self) -> Sequence[Note]:
        """ELF notes of a dump, in file order; empty for a live machine."""
        ...

    def batch(self) -> AbstractContextManager[None]:
        """Everything that is read inside is of one moment."""
        return nullcontext()


# -- dumps ------------------------------------------------------------------------------------


class Map(NamedTuple):
    """A stretch of memory in a raw image: its physical address, where it is in the file, and its size in bytes."""

    physical: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.physical + self.size


class Memory(Protocol):
    """Physical memory as one format of dumps holds it."""

    given: bool = False  # the user says what is where in the file
    says: str = ""  # what Xen's memory showed of that, for reports

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes; raises Unreadable."""
        ...

    def ranges(self) -> Sequence[tuple[int, int]]:
        """(start, end) of what can be read, ascending."""
        ...

    def written(self) -> Iterable[tuple[int, int]]:
        """The same without what is known to be zeros."""
        return self.ranges()


class Opened(NamedTuple):
    """What is in a dump. `format` is what reports call it; `truncated` says what of it the file has lost."""

    format: str
    memory: Memory
    notes: Sequence[Note] = ()
    truncated: str | None = None


class Wrapped(NamedTuple):
    """A file within the file, which is the dump; `how` goes before its format."""

    how: str
    content: Content


# What the module of a format calls `read_dump`. Raises Undecidable, and Unreadable where bookkeeping is missing.
Reader = Callable[[Content], Opened | Wrapped]
