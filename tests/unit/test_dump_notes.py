"""Notes: what Xen, Linux and QEMU say of each CPU."""

from __future__ import annotations

import struct

import pytest

from tests.machines import dumpwriter as writer
from xen_symbols.absence import Absent, Undecidable
from xen_symbols.describe.notes import describe_notes
from xen_symbols.formats.elfnotes import Note
from xen_symbols.targets.notes import (
    cpus_of,
    parse_crash_info,
    parse_crash_regs,
    parse_notes,
    parse_prstatus,
    parse_qemu_cpu,
    parse_vmcoreinfo,
)

GENERAL = {name: 0x1000 + number for number, name in enumerate(writer.PRSTATUS_ORDER.split())}


def test_notes_in_order_up_to_the_padding() -> None:
    data = writer.note("CORE", 1, b"abcde") + writer.note("Xen", 0x1000002, b"") + bytes(40)
    assert parse_notes(data) == [Note("CORE", 1, b"abcde"), Note("Xen", 0x1000002, b"")]


def test_a_name_without_its_nul_or_in_no_charset() -> None:
    data = struct.pack("<3I", 4, 0, 7) + b"\xffabc"
    assert parse_notes(data) == [Note("\\xffabc", 7, b"")]


def test_a_note_may_not_leave_its_segment() -> None:
    data = writer.note("CORE", 1, b"abcd") + struct.pack("<3I", 4, 1 << 31, 1) + b"Xen\0"
    with pytest.raises(Undecidable, match=r"segment 3: the note at \+0x18 claims 4 bytes of name and 2147483648"):
        parse_notes(data, "segment 3")


def test_more_notes_than_cpus_could_have() -> None:
    with pytest.raises(Undecidable, match="more than 40000 notes"):
        parse_notes(struct.pack("<3I", 0, 0, 1) * 40_001)


def test_prstatus() -> None:
    registers = parse_prstatus(writer.prstatus(GENERAL))
    assert registers == {name: value for name, value in GENERAL.items() if name != "orig_rax"}


def test_bases_that_xen_never_wrote_are_not_zeros() -> None:
    """Up to 4.14 Xen does not write thread_fs and thread_gs."""
    registers = parse_prstatus(writer.prstatus({**GENERAL, "fs_base": 0, "gs_base": 0}))
    assert not isinstance(registers, Absent)
    assert "fs_base" not in registers
    assert registers["fs"] == GENERAL["fs"]


def test_a_note_never_filled_in_is_absent() -> None:
    for empty in (parse_prstatus(bytes(336)), parse_crash_regs(bytes(32)), parse_crash_info(bytes(80))):
        assert isinstance(empty, Absent)
        assert "never filled in" in empty.reason


def test_crash_regs() -> None:
    assert parse_crash_regs(struct.pack("<4Q", 1, 2, 3, 4)) == {"cr0": 1, "cr2": 2, "cr3": 3, "cr4": 4}


def test_crash_info() -> None:
    info = parse_crash_info(writer.crash_info((4, 20), 0x5FA00000))
    assert not isinstance(info, Absent)
    assert (info.xen_major, info.xen_minor, info.xen_phys_start) == (4, 20, 0x5FA00000)


@pytest.mark.parametrize("parse, size", [(parse_prstatus, 336), (parse_crash_regs, 32), (parse_crash_info, 80)])
def test_a_note_of_another_size(parse, size: int) -> None:  # type: ignore[no-untyped-def]
    for wrong in (0, size - 4, size + 4):
        with pytest.raises(Undecidable, match=f"note of {wrong} bytes, {size} are expected"):
            parse(bytes(wrong))


def test_vmcoreinfo() -> None:
    text = b"PAGESIZE=4096\nSYMBOL(pgd_l4)=ffff82d040400000\nnonsense\nCONFIG=a=b\n\0\0OLD=1\n"
    assert parse_vmcoreinfo(text) == {"PAGESIZE": "4096", "SYMBOL(pgd_l4)": "ffff82d040400000", "CONFIG": "a=b"}


def test_qemus_note() -> None:
    values = {name: 0x100 + number for number, name in enumerate(writer.QEMU_ORDER.split())}
    values |= {"cs": 0xE008, "ss": 0, "gs_base": 0x77, "cr0": 0x80050033, "cr3": 0x123000, "k_gs_base": 0x99}
    cpu = parse_qemu_cpu(writer.qemu_cpu(values, (0xFFFF82D040300000, 0xFFF), 0xFFFF82D040310000), 3)
    assert (cpu.index, cpu.xen_cpu) == (3, None)
    assert (cpu.idtr, cpu.tr_base) == ((0xFFFF82D040300000, 0xFFF), 0xFFFF82D040310000)
    assert values.items() <= cpu.registers.items()
    assert isinstance(cpu.halted, Absent)


