"""A recorded Xen that is changed: helpers that name what they change, and changes that a check must find."""

from __future__ import annotations

from collections.abc import Callable

from tests.machines.recorded import Example, load
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import Need, Subject
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.model import Report, Verdict
from xen_symbols.targets import Lapic, PhysicalCpu
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.percpu import per_cpu_address

NMI, MC = 2, 18
RENAMED = {"nmi": "entry_NMI", "machine_check": "entry_MC"}  # abe93fc8aa (4.18.0)


class Machine:
    """A recorded example with helpers that name what they change."""

    def __init__(self, name: str = "4.17-handover", **renamed: str) -> None:
        self.target, self.symbols = load(name, renamed)
        self.memory: XenMemory = locate(self.target, self.symbols)
        self.example: Example = self.target

    def poke(self, address: int, data: bytes) -> None:
        self.example.write(self.memory.physical(address), data)

    def gate(self, cpu: int, vector: int, offset: int, data: bytes) -> None:
        self.poke(idt_address(self.memory, cpu) + 16 * vector + offset, data)

    def variable(self, name: str, data: bytes, kinds: str | None = "dDbB") -> None:
        self.poke(self.symbols.address(name, kinds), data)

    def per_cpu(self, name: str, cpu: int, data: bytes) -> None:
        self.poke(per_cpu_address(self.memory, name, cpu), data)

    def notes(self, cpu: int) -> int:
        array = self.memory.variable("crash_notes")
        return self.memory.read_uint(array + 16 * cpu)

    def physical(self, cpu: int, change: Callable[[PhysicalCpu], PhysicalCpu]) -> None:
        self.example.physical_cpus[cpu] = change(self.example.physical_cpus[cpu])

    def lapic(self, cpu: int, **changes: object) -> None:
        def change(physical: PhysicalCpu) -> PhysicalCpu:
            assert isinstance(physical.lapic, Lapic)
            return physical._replace(lapic=physical.lapic._replace(**changes))

        self.physical(cpu, change)

    def text(self, name: str) -> bytes:
        renamed = RENAMED.get(name, name)
        return self.symbols.address(renamed if self.symbols.has(renamed) else name, "tT").to_bytes(8, "little")

    def report(self) -> Report:
        self.memory.forget()
        return evaluate(self.memory)


def bad(report: Report) -> set[tuple[str, int | None, str]]:
    wrong = (Verdict.FAIL, Verdict.UNKNOWN)
    return {(f.check, f.cpu, str(f.verdict)) for f in report.findings if f.verdict in wrong}


def handler(machine: Machine, cpu: int, vector: int, name: str) -> None:
    address = machine.text(name)
    machine.gate(cpu, vector, 0, address[0:2])
    machine.gate(cpu, vector, 6, address[2:4])


def unhalted(machine: Machine) -> None:
    elsewhere = machine.symbols.address("kexec_reloc")
    machine.physical(1, lambda p: p._replace(halted=False, registers={**p.registers, "rip": elsewhere}))


def rsp_of(machine: Machine, cpu: int) -> dict[str, int]:
    return {"rsp": machine.example.physical_cpus[cpu].registers["rsp"]}


def unhooked(machine: Machine) -> None:
    if machine.symbols.has("exception_table"):  # until e7f147bf4a (4.17.0)
        machine.poke(machine.symbols.address("exception_table") + 8 * NMI, machine.text("do_nmi"))
    else:
        machine.variable("traps.c#nmi_callback", bytes(8))


