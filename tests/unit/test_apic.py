"""Local APIC values against SDM vol. 3, chapter 11."""

from __future__ import annotations

import pytest

from xen_symbols.x86 import apic


@pytest.mark.parametrize(
    ("base", "mode"),
    [
        (0xFEE00000, apic.Mode.DISABLED),
        (0xFEE00100, apic.Mode.DISABLED),
        (0xFEE00800, apic.Mode.XAPIC),
        (0xFEE00900, apic.Mode.XAPIC),
        (0xFEE00C00, apic.Mode.X2APIC),
        (0xFEE00D00, apic.Mode.X2APIC),
        (0xFEE00400, apic.Mode.INVALID),
        (0xFEE00500, apic.Mode.INVALID),
    ],
)
def test_mode_is_en_and_extd(base: int, mode: apic.Mode) -> None:
    assert apic.mode(base) is mode


def test_destination_of_an_icr_depends_on_the_mode() -> None:
    assert apic.icr_destination(0x0E000000, apic.Mode.XAPIC) == 0xE
    assert apic.icr_destination(0x0000000E, apic.Mode.X2APIC) == 0xE
