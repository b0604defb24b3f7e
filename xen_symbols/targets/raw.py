"""A raw image of physical memory: which stretch of the file is what the user says, or Xen's own memory shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from xen_symbols.absence import Undecidable
from xen_symbols.formats.content import File
from xen_symbols.formats.extents import Extents
from xen_symbols.targets import PHYSICAL_END, Map, Memory, Opened, stretches


class RawMemory(Memory):
    """The file as physical memory. `given`: the user says where each stretch is, and nothing else is looked for."""

    def __init__(self, file: File, maps: Sequence[Map], *, given: bool) -> None:
        self.file, self.given = file, given
        self.says = ""
        self.arrange(maps)

    def arrange(self, maps: Sequence[Map], says: str = "") -> None:
        """Take the file as these stretches from now on; `says` is what reports add."""
        self.maps, self.says = sorted(maps), says
        self._extents = Extents((one.physical, one.end, one.offset) for one in maps)

    def arranged(self, maps: Sequence[Map]) -> RawMemory:
        """The same file in other stretches."""
        return RawMemory(self.file, maps, given=self.given)

    def read(self, address: int, size: int) -> bytes:
        return stretches.read(self.file, self._extents, address, size, lambda address: "is not in the image")

    def ranges(self) -> Sequence[tuple[int, int]]:
        return self._extents.ranges()

    def written(self) -> Iterator[tuple[int, int]]:
        """The ranges without a sparse file's holes, which are zeros."""
        written = list(self.file.written())
        for one in self.maps:
            for start, end in written:
                low, high = max(start, one.offset), min(end, one.offset + one.size)
                if low < high:
                    yield low - one.offset + one.physical, high - one.offset + one.physical


def read_raw(file: File, base: int | None, maps: Sequence[Map] = ()) -> Opened:
    """The file as memory from the physical address `base` on, or as `maps` say. Raises Undecidable."""
    if maps:
        return Opened(f"raw image in {len(maps)} stretches" if maps[1:] else "raw image", _given(file, maps))
    if base is None:
        raise Undecidable("not a dump of a known format; a raw image of memory needs its first byte's address (--base)")
    if not 0 <= base < PHYSICAL_END:
        raise Undecidable(f"its first byte cannot be at physical {base:#x}: give an address below {PHYSICAL_END:#x}")
    return Opened(f"raw image at {base:#x}", RawMemory(file, [Map(base, 0, file.size)], given=False))


def _given(file: File, maps: Sequence[Map]) -> RawMemory:
    for one in maps:
        if not (one.size > 0 and one.physical >= 0 and one.end <= PHYSICAL_END):
            raise Undecidable(f"{one.size:#x} bytes at physical {one.physical:#x} are not a stretch of memory (--map)")
        if not 0 <= one.offset <= file.size - one.size:
            raise Undecidable(
                f"it has no {one.size:#x} bytes at offset {one.offset:#x}: it ends at {file.size:#x} (--map)"
            )
    ordered = sorted(maps)
    for one, other in pairwise(ordered):
        if one.end > other.physical:
            raise Undecidable(f"physical {other.physical:#x} is mapped twice; give each address once (--map)")
    return RawMemory(file, maps, given=True)
