"""Each register of a CPU's crash notes is its own: every part fails alone, in memory and in the file alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.machines.changed import Machine, bad
from tests.machines.recorded import crashed, names
from xen_symbols.report.model import Finding, Verdict

SAVED = [name for name in names() if not name.endswith(("-normal", "-shootdown"))]
VMCORES = [name for name in SAVED if name.endswith("-vmcore")]
# Offsets in a buffer: NT_PRSTATUS's pr_reg, and CRASH_REGS.
AT = {name: 20 + 112 + 8 * number for name, number in
      {"rip": 16, "cs": 17, "rflags": 18, "rsp": 19, "ss": 20, "ds": 23, "es": 24, "fs": 25, "gs": 26}.items()}
AT |= {name: 372 + 8 * number for number, name in enumerate(("cr0", "cr2", "cr3", "cr4"))}
DEADBEEF = 0xDEADBEEFCAFE1234


def saved(machine: Machine, cpu: int, register: str) -> int:
    return machine.memory.read_uint(machine.notes(cpu) + AT[register])


def function(machine: Machine) -> str:
    """Where registers are saved: rip was this function's address until 1e15dcfbae."""
    called = "elf_core_save_regs"
    return called if machine.symbols.has(called) else "kexec_crash_save_cpu"


def save(machine: Machine, cpu: int, **registers: int) -> None:
    """In Xen's memory, and in the file's notes where it has some."""
    for name, value in registers.items():
        machine.poke(machine.notes(cpu) + AT[name], value.to_bytes(8, "little"))
    if machine.target.kind == "dump":
        machine.physical(cpu, lambda p: p._replace(registers={**p.registers, **registers}))


def exchange(machine: Machine, one: int, other: int, size: int = 404) -> None:
    first, second = (machine.memory.read(machine.notes(cpu), size) for cpu in (one, other))
    machine.poke(machine.notes(one), second)
    machine.poke(machine.notes(other), first)
    if machine.target.kind == "dump":
        cpus = [machine.example.physical_cpus[cpu].registers for cpu in (one, other)]
        machine.physical(one, lambda p: p._replace(registers=cpus[1]))
        machine.physical(other, lambda p: p._replace(registers=cpus[0]))


def others(name: str) -> list[int]:
    return [cpu for cpu in range(4) if cpu != crashed(name)]


def finding(machine: Machine, cpu: int) -> Finding:
    return next(f for f in machine.report().findings if (f.check, f.cpu) == ("crash-notes", cpu))


@pytest.mark.parametrize("name", SAVED)
def test_each_register_is_a_value_in_the_finding(name: str) -> None:
    machine = Machine(name)
    for cpu in range(4):
        found = finding(machine, cpu)
        assert (found.verdict, found.reason) == (Verdict.PASS, None)
        assert list(found.expected) == list(found.observed)
        assert found.expected["rip"] == f"in {function(machine)}"
        assert found.observed["rip"].startswith(function(machine))
        stack = "a stack of its own" if cpu == crashed(name) else "its NMI stack"
        assert found.expected["rsp"] == f"on {stack}"
        assert found.observed["rsp"].startswith(hex(saved(machine, cpu, "rsp")))
        assert found.observed["cr3"] == hex(saved(machine, cpu, "cr3"))


