"""The task state segment in 64-bit mode (Intel SDM vol. 3, 8.7, figure 8-11): the stacks that the CPU switches to."""

from __future__ import annotations

import struct

from xen_symbols.records import NamedTuple

SIZE = 104
_LAYOUT = struct.Struct("<4x3Q8x7Q12x")


class Tss(NamedTuple):
    """`rsp` for rings 0 to 2; `ist[n - 1]` is IST n. Each is the top of a stack: the CPU pushes below it."""

    rsp: tuple[int, ...]
    ist: tuple[int, ...]


def decode(raw: bytes) -> Tss:
    """A TSS from its 104 bytes."""
    values = _LAYOUT.unpack(raw)
    return Tss(values[:3], values[3:])
