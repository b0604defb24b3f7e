"""Physical memory as stretches of a file: what every format without compression comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import Content
from xen_symbols.formats.extents import Conflict, Extents, Ranges, Stretch
from xen_symbols.targets import Memory, bounded


def disjoint(stretches: Iterable[Stretch], what: str) -> Extents:
    """The stretches, in any order, that the file's `what` ("program headers") describe. Raises Undecidable where two
    of them contradict each other."""
    try:
        extents = Extents(stretches)
    except Conflict as conflict:
        address, one, other = conflict.args
        raise Undecidable(
            f"{what} overlap: physical {address:#x} is at offsets {one:#x} and {other:#x}; the file is damaged"
        ) from None
    if shared := extents.shared():
        offset, one_address, other_address = shared
        raise Undecidable(
            f"{what} overlap: physical {one_address:#x} and {other_address:#x} are both at offset {offset:#x}; "
            "the file is damaged"
        )
    return extents


def read(content: Content, held: Extents, address: int, size: int, why_not: Callable[[int], str]) -> bytes:
    """`size` bytes of the content by the stretches that it holds. Raises Unreadable where one is missing: `why_not`
    says of its address what became of it."""
    bounded(address, size)
    whole = held.position(address, size)
    if whole is not None:
        return content.read(whole, size)
    parts = []
    for position, length in held.pieces(address, size):
        if position is None:
            raise Unreadable(f"physical {address:#x} {why_not(address)}")
        parts.append(content.read(position, length))
        address += length
    return b"".join(parts)


_NONE = Extents(())


class StretchMemory(Memory):
    """`held` is in the file; `left_out` is memory that its writer knew and did not write; `lost` is what a `truncated`
    file no longer has."""

    def __init__(
        self, content: Content, held: Extents, left_out: Extents = _NONE, lost: Extents = _NONE,
        truncated: str | None = None,
    ) -> None:  # fmt: skip
        self._content, self._held, self._left_out = content, held, left_out
        self._lost, self._truncated = lost, truncated

    def read(self, address: int, size: int) -> bytes:
        return read(self._content, self._held, address, size, self._why_not)

    def _why_not(self, address: int) -> str:
        if self._lost.position(address, 1) is not None:
            return f"is lost: {self._truncated or 'the file has a hole there'}"
        if self._left_out.position(address, 1) is not None:
            return "was left out when the dump was written"
        return "is not in the dump"

    def ranges(self) -> Ranges:
        return self._held.ranges()