# What is saved of another CPU -> the registers that are wrong.
WRONG: dict[str, tuple[Callable[[Machine, int], dict[str, int]], set[str]]] = {
    "rip in another function": (lambda m, cpu: {"rip": m.symbols.address("do_nmi_crash")}, {"rip"}),
    "rip in no function": (lambda m, cpu: {"rip": 0xFFFFFFFF81000000}, {"rip"}),
    "rip behind the function": (lambda m, cpu: {"rip": m.symbols.extent(function(m))[1]}, {"rip"}),
    "rip in the function, where no other CPU saved": (lambda m, cpu: {"rip": saved(m, cpu, "rip") + 1}, {"rip"}),
    "rsp that is no multiple of 8": (lambda m, cpu: {"rsp": saved(m, cpu, "rsp") + 4}, {"rsp"}),
    "rsp on another CPU's stack": (lambda m, cpu: {"rsp": saved(m, (cpu + 1) % 4, "rsp")}, {"rsp"}),
    "rsp on its primary stack, and idle": (lambda m, cpu: {"rsp": stack(m, cpu, "primary")}, {"rsp"}),
    "rsp on its #MC stack": (lambda m, cpu: {"rsp": stack(m, cpu, "#MC")}, {"rsp"}),
    "rsp below its primary stack": (lambda m, cpu: {"rsp": stack(m, cpu, "primary") - 0x2000}, {"rsp"}),
    "rsp nowhere": (lambda m, cpu: {"rsp": 0x7FFE_1234_5678}, {"rsp"}),
    "cr3 dead beef": (lambda m, cpu: {"cr3": DEADBEEF}, {"cr3"}),
    "cr3 of Xen with a bit set": (lambda m, cpu: {"cr3": saved(m, cpu, "cr3") | 0x800}, {"cr3"}),
    "interrupts on": (lambda m, cpu: {"rflags": 0x202}, {"rflags"}),
    "flags with bit 1 clear": (lambda m, cpu: {"rflags": 0}, {"rflags"}),
    "flags with a trap": (lambda m, cpu: {"rflags": 0x102}, {"rflags"}),
    "flags with the direction down": (lambda m, cpu: {"rflags": 0x402}, {"rflags"}),
    "flags that are an address": (lambda m, cpu: {"rflags": 0xFFFF82D040000002}, {"rflags"}),
    "cs of a guest": (lambda m, cpu: {"cs": 0xE033}, {"cs"}),
    "ss of a guest": (lambda m, cpu: {"ss": 0xE02B}, {"ss"}),
    "ds that is no selector": (lambda m, cpu: {"ds": 0x10000}, {"ds es fs gs"}),
    "cr0 without paging": (lambda m, cpu: {"cr0": 0x3B}, {"cr0"}),
    "cr4 without PAE": (lambda m, cpu: {"cr4": 0x6C0}, {"cr4"}),
    "two of them": (lambda m, cpu: {"cs": 0x33, "ss": 0x2B}, {"cs", "ss"}),
}  # fmt: skip


def stack(machine: Machine, cpu: int, name: str) -> int:
    """Near the top of one of its stacks, as its saved stack pointer is on the NMI's."""
    from xen_symbols.xen.stacks import CpuStacks, stacks_of
    from xen_symbols.xen.state import read_state

    state = read_state(machine.memory)
    found = stacks_of(machine.memory, state, state.of(cpu))
    assert isinstance(found, CpuStacks)
    return next(each.end for each in found.stacks if each.name == name) - 0xF0


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", SAVED)
def test_each_register_fails_alone(name: str, what: str) -> None:
    machine = Machine(name)
    cpu = others(name)[1]
    change, wrong = WRONG[what]
    save(machine, cpu, **change(machine, cpu))
    report = machine.report()
    assert bad(report) == {("crash-notes", cpu, "fail")}
    found = next(f for f in report.findings if f.verdict is Verdict.FAIL)
    assert str(found.reason).startswith(f"{', '.join(sorted(wrong))} not its own: tools show")
    right = finding(Machine(name), cpu)
    assert {register for register in found.observed if found.observed[register] != right.observed[register]} == wrong


def test_of_two_cpus_that_saved_at_two_places_neither_is_believed() -> None:
    machine = Machine("4.17-crashed-vmcore")
    for cpu in (0, 1):
        save(machine, cpu, rip=saved(machine, cpu, "rip") + 1)
    report = machine.report()
    assert bad(report) == {("crash-notes", cpu, "unknown") for cpu in range(4)}
    assert "rip: as many CPUs saved 0xffff82d04021ed73 as 0xffff82d04021ed72" in str(finding(machine, 1).reason)


@pytest.mark.parametrize("name", SAVED)
def test_registers_of_two_cpus_exchanged(name: str) -> None:
    machine = Machine(name)
    one, other = others(name)[:2]
    exchange(machine, one, other)
    assert bad(machine.report()) == {("crash-notes", one, "fail"), ("crash-notes", other, "fail")}
    assert finding(machine, one).observed["rsp"].endswith(f"on CPU {other}'s NMI stack")