# What is done at the handover of Xen 4.17.7 (CPU 0 crashed) -> the check that must fail, and its CPU.
CHANGES: dict[str, tuple[Callable[[Machine], object], str, int | None]] = {
    "NMI IST put back on the crashing CPU": (lambda m: m.gate(0, NMI, 4, b"\x02"), "nmi-gate-ist", 0),
    "NMI IST cleared on another CPU": (lambda m: m.gate(2, NMI, 4, b"\x00"), "nmi-gate-ist", 2),
    "#MC IST put back on another CPU": (lambda m: m.gate(3, MC, 4, b"\x01"), "mc-gate-ist", 3),
    "NMI handler of another CPU is trap_nop": (lambda m: handler(m, 1, NMI, "trap_nop"), "nmi-gate-handler", 1),
    "NMI handler of the crashing CPU is nmi": (lambda m: handler(m, 0, NMI, "nmi"), "nmi-gate-handler", 0),
    "#MC handler of one CPU not swapped": (lambda m: handler(m, 1, MC, "machine_check"), "mc-gate-handler", 1),
    "handler off by three bytes": (lambda m: m.gate(1, NMI, 0, bytes([m.text("nmi")[0] + 3])), "nmi-gate-handler", 1),
    "upper half of a handler wrong": (lambda m: m.gate(1, NMI, 8, b"\x00"), "nmi-gate-handler", 1),
    "NMI gate not present": (lambda m: m.gate(0, NMI, 5, b"\x0e"), "nmi-gate-present", 0),
    "#MC gate not present": (lambda m: m.gate(2, MC, 5, b"\x0e"), "mc-gate-present", 2),
    "NMI gate is a trap gate": (lambda m: m.gate(1, NMI, 5, b"\x8f"), "nmi-gate-type", 1),
    "#MC gate is a trap gate": (lambda m: m.gate(1, MC, 5, b"\x8f"), "mc-gate-type", 1),
    "NMI gate DPL 3": (lambda m: m.gate(1, NMI, 5, b"\xee"), "nmi-gate-dpl", 1),
    "#MC gate DPL 3": (lambda m: m.gate(3, MC, 5, b"\xee"), "mc-gate-dpl", 3),
    "NMI gate with another selector": (lambda m: m.gate(1, NMI, 2, b"\x10\xe0"), "nmi-gate-selector", 1),
    "#MC gate with another selector": (lambda m: m.gate(1, MC, 2, b"\x10\xe0"), "mc-gate-selector", 1),
    "reserved bits in an NMI gate": (lambda m: m.gate(2, NMI, 12, b"\x01"), "nmi-gate-reserved", 2),
    "reserved bits in an #MC gate": (lambda m: m.gate(2, MC, 4, b"\x08"), "mc-gate-reserved", 2),
    "crash_save_done cleared": (lambda m: m.per_cpu("crash_save_done", 2, b"\0"), "crash-save-done", 2),
    "crash_save_done set on the crashing CPU": (lambda m: m.per_cpu("crash_save_done", 0, b"\1"), "crash-save-done", 0),
    "a waiting bit set": (lambda m: m.variable("waiting_to_crash", b"\x04"), "waiting-cpus", 2),
    "a saved bit cleared": (lambda m: m.variable("crash_saved_cpus", b"\x07"), "saved-cpus", 3),
    "an online bit set": (lambda m: m.variable("cpu_online_map", b"\x02"), "online-cpus", 1),
    "the hook taken away": (unhooked, "nmi-dispatch", None),
    "another owner": (lambda m: m.variable("kexec.c#crashing_cpu", b"\x03"), "crash-owner", None),
    "kexec not in progress": (lambda m: m.variable("kexec_flags", b"\x04"), "kexec-in-progress", None),
    "x2apic_enabled set": (lambda m: m.variable("x2apic_enabled", b"\1"), "x2apic-enabled", None),
    "notes of one CPU empty": (lambda m: m.poke(m.notes(1) + 20, bytes(336)), "crash-notes", 1),
    "notes of one CPU not Xen's": (lambda m: m.poke(m.notes(1) + 20 + 112 + 17 * 8, b"\x33\0"), "crash-notes", 1),
    "notes of one CPU without page tables": (lambda m: m.poke(m.notes(1) + 372 + 16, bytes(8)), "crash-notes", 1),
    "crash info empty": (lambda m: m.poke(m.notes(0) + 420, bytes(80)), "crash-info-note", None),
    "LAPIC left in x2APIC mode": (lambda m: m.lapic(1, apic_base=0xFEE00C00, icr_high=1), "lapic-mode", 1),
    "LAPIC in the invalid mode": (lambda m: m.lapic(0, apic_base=0xFEE00500), "lapic-mode", 0),
    "LAPIC with another CPU's id": (lambda m: m.lapic(1, apic_id=2), "lapic-id", 1),
    "LAPIC not stopped": (lambda m: m.lapic(1, spiv=0x1FF), "lapic-enabled", 1),
    "LAPIC of the crashing CPU off": (lambda m: m.lapic(0, spiv=0xFF), "lapic-enabled", 0),
    "an LVT entry unmasked": (lambda m: m.lapic(2, lvt=(0x10000, 0x10000, 0x10000, 0x700, 0x10000, 0x10000)),
                              "lapic-lvt", 2),
    "no self-NMI": (lambda m: m.lapic(1, icr_low=0xFD), "lapic-self-nmi", 1),
    "self-NMI to another CPU": (lambda m: m.lapic(1, icr_high=2 << 24), "lapic-self-nmi", 1),
    "self-NMI by shorthand": (lambda m: m.lapic(1, icr_low=0xC0400), "lapic-self-nmi", 1),
    "NMIs blocked at the handover": (lambda m: m.physical(0, lambda p: p._replace(nmi_blocked=True)), "nmi-latch", 0),
    "NMIs not blocked on a parked CPU": (
        lambda m: m.physical(3, lambda p: p._replace(nmi_blocked=False)), "nmi-latch", 3),
    "no NMI pending": (lambda m: m.physical(3, lambda p: p._replace(nmi_pending=False)), "nmi-pending", 3),
    "a CPU that runs on": (unhalted, "cpu-parked", 1),
    "interrupts on in the halt loop": (
        lambda m: m.physical(1, lambda p: p._replace(registers={**p.registers, "rflags": 0x202})), "cpu-parked", 1),
    "interrupts of the crashing CPU on": (
        lambda m: m.physical(0, lambda p: p._replace(registers={**p.registers, "rflags": 0x206})),
        "crashing-cpu-interrupts", 0),
    "a parked CPU on another's stack": (
        lambda m: m.physical(1, lambda p: p._replace(registers=p.registers | rsp_of(m, 2))), "cpu-stack", 1),
    "the crashing CPU on another's stack": (
        lambda m: m.physical(0, lambda p: p._replace(registers=p.registers | rsp_of(m, 2))), "cpu-stack", 0),
    "TR of another CPU": (
        lambda m: m.physical(1, lambda p: p._replace(tr_base=m.example.physical_cpus[2].tr_base)), "tr", 1),
    "IDTR elsewhere": (lambda m: m.physical(2, lambda p: p._replace(idtr=(0xFFFF83005FD6D000, 0xFFF))), "idtr", 2),
    "IDTR too short": (lambda m: m.physical(2, lambda p: p._replace(idtr=(p.idtr[0], 0x1F))), "idtr", 2),
}  # fmt: skip


