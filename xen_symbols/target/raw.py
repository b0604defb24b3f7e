"""A raw image of physical memory: one stretch that begins at an address given by hand."""

from __future__ import annotations

from xen_symbols.absence import Unreadable
from xen_symbols.target import bounded
from xen_symbols.target.image import Image


class RawMemory:
    """The whole file as physical memory from `base` on."""

    def __init__(self, image: Image, base: int) -> None:
        self._image, self._base = image, base

    def read(self, address: int, size: int) -> bytes:
        bounded(address, size)
        if not self._base <= address <= address + size <= self._base + self._image.size:
            raise Unreadable(f"physical {address:#x} is not in the image")
        return self._image.read(address - self._base, size)

    def ranges(self) -> list[tuple[int, int]]:
        return [(self._base, self._base + self._image.size)]
