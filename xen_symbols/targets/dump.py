"""Opening a dump: the format is told by the file's content, and the rest is the Target protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.targets import PHYSICAL_END, Note, PhysicalCpu
from xen_symbols.targets.image import DumpFile, Image
from xen_symbols.targets.notes import cpus_of

_FLATTENED, _ELF, _KDUMP = b"makedumpfile\0\0\0\0", b"\x7fELF", b"KDUMP   "
# Files that people hand over and that need one more step, or are something else.
_OTHERS = {
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"PAGEDU64": "a Windows crash dump; take the dump with another format (dump-guest-memory -z, or none)",
    b"QEVM": "a QEMU migration stream; take a dump with dump-guest-memory",
    b"LibvirtQ": "a libvirt save file; take a dump with virsh dump --memory-only",
}


class Memory(Protocol):
    """Physical memory as one format holds it."""

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes; raises Unreadable."""
        ...

    def ranges(self) -> Sequence[tuple[int, int]]:
        """(start, end) of what can be read, ascending."""
        ...


class Dump:
    """A dump file as a Target."""

    kind = "dump"

    def __init__(
        self, location: str, format: str, memory: Memory, notes: Sequence[Note], base: int | None = None
    ) -> None:
        """`base` is that of a raw image."""
        self.location, self.format, self.base = location, format, base
        self._memory, self._notes = memory, notes
        self.read_physical = memory.read
        self.physical_ranges = memory.ranges
        self.written_ranges = getattr(memory, "written", memory.ranges)
        self._cpus = cpus_of(notes)

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        """Several reads in order, each its bytes or why it has none."""
        answers: list[bytes | Absent] = []
        for address, size in requests:
            try:
                answers.append(self._memory.read(address, size))
            except Unreadable as error:
                answers.append(error.absent)
        return answers

    def cpus(self) -> Sequence[PhysicalCpu]:
        """Every CPU that the notes name; empty for a raw image."""
        return self._cpus

    def notes(self) -> Sequence[Note]:
        """All notes in file order."""
        return self._notes


def open_dump(path: str, *, base: int | None = None) -> Dump:
    """Open the dump at `path`, whoever wrote it.

    `base` is the physical address of the first byte of a raw image of memory, and for nothing
    else. Raises Undecidable: one line that names the file, what is wrong with it and where.
    """
    try:
        return _open(DumpFile(path), path, base)
    except OSError as error:
        raise Undecidable(f"{path}: {error.strerror}") from None
    except Undecidable as error:
        raise Undecidable(f"{path}: {error}") from None
    except Unreadable as error:  # bookkeeping that a flattened file does not hold
        raise Undecidable(f"{path}: {error}; the file is truncated or damaged") from None


def _open(file: DumpFile, path: str, base: int | None) -> Dump:
    wrapping = ""
    image: Image = file
    start = image.read(0, min(16, image.size))
    # Each format is imported when it is met: most runs meet one.
    if start == _FLATTENED:
        from xen_symbols.targets.flattened import FlattenedFile

        image = FlattenedFile(image)
        wrapping, start = "flattened ", image.read(0, min(16, image.size))
    if start.startswith(_ELF):
        from xen_symbols.targets.elfcore import read_elf

        elf, notes = read_elf(image)
        return _recognised(Dump(path, f"{wrapping}ELF core", elf, notes), base)
    if start.startswith(_KDUMP):
        from xen_symbols.targets.kdump import KdumpMemory

        pages = KdumpMemory(image)
        format = f"{wrapping}kdump" + ", which its writer could not complete" * pages.incomplete
        return _recognised(Dump(path, format, pages, pages.notes()), base)
    if wrapping:
        raise Undecidable(f"a flattened file with neither an ELF core nor a kdump in it, but {start.hex(' ')}")
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise Undecidable(what)
    if base is not None and not 0 <= base < PHYSICAL_END:
        raise Undecidable(f"its first byte cannot be at physical {base:#x}: give an address below {PHYSICAL_END:#x}")
    if base is None:
        raise Undecidable("not a dump of a known format; a raw image of memory needs its first byte's address (--base)")
    from xen_symbols.targets.raw import RawMemory

    return Dump(path, f"raw image at {base:#x}", RawMemory(file, base), (), base)


def _recognised(dump: Dump, base: int | None) -> Dump:
    if base is not None:
        raise Undecidable(f"the file says itself what is where ({dump.format}); a base is for a raw image of memory")
    return dump
