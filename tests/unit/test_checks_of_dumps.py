"""A dump's own notes are judged against Xen's memory, on recorded vmcores of real Xen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.machines.changed import Machine, bad
from tests.machines.recorded import names
from xen_symbols.report.model import Verdict
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
