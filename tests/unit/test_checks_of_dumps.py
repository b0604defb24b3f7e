"""A dump's own notes are judged against Xen's memory, on recorded vmcores of real Xen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.machines.changed import OF_THE_FILE, Machine, bad
from tests.machines.recorded import names
from xen_symbols.report.model import Finding, Verdict
from xen_symbols.targets import PhysicalCpu

VMCORES = [name for name in names() if name.endswith("crashed-vmcore")]
AS_SAVED = "what Xen's memory holds"


def empty(cpu: PhysicalCpu) -> PhysicalCpu:
    return cpu._replace(registers={})


def another_rip(cpu: PhysicalCpu) -> PhysicalCpu:
    return cpu._replace(registers={**cpu.registers, "rip": cpu.registers["rip"] + 1})


def another_cr3(cpu: PhysicalCpu) -> PhysicalCpu:
    return cpu._replace(registers={**cpu.registers, "cr3": 0x1000})


def without_control(cpu: PhysicalCpu) -> PhysicalCpu:
    return cpu._replace(registers={k: v for k, v in cpu.registers.items() if not k.startswith("cr")})


def without_general(cpu: PhysicalCpu) -> PhysicalCpu:
    return cpu._replace(registers={k: v for k, v in cpu.registers.items() if k in ("cr0", "cr2", "cr3", "cr4")})


@pytest.mark.parametrize("name", VMCORES)
def test_the_notes_of_a_vmcore_are_what_xen_saved(name: str) -> None:
    found = [f for f in Machine(name).report().findings if f.check == "dump-notes"]
    assert {(f.cpu, f.verdict, f.observed) for f in found} == {(cpu, Verdict.PASS, AS_SAVED) for cpu in range(4)}
    assert [(e.source, e.symbol) for e in found[2].evidence] == [("memory", "crash_notes")]


@pytest.mark.parametrize(
    ("change", "observed"),
    [
        (empty, "empty"),
        (another_rip, "other rip"),
        (another_cr3, "other cr3"),
        (without_control, "no cr0, no cr2, no cr3, no cr4"),
        (without_general, "no r15, no r14, no r13, no r12 and 20 more"),
    ],
)
@pytest.mark.parametrize("name", VMCORES)
def test_notes_that_are_not_what_xen_saved_fail(
    name: str, change: Callable[[PhysicalCpu], PhysicalCpu], observed: str
) -> None:
    machine = Machine(name)
    machine.physical(2, change)
    report = machine.report()
    assert bad(report) == {("dump-notes", 2, "fail")}
    assert next(f.observed for f in report.findings if f.verdict is Verdict.FAIL) == observed


@pytest.mark.parametrize("name", VMCORES)
def test_notes_of_two_cpus_that_are_swapped_fail(name: str) -> None:
    machine = Machine(name)
    one, other = (machine.example.physical_cpus[cpu] for cpu in (1, 2))
    machine.physical(1, lambda _: one._replace(registers=other.registers))
    machine.physical(2, lambda _: other._replace(registers=one.registers))
    assert bad(machine.report()) == {("dump-notes", 1, "fail"), ("dump-notes", 2, "fail")}


@pytest.mark.parametrize("name", VMCORES)
def test_memory_without_xens_note_headers_leaves_the_notes_of_the_file_unknown(name: str) -> None:
    machine = Machine(name)
    machine.poke(machine.notes(1), b"\xff" * 12)
    assert ("dump-notes", 1, "unknown") in bad(machine.report())


def test_the_machines_own_registers_are_not_notes() -> None:
    found = [f for f in Machine("4.17-handover").report().findings if f.check == "dump-notes"]
    assert [f.verdict for f in found] == [Verdict.SKIP] * 4


# -- The file's notes about the machine -------------------------------------------------------


def note(machine: Machine, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a note of the file."""
    kind = {"Xen": 0x1000001, "VMCOREINFO_XEN": 0}[name]
    machine.example.notes_of_file = [
        each._replace(desc=change(each.desc)) if (each.name, each.type) == (name, kind) else each
        for each in machine.example.notes()
    ]


def found(machine: Machine, check: str) -> Finding:
    return next(f for f in machine.report().findings if f.check == check)


def starts_2_mib_up(desc: bytes) -> bytes:
    start = int.from_bytes(desc[64:72], "little") + (2 << 20)
    return desc[:64] + start.to_bytes(8, "little") + desc[72:]