def no_idt(machine: Machine, cpu: int) -> None:
    if machine.symbols.has("idt_tables"):  # until 9c20d3c591 (4.21.0)
        machine.poke(machine.symbols.address("idt_tables") + 8 * cpu, bytes(8))
    else:
        machine.per_cpu("idt", cpu, bytes(8))


def no_buffer(machine: Machine, cpu: int) -> None:
    machine.poke(machine.memory.variable("crash_notes") + 16 * cpu, bytes(8))


def no_offset(machine: Machine, cpu: int) -> None:
    """A hole of zeros would lead to CPU 0's area."""
    machine.poke(machine.symbols.address("__per_cpu_offset") + 8 * cpu, bytes(8))


def no_area(machine: Machine, cpu: int) -> None:
    invalid = (0x8000_0000_0000_0000 - machine.symbols.address("__per_cpu_start")) % (1 << 64)
    machine.poke(machine.symbols.address("__per_cpu_offset") + 8 * cpu, invalid.to_bytes(8, "little"))


def needing(*needs: Need) -> set[str]:
    """The checks that need one of these from a target."""
    return {check.id for check in CHECKS if check.needs in needs and check.subject is not Subject.DIED}


OF_THE_FILE = {"dump-crash-info", "dump-vmcoreinfo"}  # its notes about the machine
BEYOND_MEMORY = needing(Need.REGISTERS, Need.NOTES, Need.LAPIC, Need.DEVICE_STATE) - OF_THE_FILE
OF_THE_CRASHING = {"crashing-cpu-interrupts"}
GATE_CHECKS = {check.id for check in CHECKS if "-gate-" in check.id}
OF_ITS_OWN = {"crash-save-done", "crash-notes"} | BEYOND_MEMORY - OF_THE_CRASHING
# What is lost of a CPU that was online at the handover (CPU 0 crashed) -> what is then unknown, by CPU.
LOST: dict[str, tuple[Callable[[Machine], object], dict[int | None, set[str]]]] = {
    "a CPU's IDT": (lambda m: no_idt(m, 2), {2: GATE_CHECKS | {"idtr"}}),
    "every CPU's IDT": (lambda m: [no_idt(m, cpu) for cpu in range(4)],
                        {cpu: GATE_CHECKS | {"idtr"} for cpu in range(4)}),
    "a CPU's buffer of notes": (lambda m: no_buffer(m, 2), {2: {"crash-notes"}}),
    "CPU 0's buffer of notes": (lambda m: no_buffer(m, 0), {0: {"crash-notes"}, None: {"crash-info-note"}}),
    "a CPU's per-CPU area": (lambda m: no_area(m, 2), {2: GATE_CHECKS | OF_ITS_OWN, None: {"cpus-found"}}),
    "the way to it": (lambda m: no_offset(m, 2), {2: GATE_CHECKS | OF_ITS_OWN, None: {"cpus-found"}}),
    "a CPU's number": (lambda m: m.variable("nr_cpu_ids", b"\3\0\0\0", None), {None: {"cpus-found"}}),
}  # fmt: skip


# Changes of memory; what lies in a CPU or its LAPIC cannot be changed from outside.
NOT_IN_MEMORY = needing(Need.REGISTERS, Need.LAPIC, Need.DEVICE_STATE)


def silent(machine: Machine, *cpus: int) -> None:
    """Makes CPUs of the four look as if they never took the NMI."""
    rest = {1, 2, 3} - {*cpus}
    machine.variable("waiting_to_crash", bytes([sum(1 << cpu for cpu in cpus)]))
    machine.variable("crash_saved_cpus", bytes([1 | sum(1 << cpu for cpu in rest)]))
    machine.variable("cpu_online_map", bytes([sum(1 << cpu for cpu in cpus)]))
    for cpu in cpus:
        machine.per_cpu("crash_save_done", cpu, b"\0")
        machine.gate(cpu, MC, 4, b"\x01")
        machine.poke(machine.notes(cpu) + 20, bytes(336))
        machine.poke(machine.notes(cpu) + 372, bytes(32))


def memory_alone(name: str) -> Machine:
    """As a raw image of memory shows it: no CPU's registers."""
    machine = Machine(name)
    machine.example.physical_cpus, machine.example.notes_of_file, machine.example.kind = [], (), "dump"
    return machine
