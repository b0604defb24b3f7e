"""RFLAGS, CR0, CR3 and CR4 as they must be in 64-bit mode at privilege level 0 (Intel SDM vol. 3, 2.3 and 2.5)."""

from __future__ import annotations

RFLAGS_IF = 1 << 9

_RFLAGS_FIXED = 1 << 1
# TF, DF, IOPL, NT, RF and VM: no interrupt or NMI handler of Xen's runs with one of them, nor compiled code with DF.
_RFLAGS_NEVER = 1 << 8 | 1 << 10 | 3 << 12 | 1 << 14 | 1 << 16 | 1 << 17
_RFLAGS_RESERVED = ~0 << 22 | 1 << 15 | 1 << 5 | 1 << 3
_CR0_PE_PG = 1 | 1 << 31
_CR4_PAE, _CR4_PCIDE = 1 << 5, 1 << 17


def is_rflags_of_xen(value: int) -> bool:
    """Whether these are flags that code of Xen's may run with."""
    return value & (_RFLAGS_FIXED | _RFLAGS_NEVER | _RFLAGS_RESERVED) == _RFLAGS_FIXED


def is_cr0_of_64_bit_mode(value: int) -> bool:
    return value & _CR0_PE_PG == _CR0_PE_PG and value < 1 << 32


def is_cr4_of_64_bit_mode(value: int) -> bool:
    """Bit 32 is FRED; those above are reserved."""
    return bool(value & _CR4_PAE) and value < 1 << 33


def is_cr3(value: int, cr4: int) -> bool:
    """Whether no bit is set that is reserved, or that Xen leaves 0: beside the PCID there are PWT and PCD
    alone; at address 0 lies the firmware's page."""
    return 0xFFF < value < 1 << 52 and (bool(cr4 & _CR4_PCIDE) or not value & 0xFFF)