@pytest.mark.parametrize("name", VMCORES)
def test_the_files_notes_about_the_machine_are_what_xen_wrote(name: str) -> None:
    machine = Machine(name)
    assert {(f.verdict, f.cpu) for f in machine.report().findings if f.check in OF_THE_FILE} == {(Verdict.PASS, None)}
    assert set(found(machine, "dump-vmcoreinfo").observed) == {"SYMBOL(pgd_l4)"}


@pytest.mark.parametrize("name", VMCORES)
def test_a_crash_info_that_is_not_the_memorys_fails(name: str) -> None:
    machine = Machine(name)
    note(machine, "Xen", starts_2_mib_up)
    assert bad(machine.report()) == {("dump-crash-info", None, "fail")}
    failure = found(machine, "dump-crash-info")
    start = machine.memory.xen_phys_start
    assert (failure.expected, failure.observed) == (
        {"xen_phys_start": hex(start)}, {"xen_phys_start": hex(start + (2 << 20))}
    )  # fmt: skip
    assert "crash(8), libkdumpfile" in str(failure.reason)
    note(machine, "Xen", lambda desc: bytes(80))
    assert found(machine, "dump-crash-info").observed == "empty"
    machine.example.notes_of_file = [each for each in machine.example.notes() if each.type != 0x1000001]
    assert found(machine, "dump-crash-info").observed == "no CRASH_INFO"
    assert bad(machine.report()) == {("dump-crash-info", None, "fail")}


@pytest.mark.parametrize("field", range(10))
def test_each_field_of_crash_info_is_compared(field: int) -> None:
    machine = Machine("4.17-crashed-vmcore")
    at = 8 * field
    note(machine, "Xen", lambda desc: desc[:at] + bytes([desc[at] ^ 1]) + desc[at + 1 :])
    assert bad(machine.report()) == {("dump-crash-info", None, "fail")}
    assert len(found(machine, "dump-crash-info").observed) == 1


@pytest.mark.parametrize("name", VMCORES)
def test_vmcoreinfo_of_another_boot_fails(name: str) -> None:
    machine = Machine(name)
    root = f"{machine.symbols.address('idle_pg_table'):x}"
    other = f"{machine.symbols.address('idle_pg_table') + 0x1000:x}"
    text = next(each.desc for each in machine.example.notes() if each.name == "VMCOREINFO_XEN").rstrip(b"\0")
    held = machine.memory.read(machine.symbols.address("vmcoreinfo_data"), 28 + len(text))
    assert root.encode() in held
    note(machine, "VMCOREINFO_XEN", lambda desc: desc.replace(root.encode(), other.encode()))
    assert bad(machine.report()) == {("dump-vmcoreinfo", None, "fail")}
    failure = found(machine, "dump-vmcoreinfo")
    assert (failure.expected, failure.observed) == ({"SYMBOL(pgd_l4)": root}, {"SYMBOL(pgd_l4)": other})
    assert "makedumpfile -X" in str(failure.reason)
    # In memory alike: the symbols say otherwise.
    machine.variable("vmcoreinfo_data", held.replace(root.encode(), other.encode()), None)
    assert bad(machine.report()) == {("dump-vmcoreinfo", None, "fail")}


def test_another_line_or_one_too_few_fails() -> None:
    for change in (
        lambda desc: desc.replace(b"PAGESIZE=4096\n", b""),
        lambda desc: desc.replace(b"PAGESIZE=4096", b"PAGESIZE=8192"),
        lambda desc: desc.split(b"SYMBOL(dom_io)")[0],
    ):
        machine = Machine("4.17-crashed-vmcore")
        note(machine, "VMCOREINFO_XEN", change)
        assert bad(machine.report()) == {("dump-vmcoreinfo", None, "fail")}


def test_memory_without_vmcoreinfo_leaves_the_files_unknown() -> None:
    machine = Machine("4.17-crashed-vmcore")
    machine.variable("vmcoreinfo_data", bytes(28), None)
    assert bad(machine.report()) == {("dump-vmcoreinfo", None, "unknown")}


def test_a_file_without_vmcoreinfo_says_who_misses_it() -> None:
    machine = Machine("4.17-crashed-vmcore")
    machine.example.notes_of_file = [each for each in machine.example.notes() if each.name != "VMCOREINFO_XEN"]
    missing = found(machine, "dump-vmcoreinfo")
    assert (missing.verdict, "makedumpfile -X needs --xen-syms" in (missing.reason or "")) == (Verdict.SKIP, True)
    live = found(Machine("4.17-handover"), "dump-vmcoreinfo")
    assert (live.verdict, live.reason) == (Verdict.SKIP, "the target has no notes of Xen's")
