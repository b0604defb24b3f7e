"""A raw image of physical memory: one stretch that begins at an address given by hand."""

from __future__ import annotations

from collections.abc import Iterator

from xen_symbols.absence import Unreadable
from xen_symbols.targets import bounded
from xen_symbols.targets.image import DumpFile


class RawMemory:
    """The whole file as physical memory from `base` on."""

    def __init__(self, image: DumpFile, base: int) -> None:
        self._image, self._base = image, base

    def read(self, address: int, size: int) -> bytes:
        bounded(address, size)
        if not self._base <= address <= address + size <= self._base + self._image.size:
            raise Unreadable(f"physical {address:#x} is not in the image")
        return self._image.read(address - self._base, size)

    def ranges(self) -> list[tuple[int, int]]:
        return [(self._base, self._base + self._image.size)]

    def written(self) -> Iterator[tuple[int, int]]:
        """The ranges without a sparse file's holes, which are zeros."""
        for start, end in self._image.written():
            yield self._base + start, self._base + end
