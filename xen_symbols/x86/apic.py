"""Local APIC registers (Intel SDM vol. 3, chapter 11; AMD APM vol. 2, chapter 16)."""

from __future__ import annotations

import enum

APIC_BASE_EXTD = 1 << 10  # SDM fig. 11-5
APIC_BASE_EN = 1 << 11

SPIV_SOFTWARE_ENABLE = 1 << 8  # SDM fig. 11-23

LVT_MASKED = 1 << 16  # SDM fig. 11-8
LVT_NAMES = ("timer", "thermal", "performance", "LINT0", "LINT1", "error")

# Interrupt command register, SDM fig. 11-12
ICR_DELIVERY_MODE = 7 << 8
ICR_DELIVERY_NMI = 4 << 8
ICR_DESTINATION_LOGICAL = 1 << 11
ICR_SHORTHAND = 3 << 18


class Mode(enum.Enum):
    """IA32_APIC_BASE bits 11 (EN) and 10 (EXTD): SDM vol. 3, table 11-5."""

    DISABLED = "disabled"
    XAPIC = "xapic"
    X2APIC = "x2apic"
    INVALID = "invalid"  # EXTD without EN


def mode(apic_base: int) -> Mode:
    """The mode that a value of IA32_APIC_BASE selects."""
    if apic_base & APIC_BASE_EN:
        return Mode.X2APIC if apic_base & APIC_BASE_EXTD else Mode.XAPIC
    return Mode.INVALID if apic_base & APIC_BASE_EXTD else Mode.DISABLED


def icr_destination(icr_high: int, mode: Mode) -> int:
    """The APIC id in the high half: bits 31-24 in xAPIC mode, all 32 bits in x2APIC mode (SDM figs. 11-12, 11-28)."""
    return icr_high if mode is Mode.X2APIC else icr_high >> 24
