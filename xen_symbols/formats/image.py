"""A program as its file holds it: the initialised part of Xen's image, by the addresses at which it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xen_symbols.absence import Kind, Unreadable
from xen_symbols.formats.content import Content
from xen_symbols.formats.extents import Stretch


class Image:
    """Stretches of addresses, each backed by a stretch of the file."""

    def __init__(self, content: Content, stretches: Iterable[Stretch]) -> None:
        self._content, self._stretches = content, sorted(stretches)
        self.segments: Sequence[tuple[int, int]] = [(start, end) for start, end, _ in self._stretches]

    def read(self, address: int, size: int) -> bytes:
        """Bytes of one segment. Raises Unreadable (NOT_HELD) outside `segments`."""
        for start, end, position in self._stretches:
            if start <= address and address + size <= end:
                return self._content.read(position + address - start, size)
        raise Unreadable(f"the symbol file has no content for {address:#x} to {address + size:#x}", Kind.NOT_HELD)

    def pieces(self) -> list[tuple[int, bytes]]:
        """(address, content) of each segment. Raises Unreadable where the file lost some of it."""
        return [(start, self.read(start, end - start)) for start, end in self.segments]

    def moved(self, by: int) -> Image:
        """The same content at addresses higher by so much."""
        return Image(self._content, ((start + by, end + by, position) for start, end, position in self._stretches))
