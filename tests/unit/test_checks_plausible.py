"""Values that look right and are not: each fails, or is unknown, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.machines.changed import Machine, bad
from xen_symbols.crashpath.checks.cpus import PARKED
from xen_symbols.report.model import Finding

Found = set[tuple[str, int | None, str]]


def register(machine: Machine, cpu: int, **registers: int) -> None:
    machine.physical(cpu, lambda p: p._replace(registers={**p.registers, **registers}))


def console(machine: Machine, line: str) -> None:
    ring, producer = machine.memory.variable("conring"), machine.memory.variable("conringp", 4)
    machine.poke(ring + producer - len(line), line.encode())


def info(machine: Machine, field: int, value: int) -> None:
    machine.poke(machine.notes(0) + 420 + 8 * field, value.to_bytes(8, "little"))


def cpu_info(machine: Machine, cpu: int, number: int) -> None:
    top = (machine.example.physical_cpus[cpu].registers["rsp"] | 0x7FFF) + 1
    machine.poke(top - 64, number.to_bytes(4, "little"))


def earlier(machine: Machine, cpu: int) -> None:
    """In the same function, behind a NOP."""
    rip = machine.example.physical_cpus[cpu].registers["rip"]
    machine.example.hold(machine.memory.physical(rip) - 2, b"\x90")
    register(machine, cpu, rip=rip - 1)


PLAUSIBLE: dict[str, tuple[Callable[[Machine], object], Found]] = {
    "a bool of another value": (
        lambda m: m.per_cpu("crash_save_done", 2, b"\2"), {("crash-save-done", 2, "unknown")}),
    "a parked CPU, halted where there is no HLT": (lambda m: earlier(m, 1), {("cpu-parked", 1, "fail")}),
    "a parked CPU on its own primary stack": (
        lambda m: register(m, 1, rsp=(m.example.physical_cpus[1].registers["rsp"] | 0x7FFF) - 0x400),
        {("cpu-stack", 1, "fail")}),
    "a stack whose cpu_info is another CPU's": (lambda m: cpu_info(m, 1, 2), {("cpu-stack", 1, "fail")}),
    "CRASH_INFO's changeset outside the image": (
        lambda m: info(m, 3, 0x1000), {("crash-info-note", None, "fail")}),
    "a GS base that is no address": (
        lambda m: m.poke(m.notes(2) + 20 + 112 + 22 * 8, (1 << 63).to_bytes(8, "little")),
        {("crash-notes", 2, "fail")}),
    "cr2 of another moment": (
        lambda m: m.poke(m.notes(2) + 380, (0x5EAED8).to_bytes(8, "little")), {("crash-notes", 2, "fail")}),
}  # fmt: skip


@pytest.mark.parametrize("what", PLAUSIBLE)
def test_what_looks_right_and_is_not_does_not_pass(what: str) -> None:
    change, found = PLAUSIBLE[what]
    machine = Machine()
    assert bad(machine.report()) == set()
    change(machine)
    assert bad(machine.report()) == found


def report_of_the_shootdown(machine: Machine) -> Finding:
    return next(f for f in machine.report().findings if f.check == "shootdown-report")


def test_what_a_domain_prints_is_not_xens_report() -> None:
    machine = Machine()
    console(machine, "\n(XEN) Failed to shoot down CPUs {2}\n(d0) Shot down all CPUs\n")
    assert report_of_the_shootdown(machine).observed == "(XEN) Failed to shoot down CPUs {2}"
    assert bad(machine.report()) == {("shootdown-report", None, "fail")}


def test_a_running_cpu_on_anothers_stack() -> None:
    machine = Machine("4.17-shootdown")
    register(machine, 1, rsp=machine.example.physical_cpus[2].registers["rsp"])
    assert bad(machine.report()) == {("cpu-stack", 1, "fail")}
    register(machine, 1, rsp=0xFFFF888000001000)  # as between SYSCALL and the switch of stacks
    assert bad(machine.report()) == set()


def test_interrupts_that_were_off_before_are_said_to_show_nothing() -> None:
    machine = Machine("4.17-handover")

    def found() -> Finding:
        return next(f for f in machine.report().findings if f.check == "crashing-cpu-interrupts")

    assert (found().observed, found().reason) == ("off", None)
    machine.poke(machine.notes(0) + 20 + 112 + 18 * 8, b"\2\0")
    assert (found().observed, str(found().reason)[:20]) == ("off", "they were off before")
    register(machine, 0, rflags=0x202)
    assert (found().observed, found().expected) == ("on", "off")
    assert PARKED.id not in {check for check, _, _ in bad(machine.report())}
