"""QEMU's device state: a real one (QEMU 7.2, Xen 4.17.7 stopped at the handover), and damaged ones.

The recording holds the sections cpu, cpu_common and apic of 4 CPUs, and one other; the rest was left out.
"""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recording import RECORDED
from xen_symbols.absence import Unreadable
from xen_symbols.target import Lapic
from xen_symbols.target.qemu_state import parse_cpus, sections, unsavable

STATE = (RECORDED / "qemu-7.2-handover.devstate").read_bytes()


def test_the_cpus_at_the_handover() -> None:
    cpus = parse_cpus(STATE)
    assert [(cpu.index, cpu.apic_id) for cpu in cpus] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [cpu.halted for cpu in cpus] == [False, True, True, True]
    assert [cpu.nmi_blocked for cpu in cpus] == [False, True, True, True]
    assert [cpu.nmi_pending for cpu in cpus] == [False, True, True, True]
    assert [cpu.guest_mode for cpu in cpus] == [False] * 4
    assert {cpu.registers["cs"] for cpu in cpus} == {0xE008}
    assert {cpu.registers["rip"] for cpu in cpus[1:]} == {0xFFFF82D0402F9801}  # behind the hlt of do_nmi_crash
    assert all(isinstance(cpu.idtr, tuple) and cpu.idtr[1] == 0xFFF for cpu in cpus)


def test_the_lapics_at_the_handover() -> None:
    lapics = [cpu.lapic for cpu in parse_cpus(STATE)]
    assert all(isinstance(lapic, Lapic) for lapic in lapics)
    assert [lapic.apic_base for lapic in lapics if isinstance(lapic, Lapic)] == [0xFEE00900] + [0xFEE00800] * 3
    crashing, parked = lapics[0], lapics[2]
    assert isinstance(crashing, Lapic) and isinstance(parked, Lapic)
    assert (crashing.spiv, crashing.lvt) == (0x10F, (0x10000, 0x10000, 0x10000, 0x5700, 0x5400, 0x10000))
    assert (parked.spiv, parked.icr_low, parked.icr_high) == (0xFF, 0x400, 2 << 24)
    assert parked.lvt == (0x10000,) * 6


def test_sections_are_found_by_their_footers() -> None:
    found = [(section.name, section.instance) for section in sections(STATE)]
    assert found.count(("apic", 3)) == 1
    assert {name for name, _ in found} == {"cpu", "cpu_common", "apic", "i8259"}


def test_another_version_of_a_section_is_refused() -> None:
    at = STATE.index(b"\x04apic") + 5 + 4
    with pytest.raises(Unreadable, match="apic state is version 4, not 3"):
        parse_cpus(STATE[:at] + (4).to_bytes(4, "big") + STATE[at + 4 :])


def test_what_is_not_a_device_state_is_refused() -> None:
    with pytest.raises(Unreadable, match="not a QEMU device state"):
        parse_cpus(b"\x7fELF" + bytes(100))


@given(st.integers(0, len(STATE) - 1))
def test_a_truncated_state_is_unreadable(size: int) -> None:
    with pytest.raises(Unreadable):
        parse_cpus(STATE[:size])


@given(st.integers(8, len(STATE) - 1), st.integers(1, 255))
def test_a_damaged_state_is_unreadable_or_complete(at: int, change: int) -> None:
    damaged = bytearray(STATE)
    damaged[at] ^= change
    with contextlib.suppress(Unreadable):
        assert len(parse_cpus(bytes(damaged))) == 4


def test_a_machine_whose_state_qemu_cannot_save_is_known_beforehand() -> None:
    reasons = ["some other blocker", "non-migratable device: amd-iommu"]
    assert unsavable({"blocked-reasons": reasons}) == "non-migratable device: amd-iommu"
    assert unsavable({"blocked-reasons": reasons[:1]}) is None
    assert unsavable({}) is None