def test_qemus_note_before_it_had_the_kernels_gs() -> None:
    desc = struct.pack("<II", 1, 432) + writer.qemu_cpu({"rip": 5, "k_gs_base": 1})[8:432]
    cpu = parse_qemu_cpu(desc, 0)
    assert cpu.registers["rip"] == 5
    assert "k_gs_base" not in cpu.registers


@pytest.mark.parametrize("head", [(2, 440), (1, 441), (1, 8)])
def test_another_kind_of_qemu_note(head: tuple[int, int]) -> None:
    with pytest.raises(Undecidable, match=f"version {head[0]} and size {head[1]}"):
        parse_qemu_cpu(struct.pack("<II", *head) + bytes(432), 0)


def test_xens_notes_give_xens_cpu_numbers_and_the_silent_ones() -> None:
    registers = [{"rip": 1, "rsp": 8, "cr3": 0x1000}, {}, {"rip": 3, "rsp": 24, "cr3": 0x1000}]
    notes = parse_notes(writer.xen_notes(registers, writer.crash_info(), "PAGESIZE=4096\n", padding=300))
    cpus = cpus_of(notes)
    assert [cpu.xen_cpu for cpu in cpus] == [0, 1, 2]
    assert [cpu.registers.get("rip") for cpu in cpus] == [1, None, 3]
    assert cpus[1].registers == {}
    assert cpus[1].source == "Xen's crash notes: the note was never filled in: this CPU saved nothing"
    assert cpus[2].registers["cr3"] == 0x1000
    assert [(note.name, note.type) for note in notes][-1] == ("VMCOREINFO_XEN", 0)


def test_control_registers_of_no_cpu() -> None:
    """Half a pair is one by itself: whose it is follows from memory."""
    control = writer.note("Xen", 0x1000002, struct.pack("<4Q", 1, 2, 3, 4))
    cpus = cpus_of(parse_notes(writer.xen_notes([{"rip": 1}]) + control))
    assert [cpu.registers.get("rip") for cpu in cpus] == [1, None]
    assert cpus[1].registers == {"cr0": 1, "cr2": 2, "cr3": 3, "cr4": 4}


@pytest.mark.parametrize("cpu", [0, 1, 2])
def test_general_registers_without_control_registers(cpu: int) -> None:
    notes = parse_notes(writer.xen_notes([{"rip": n, "cr3": 10 * n} for n in (1, 2, 3)], writer.crash_info()))
    at = [index for index, note in enumerate(notes) if note.type == 0x1000002][cpu]
    for lost in (notes[:at] + notes[at + 1 :], [*notes[:at], notes[at]._replace(name="Xem"), *notes[at + 1 :]]):
        cpus = cpus_of(lost)
        assert [one.registers["rip"] for one in cpus] == [1, 2, 3]
        assert [one.registers.get("cr3") for one in cpus] == [None if n == cpu else 10 * n + 10 for n in range(3)]


def test_general_registers_without_xen() -> None:
    assert cpus_of(parse_notes(writer.note("CORE", 1, writer.prstatus({"rip": 1})) * 2)) == []


def test_four_thousand_cpus() -> None:
    registers = [{"rip": 0x1000 + cpu, "rsp": cpu, "cr3": 1} for cpu in range(4096)]
    assert [cpu.registers["rip"] for cpu in cpus_of(parse_notes(writer.xen_notes(registers)))] == [
        each["rip"] for each in registers
    ]


def test_a_notes_name_cannot_reach_a_terminal() -> None:
    (note,) = parse_notes(writer.note("Xen\x1b[2J", 7, b""))
    assert describe_notes([note]) == [{"name": "Xen\\x1b[2J", "type": "0x7", "bytes": 0, "what": "not known here"}]


def test_notes_are_counted_as_their_writer_counts_cpus() -> None:
    cpu = {"rip": 1, "cr3": 2}
    xens = parse_notes(writer.xen_notes([cpu, cpu], info=writer.crash_info()))
    assert [(note["name"], note.get("pair")) for note in describe_notes(xens)] == [
        ("CORE", 0), ("Xen", 0), ("Xen", None), ("CORE", 1), ("Xen", 1),
    ]  # fmt: skip
    qemus = parse_notes(writer.qemu_notes([writer.qemu_cpu(cpu)] * 2, [cpu] * 2))
    assert [(note["name"], note.get("pair"), note["index"]) for note in describe_notes(qemus)] == [
        ("CORE", None, 0), ("CORE", None, 1), ("QEMU", None, 0), ("QEMU", None, 1),
    ]  # fmt: skip
