"""The texts of QEMU's monitor, as three QEMUs printed them for the reference guest on two CPUs with 64 MiB."""

from __future__ import annotations

from pathlib import Path

import pytest

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.targets import hmp

MONITOR = Path(__file__).parent.parent / "recorded" / "monitor"
QEMUS = ("7.2", "10.0", "11.1")


def text(name: str) -> str:
    return (MONITOR / f"{name}.txt").read_bytes().decode()


@pytest.mark.parametrize("qemu", QEMUS)
def test_registers(qemu: str) -> None:
    cpus = hmp.parse_registers(text(f"qemu-{qemu}-registers"))
    assert [cpu.index for cpu in cpus] == [0, 1]
    first = cpus[0]
    assert first.registers | {
        "rax": 0x60, "rdx": 0x3FD, "rsp": 0xFFFF82D04021FE90, "r8": 0xA, "r15": 0xFFFF830001231035,
        "rip": 0xFFFF82D040201793, "rflags": 0x246, "cs": 0xE008, "ss": 0,
        "cr0": 0x80010011, "cr2": 0, "cr3": 0x1207000, "cr4": 0x20, "efer": 0x500,
    } == first.registers  # fmt: skip
    assert first.idtr == (0xFFFF82D04022F000, 0xFFF)
    assert first.tr_base == 0xFFFF82D040220000
    assert first.halted is True
    assert cpus[1].idtr != first.idtr


def test_what_the_monitor_does_not_print_names_the_way_to_it() -> None:
    cpu = hmp.parse_registers(text("qemu-7.2-registers"))[0]
    for value in (cpu.nmi_blocked, cpu.nmi_pending, cpu.guest_mode, cpu.lapic):
        assert isinstance(value, Absent) and "set xen qmp-socket" in value.reason


def test_registers_outside_64_bit_mode() -> None:
    cpu = hmp.parse_registers(text("qemu-7.2-reset-registers"))[1]
    assert (cpu.registers["rip"], cpu.registers["rdx"], cpu.registers["rflags"]) == (0xFFF0, 0x60FB1, 2)
    assert (cpu.registers["cs"], cpu.registers["cr0"], cpu.halted) == (0xF000, 0x60000010, True)
    assert cpu.idtr == (0, 0xFFFF)


@pytest.mark.parametrize("qemu", QEMUS)
def test_what_runs_the_machine(qemu: str) -> None:
    """Recorded under TCG; what the same QEMUs print under another accelerator is in their accel/tcg/monitor.c."""
    assert not hmp.is_kvm(text(f"qemu-{qemu}-kvm")) and hmp.is_tcg(text(f"qemu-{qemu}-jit"))
    assert hmp.is_kvm("kvm support: enabled\r\n")
    assert not hmp.is_tcg("Error: JIT information is only available with accel=tcg\r\n")
    assert not hmp.is_kvm("unknown command: 'info kvm'\r\n")


@pytest.mark.parametrize("garbage", ["", "unknown command: 'info registers'\r\n", "CPU#0\r\nnonsense\r\n"])
def test_other_text_is_not_registers(garbage: str) -> None:
    with pytest.raises(Unreadable):
        hmp.parse_registers(garbage)


def test_a_monitor_that_takes_no_number_names_no_cpu() -> None:
    assert not hmp.names_a_cpu("info registers: extraneous characters at the end of line\r\n")
    assert all(hmp.names_a_cpu(text(f"qemu-{qemu}-registers")) for qemu in QEMUS)


@pytest.mark.parametrize("qemu", QEMUS)
def test_lapic(qemu: str) -> None:
    found = hmp.parse_lapic(text(f"qemu-{qemu}-lapic"), 1)
    assert found is not None
    index, lapic = found
    assert (index, lapic.apic_id, lapic.spiv, lapic.icr_low, lapic.icr_high) == (1, 1, 0x1FF, 0, 0)
    # timer, thermal, performance, LINT0, LINT1, error
    assert lapic.lvt == (0x10000, 0x10000, 0x10000, 0x10700, 0x10400, 0xFE)
    assert isinstance(lapic.apic_base, Absent)  # QEMU 10's "(X2APIC ID)" does not identify the mode


def test_an_apic_id_that_no_cpu_has() -> None:
    assert hmp.parse_lapic("No CPU available\r\n", 9) is None


def test_lapics_give_their_cpus_the_apic_ids() -> None:
    cpus = hmp.parse_registers(text("qemu-7.2-registers"))
    found = hmp.parse_lapic(text("qemu-7.2-lapic"), 6)
    assert found is not None
    with_them = hmp.with_lapics(cpus, [found])
    assert with_them[1].apic_id == 6 and with_them[1].lapic == found[1]
    assert isinstance(with_them[0].apic_id, Absent)


def test_where_qmp_has_no_answer_either_that_is_the_reason() -> None:
    cpus = hmp.parse_registers(text("qemu-7.2-registers"))
    found = hmp.parse_lapic(text("qemu-7.2-lapic"), 6)
    assert found is not None
    why = Absent("QEMU cannot save it")
    first, second, *_ = hmp.without_qmp(hmp.with_lapics(cpus, [found]), why)
    assert (first.lapic, first.nmi_blocked, first.nmi_pending, first.guest_mode) == (why, why, why, why)
    assert second.lapic == found[1]._replace(apic_base=why)


@pytest.mark.parametrize("qemu", QEMUS)
def test_ram_is_what_is_ram_or_rom_and_nothing_else(qemu: str) -> None:
    assert hmp.parse_ram(text(f"qemu-{qemu}-mtree")) == [(0, 64 << 20), (0xFFFC0000, 1 << 32)]


@pytest.mark.parametrize("garbage", ["", "unknown command: 'info mtree -f'\r\n", 'FlatView #0\n AS "I/O", root: io\n'])
def test_other_text_is_not_a_memory_map(garbage: str) -> None:
    with pytest.raises(Unreadable):
        hmp.parse_ram(garbage)


def test_host_threads() -> None:
    text = "* CPU #0: thread_id=4711\r\n  CPU #1: (halted) thread_id=4712 model=max\r\n"  # the model from QEMU 11.1 on
    assert hmp.parse_host_threads(text) == [4711, 4712]
    assert hmp.parse_host_threads("unknown command: 'info cpus'\r\n") == []
    assert hmp.parse_selected_cpu(text) == 0
    assert hmp.parse_selected_cpu("  CPU #0: thread_id=4711\r\n* CPU #1: thread_id=4712\r\n") == 1
    with pytest.raises(Unreadable, match="does not say which CPU is selected: 'info cpus' said \"unknown command"):
        hmp.parse_selected_cpu("unknown command: 'info cpus'\r\n")


def test_text_that_gdb_wrapped_for_its_machine_interface() -> None:
    wrapped = '@"FlatView #0\\r\\n"\n@" AS \\"memory\\", root: \\\\ \\303\\t"\n'
    assert hmp.plain(wrapped) == 'FlatView #0\r\n AS "memory", root: \\ \xc3\t'
    assert hmp.plain("CPU#0\r\n") == "CPU#0\r\n"