@pytest.mark.parametrize("name", SAVED)
def test_of_the_crashing_cpu_any_stack_is_its_own_and_interrupts_may_be_on(name: str) -> None:
    cpu = crashed(name)
    assert cpu is not None
    for registers in ({"rflags": 0x202}, {"rflags": 0x2}):
        machine = Machine(name)
        save(machine, cpu, **registers)
        assert bad(machine.report()) == set()
    for place in ("primary", "NMI", "#MC", "#DF"):
        machine = Machine(name)
        save(machine, cpu, rsp=stack(machine, cpu, place))
        assert bad(machine.report()) == set()
    machine = Machine(name)
    save(machine, cpu, rsp=saved(machine, others(name)[0], "rsp"))
    assert bad(machine.report()) == {("crash-notes", cpu, "fail")}


def test_a_cpu_that_ran_a_guest_saves_on_its_primary_stack() -> None:
    """The entry code moves the NMI's frame there; on Intel an HVM guest's is a VM exit."""
    machine = Machine("4.17-crashed-vmcore")
    primary = stack(machine, 2, "primary")
    save(machine, 2, rsp=primary)
    current = (primary | 0x7FFF) + 1 - 56
    machine.poke(current, (0xFFFF83003F000000).to_bytes(8, "little"))
    assert bad(machine.report()) == set()
    assert finding(machine, 2).expected["rsp"] == "on its NMI stack, or of a guest its primary one"


def test_without_an_ist_the_nmi_stays_on_the_stack_that_is_current() -> None:
    """As on AMD while an HVM guest's state is loaded."""
    for place, verdict in (("primary", set()), ("NMI", set()), ("#MC", set())):
        machine = Machine("4.17-crashed-vmcore")
        for vector in (2, 8):
            machine.gate(2, vector, 4, b"\0")
        save(machine, 2, rsp=stack(machine, 2, place))
        assert bad(machine.report()) == verdict


def hole(machine: Machine, address: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from xen_symbols.absence import Absent

    read_many = machine.target.read_physical_many

    def patched(requests: Any) -> Any:
        return [Absent("it lies in a hole") if address < at + length and at < address + size else answer
                for (at, length), answer in zip(requests, read_many(requests), strict=True)]  # fmt: skip

    monkeypatch.setattr(machine.target, "read_physical_many", patched)


def test_a_tss_that_cannot_be_read_leaves_the_stack_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("4.17-crashed-vmcore")
    from xen_symbols.xen.percpu import per_cpu_address

    hole(machine, machine.memory.physical(per_cpu_address(machine.memory, "tss_page", 2)), 168, monkeypatch)
    report = machine.report()
    assert bad(report) == {("crash-notes", 2, "unknown")}
    found = finding(machine, 2)
    assert str(found.reason) == "rsp: its TSS could not be read: it lies in a hole"
    assert (found.observed["rsp"], found.observed["rip"]) == (None, "kexec_crash_save_cpu+0xb2")


def test_page_tables_that_the_dump_lacks_are_unknown() -> None:
    machine = Machine("4.17-crashed-vmcore")
    save(machine, 2, cr3=0x7FFFF000)
    assert bad(machine.report()) == {("crash-notes", 2, "unknown")}
    assert "cr3: the page tables at 0x7ffff000 could not be read" in str(finding(machine, 2).reason)


def test_page_tables_that_do_not_map_xen_fail() -> None:
    machine = Machine("4.17-crashed-vmcore")
    page = 0x7FFFF000
    machine.example.hold(page, bytes(4096))
    for entry, wrong in ((0, True), (0x1063, True), (None, False)):
        own = machine.target.read_physical(machine.memory.root + 261 * 8, 8)
        data = own if entry is None else entry.to_bytes(8, "little")
        machine.example.write(page + 261 * 8, data)
        save(machine, 2, cr3=page)
        assert bad(machine.report()) == ({("crash-notes", 2, "fail")} if wrong else set())


def test_a_stopped_cpu_has_the_page_tables_that_it_saved() -> None:
    machine = Machine("4.17-handover")
    root = machine.example.physical_cpus[2].registers["cr3"]
    machine.example.hold(0x7FFFF000 + 261 * 8, machine.target.read_physical(machine.memory.root + 261 * 8, 8))
    save(machine, 2, cr3=0x7FFFF000)
    assert bad(machine.report()) == {("crash-notes", 2, "fail")}
    assert finding(machine, 2).expected["cr3"] == f"page tables that map Xen: {root:#x}, as now"
