"""IDT gate descriptors in 64-bit mode (Intel SDM vol. 3, 6.14.1, figure 6-8; AMD APM vol. 2, 4.8.4)."""

from __future__ import annotations

import struct
from functools import lru_cache

from xen_symbols.records import NamedTuple

IDT_ENTRIES = 256
SIZE = 16

VECTOR_NMI = 2  # SDM vol. 3, table 6-1
VECTOR_DF = 8
VECTOR_MC = 18
_NAMES = "#DE #DB NMI #BP #OF #BR #UD #NM #DF - #TS #NP #SS #GP #PF - #MF #AC #MC #XM #VE #CP"
VECTOR_NAMES = {vector: name for vector, name in enumerate(_NAMES.split()) if name != "-"}

INTERRUPT_GATE = 14  # SDM vol. 3, table 3-2
TRAP_GATE = 15

_LAYOUT = struct.Struct("<QQ")
# Bits that must be 0: word 0 bits 35-39 and the S bit 44, word 1 bits 32-63.
_RESERVED_LOW = 0x1F << 35 | 1 << 44
_RESERVED_HIGH = 0xFFFFFFFF << 32


class Gate(NamedTuple):
    """A decoded gate. `handler` is the 64-bit offset; `reserved` holds the bits that should be 0, in place."""

    handler: int
    selector: int
    ist: int
    type: int
    dpl: int
    present: bool
    reserved: tuple[int, int] = (0, 0)

    @property
    def raw(self) -> bytes:
        return encode(self)


@lru_cache(maxsize=256)  # thousands of CPUs have the same few gates
def decode(raw: bytes) -> Gate:
    """A gate from its 16 bytes. Every bit is kept, so that `encode` gives the same bytes."""
    low, high = _LAYOUT.unpack(raw)
    return Gate(
        handler=low & 0xFFFF | low >> 48 << 16 | (high & 0xFFFFFFFF) << 32,
        selector=low >> 16 & 0xFFFF,
        ist=low >> 32 & 7,
        type=low >> 40 & 0xF,
        dpl=low >> 45 & 3,
        present=bool(low >> 47 & 1),
        reserved=(low & _RESERVED_LOW, high & _RESERVED_HIGH),
    )


def encode(gate: Gate) -> bytes:
    """The 16 bytes of a gate."""
    low = (
        gate.handler & 0xFFFF
        | gate.selector << 16
        | gate.ist << 32
        | gate.type << 40
        | gate.dpl << 45
        | int(gate.present) << 47
        | (gate.handler >> 16 & 0xFFFF) << 48
        | gate.reserved[0]
    )
    return _LAYOUT.pack(low, gate.handler >> 32 | gate.reserved[1])
