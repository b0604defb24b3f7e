"""A raw image of physical memory: one stretch that begins at an address given by hand."""

from __future__ import annotations

from collections.abc import Iterator

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import File
from xen_symbols.targets import PHYSICAL_END, Memory, Opened, bounded


class RawMemory(Memory):
    """The whole file as physical memory from `base` on."""

    def __init__(self, file: File, base: int) -> None:
        self._file, self._base = file, base

    def read(self, address: int, size: int) -> bytes:
        bounded(address, size)
        if not self._base <= address <= address + size <= self._base + self._file.size:
            raise Unreadable(f"physical {address:#x} is not in the image")
        return self._file.read(address - self._base, size)

    def ranges(self) -> list[tuple[int, int]]:
        return [(self._base, self._base + self._file.size)]

    def written(self) -> Iterator[tuple[int, int]]:
        """The ranges without a sparse file's holes, which are zeros."""
        for start, end in self._file.written():
            yield self._base + start, self._base + end


def read_raw(file: File, base: int) -> Opened:
    """The file as memory from the physical address `base` on. Raises Undecidable."""
    if not 0 <= base < PHYSICAL_END:
        raise Undecidable(f"its first byte cannot be at physical {base:#x}: give an address below {PHYSICAL_END:#x}")
    return Opened(f"raw image at {base:#x}", RawMemory(file, base))
