"""Stretches of a file that back stretches of an address space."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

Stretch = tuple[int, int, int]  # start, end (exclusive), position of the start in the file


class Conflict(Exception):
    """Two stretches give one address two positions: (address, one position, the other)."""


class Extents:
    """Disjoint stretches of an address space, ascending, each backed by a stretch of a file."""

    def __init__(self, stretches: Iterable[Stretch]) -> None:
        """From stretches in any order. Those that agree are joined; raises Conflict where two do not."""
        self._starts, self._ends, self._positions = array("Q"), array("Q"), array("Q")
        last_end = delta = -1
        for start, end, position in sorted(stretches):
            if start < last_end and position - start != delta:
                raise Conflict(start, start + delta, position)
            if start <= last_end and position - start == delta:
                if end > last_end:
                    self._ends[-1] = last_end = end
                continue
            self._starts.append(start)
            self._ends.append(end)
            self._positions.append(position)
            last_end, delta = end, position - start

    def shared(self) -> tuple[int, int, int] | None:
        """(position, one address, another) of a place in the file that stands for two addresses; None if none does."""
        last_end = last = 0
        for index in sorted(range(len(self._starts)), key=self._positions.__getitem__):
            position, start = self._positions[index], self._starts[index]
            if position < last_end:
                return position, self._starts[last] + position - self._positions[last], start
            last_end, last = position + self._ends[index] - start, index
        return None

    def split(self, held: Sequence[tuple[int, int]]) -> tuple[Extents, Extents]:
        """What of it lies in these stretches of the file (start, end), which ascend, and what does not."""
        inside: list[Stretch] = []
        outside: list[Stretch] = []
        file = Extents((start, end, start) for start, end in held)
        for start, end, position in zip(self._starts, self._ends, self._positions, strict=True):
            for found, length in file.pieces(position, end - start):
                (outside if found is None else inside).append((start, start + length, position))
                start, position = start + length, position + length
        return Extents(inside), Extents(outside)

    def position(self, address: int, size: int) -> int | None:
        """Where all of the range lies in the file in one piece; None where it does not."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address + size > self._ends[index]:
            return None
        return self._positions[index] + address - self._starts[index]

    def pieces(self, address: int, size: int) -> Iterator[tuple[int | None, int]]:
        """(position, length) for each part of the range in order; position None for a hole."""
        index = bisect_right(self._starts, address) - 1
        end = address + size
        while address < end:
            if index >= 0 and address < self._ends[index]:
                length = min(end, self._ends[index]) - address
                yield self._positions[index] + address - self._starts[index], length
            else:
                following = self._starts[index + 1] if index + 1 < len(self._starts) else end
                length = min(end, following) - address
                yield None, length
            address += length
            if index + 1 < len(self._starts) and address >= self._starts[index + 1]:
                index += 1

    def ranges(self) -> Ranges:
        """What is backed, neighbours joined."""
        starts, ends = array("Q"), array("Q")
        for start, end in zip(self._starts, self._ends, strict=True):
            if ends and ends[-1] == start:
                ends[-1] = end
            else:
                starts.append(start)
                ends.append(end)
        return Ranges(starts, ends)

    def end(self) -> int:
        return self._ends[-1] if self._ends else 0


class Ranges(Sequence[tuple[int, int]]):
    """(start, end) pairs in 16 bytes each: a dump may have millions."""

    def __init__(self, starts: array[int], ends: array[int]) -> None:
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> Ranges: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | Ranges:
        if isinstance(index, slice):
            return Ranges(self._starts[index], self._ends[index])
        return self._starts[index], self._ends[index]
