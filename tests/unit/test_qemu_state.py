"""QEMU's device state: real (three QEMUs, Xen 4.17.7 stopped at the handover), and damaged.

The recordings hold the sections cpu, cpu_common and apic of each CPU, and one other; the rest was left out. kvm-…
were taken under KVM (AMD, Linux 6.1), of real Xen 4.17 with 2 CPUs or of the reference guest 4.17.0 with 4; the
in-kernel interrupt controllers are on, or split.
"""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines.recorded import RECORDED
from xen_symbols.absence import Unreadable
from xen_symbols.targets import Lapic
from xen_symbols.targets.qemu_state import parse_cpus, sections, unsavable

# By QEMU: the CPU that crashed, and the high half of its last ICR, which names the others: of an xAPIC or an x2APIC.
CRASHED = {"7.2": (0, 0xE << 24), "10.0": (3, 0x7), "11.1": (2, 0xB)}
STATES = {qemu: (RECORDED / f"qemu-{qemu}-handover.devstate").read_bytes() for qemu in CRASHED}
STATE = STATES["7.2"]
# By recording under KVM at the handover: the number of CPUs, and the mode of the local APICs.
KVM = {"10.0-xen": (2, 0x800), "7.2-guest": (4, 0x800), "10.0-split-guest": (4, 0x800), "11.1-guest": (4, 0x800),
       "10.0-x2apic-guest": (4, 0xC00)}  # fmt: skip


@pytest.mark.parametrize("qemu", CRASHED)
def test_the_cpus_at_the_handover(qemu: str) -> None:
    cpus, (crashed, _) = parse_cpus(STATES[qemu]), CRASHED[qemu]
    parked = [index != crashed for index in range(4)]
    assert [(cpu.index, cpu.apic_id) for cpu in cpus] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [cpu.halted for cpu in cpus] == parked
    assert [cpu.nmi_blocked for cpu in cpus] == parked
    assert [cpu.nmi_pending for cpu in cpus] == parked
    assert [cpu.guest_mode for cpu in cpus] == [False] * 4
    assert {cpu.registers["cs"] for cpu in cpus} == {0xE008}
    behind_hlt = 0xFFFF82D0402F9801  # of do_nmi_crash
    assert [cpu.registers["rip"] == behind_hlt for cpu in cpus] == parked
    assert all(isinstance(cpu.idtr, tuple) and cpu.idtr[1] == 0xFFF for cpu in cpus)


@pytest.mark.parametrize("qemu", CRASHED)
def test_the_lapics_at_the_handover(qemu: str) -> None:
    lapics = [cpu.lapic for cpu in parse_cpus(STATES[qemu]) if isinstance(cpu.lapic, Lapic)]
    assert [lapic.apic_base for lapic in lapics] == [0xFEE00900] + [0xFEE00800] * 3
    crashed, others = CRASHED[qemu]
    crashing = lapics.pop(crashed)
    assert (crashing.spiv, crashing.lvt) == (0x10F, (0x10000, 0x10000, 0x10000, 0x5700, 0x5400, 0x10000))
    assert (crashing.icr_low, crashing.icr_high) == (0xC00, others)
    for parked in lapics:
        assert isinstance(parked.apic_id, int)
        assert (parked.spiv, parked.icr_low, parked.icr_high) == (0xFF, 0x400, parked.apic_id << 24)
        assert parked.lvt == (0x10000,) * 6


@pytest.mark.parametrize("name", KVM)
def test_the_cpus_at_the_handover_under_kvm(name: str) -> None:
    cpus, (count, mode) = parse_cpus((RECORDED / f"kvm-{name}-handover.devstate").read_bytes()), KVM[name]
    parked = [False] + [True] * (count - 1)
    assert [cpu.halted for cpu in cpus] == parked
    assert [cpu.nmi_blocked for cpu in cpus] == parked
    assert [cpu.nmi_pending for cpu in cpus] == parked
    assert [cpu.guest_mode for cpu in cpus] == [False] * count
    lapics = [cpu.lapic for cpu in cpus if isinstance(cpu.lapic, Lapic)]
    assert [lapic.apic_base for lapic in lapics] == [0xFEE00100 | mode] + [0xFEE00000 | mode] * (count - 1)
    assert [lapic.spiv for lapic in lapics] == [0x10F] + [0xFF] * (count - 1)


def test_an_nmi_just_taken_under_kvm() -> None:
    """CPU 1 is at the first instruction of do_nmi_crash: blocked, and nothing pending yet."""
    cpus = parse_cpus((RECORDED / "kvm-10.0-xen-nmi-taken.devstate").read_bytes())
    assert [(cpu.halted, cpu.nmi_blocked, cpu.nmi_pending) for cpu in cpus] == [(False, False, False),
                                                                               (False, True, False)]  # fmt: skip


@pytest.mark.parametrize("at", [1170, 1171])
def test_an_nmi_is_pending_when_kvm_says_so_in_either_byte(at: int) -> None:
    """No recording has nmi_injected set; an NMI being injected counts as pending too."""
    state = bytearray((RECORDED / "kvm-10.0-xen-nmi-taken.devstate").read_bytes())
    for section in sections(bytes(state)):
        if (section.name, section.instance) == ("cpu", 0):
            state[state.index(section.payload) + at] = 1
    assert [cpu.nmi_pending for cpu in parse_cpus(bytes(state))] == [True, False]


def test_sections_may_come_in_any_order() -> None:
    """QEMU 11.1 writes every CPU's APIC before the CPUs; up to 10.0 each comes after its CPU."""
    orders = {qemu: [section.name for section in sections(state)] for qemu, state in STATES.items()}
    assert orders["7.2"] == orders["10.0"] == [*("cpu_common", "cpu", "apic") * 4, *("i8259",) * 2]
    assert orders["11.1"] == [*("apic",) * 4, *("cpu_common", "cpu") * 4, *("i8259",) * 2]


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
