"""Values with where they were read, and batches of reads: declared first, made together, answered by handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xen_symbols.absence import Absent, Kind
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Evidence
from xen_symbols.xen.memory import XenMemory

_ADDRESSES = 1 << 64


class Read(NamedTuple):
    """A value and where it was read, which is the evidence of every finding that rests on it."""

    value: Any
    evidence: tuple[Evidence, ...] = ()

    @property
    def present(self) -> bool:
        return not isinstance(self.value, Absent)

    @property
    def address(self) -> int | None:
        """Where it lies in Xen's memory; None for what was not read there."""
        return self.evidence[0].address if self.evidence else None

    @property
    def raw(self) -> bytes | None:
        """Its bytes there."""
        return self.evidence[0].raw if self.evidence else None

    @property
    def symbol(self) -> str | None:
        """What was read, in C's words: a variable, or an element of one."""
        return self.evidence[0].symbol if self.evidence else None


def in_memory(value: Any, address: int, raw: bytes, symbol: str | None = None) -> Read:
    """A value decoded from `raw`, which lies at `address`."""
    return Read(value, (Evidence("memory", address, raw, symbol),))


def absent(reason: str | Absent, kind: Kind = Kind.UNREAD) -> Read:
    return Read(reason if isinstance(reason, Absent) else Absent(reason, kind))


class Asked:
    """One read of a batch. `answer` is its bytes, or why there are none; it is there once the batch was read."""

    __slots__ = ("address", "answer", "size")

    answer: bytes | Absent

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size

    def part(self, offset: int, size: int) -> Asked:
        """Some of the bytes of what was read: an element of an array, a field."""
        part = Asked(self.address + offset, size)
        part.answer = self.answer if isinstance(self.answer, Absent) else self.answer[offset : offset + size]
        return part

    def read(self, decode: Callable[[bytes], Any], symbol: str) -> Read:
        """The answer as a value."""
        answer = self.answer
        return absent(answer) if isinstance(answer, Absent) else in_memory(decode(answer), self.address, answer, symbol)


class Batch:
    """Reads of Xen's memory that go out together. Whoever asks keeps the handle, so that no answer depends on what
    else was asked."""

    def __init__(self, memory: XenMemory) -> None:
        self._memory = memory
        self._asked: list[Asked] = []

    def ask(self, address: int | Absent, size: int) -> Asked:
        """A read of `size` bytes. An absent address is its own answer."""
        if isinstance(address, Absent):
            asked = Asked(0, size)
            asked.answer = address
            return asked
        asked = Asked(address % _ADDRESSES, size)
        self._asked.append(asked)
        return asked

    def follow(self, pointer: Asked, offset: int, size: int, null: Absent) -> Asked:
        """A read at `offset` from where a pointer of an earlier batch leads; `null` is what a null pointer means."""
        if isinstance(pointer.answer, Absent):
            return self.ask(pointer.answer, size)
        return self.ask(unsigned(pointer.answer) + offset if any(pointer.answer) else null, size)

    def read(self) -> None:
        """Make the reads that were asked for, and answer them."""
        asked, self._asked = self._asked, []
        answers = self._memory.read_many([(each.address, each.size) for each in asked])
        for each, answer in zip(asked, answers, strict=True):
            each.answer = answer


# -- what bytes hold --------------------------------------------------------------------------


def unsigned(raw: bytes) -> int:
    """A little-endian number."""
    return int.from_bytes(raw, "little")


def signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def flag(raw: bytes) -> bool | Absent:
    """A bool of C's, which is 0 or 1: anything else was not written by Xen."""
    value = unsigned(raw)
    return value == 1 if value < 2 else Absent(f"it holds {value:#x}, which is not a bool")


def mask(raw: bytes) -> frozenset[int]:
    """The CPU numbers in a cpumask_t."""
    bits = int.from_bytes(raw, "little")
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return frozenset(found)
