"""Any word that a judgement reads may be damaged: if the verdict is still `pass`, it has as many findings as before.

A hole of zeros or of ones over a word leads to a failure, to `unknown`, to a reason why nothing can be decided, or
changes nothing. Each word of what is small is tried, of page tables and of the console's ring one in sixteen.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.machines.changed import Machine
from tests.machines.recorded import Example, load
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.model import Report, Verdict
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.locate import locate
from xen_symbols.xen.percpu import per_cpu_address

# Each build and each stage that is recorded, once.
EXAMPLES = ("4.14-shootdown", "4.17-handover", "4.20-crashed-vmcore")
LARGE = 1024  # bytes of one read
WORD = 8


def judged(target: Example, symbols: SymbolTable) -> Report:
    return evaluate(locate(target, symbols))


def weight(report: Report) -> int:
    """How many findings its verdict rests on."""
    return sum(finding.verdict is not Verdict.SKIP for finding in report.findings)


def words(target: Example, symbols: SymbolTable, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what a judgement reads, in words; the last one of a read may be shorter."""
    reads: dict[int, int] = {}
    read = target.read_physical

    def watched(address: int, size: int) -> bytes:
        data = read(address, size)
        reads[address] = max(size, reads.get(address, 0))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(target, "read_physical", watched)
        judged(target, symbols)
    for address, size in sorted(reads.items()):
        for number, offset in enumerate(range(0, size, WORD)):
            if size < LARGE or number % 16 == address // 2048 % 16:
                yield address + offset, min(WORD, size - offset)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_pass_never_rests_on_less_than_the_clean_machines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, symbols = load(name)
    clean = weight(judged(target, symbols))
    outcomes: Counter[str] = Counter()
    weak = []
    for address, size in words(target, symbols, monkeypatch):
        held = target.read_physical(address, size)
        for damage in (b"\0" * size, b"\xff" * size):
            if damage == held:
                continue
            target.write(address, damage)
            try:
                report = judged(target, symbols)
            except Undecidable:
                outcomes["undecidable"] += 1
                continue
            finally:
                target.write(address, held)
            outcomes[str(report.verdict)] += 1
            if report.verdict is Verdict.PASS and weight(report) < clean:
                weak.append((hex(address), damage))
    assert weak == []
    assert min(outcomes[each] for each in ("fail", "unknown", "undecidable")) > 10


# -- No pass on another CPU's -----------------------------------------------------------------


def swapped(machine: Machine, one: int, other: int, address: Callable[[int], int], size: int) -> bool:
    """Exchange two stretches of Xen's memory; whether they differed."""
    places = [address(cpu) for cpu in (one, other)]
    held = [machine.memory.read(place, size) for place in places]
    machine.poke(places[0], held[1])
    machine.poke(places[1], held[0])
    return held[0] != held[1]


def memory(address: Callable[[Machine, int], int], size: int) -> Callable[[Machine, int, int], bool]:
    return lambda machine, one, other: swapped(machine, one, other, lambda cpu: address(machine, cpu), size)


def element(name: str, size: int) -> Callable[[Machine, int, int], bool]:
    return memory(lambda machine, cpu: machine.symbols.address(name) + size * cpu, size)


def gate(vector: int) -> Callable[[Machine, int, int], bool]:
    return memory(lambda machine, cpu: idt_address(machine.memory, cpu) + 16 * vector, 16)


def per_cpu(name: str, size: int) -> Callable[[Machine, int, int], bool]:
    return memory(lambda machine, cpu: per_cpu_address(machine.memory, name, cpu), size)


def note(offset: int, size: int) -> Callable[[Machine, int, int], bool]:
    return memory(lambda machine, cpu: machine.notes(cpu) + offset, size)


def physical(*fields: str) -> Callable[[Machine, int, int], bool]:
    """Exchange what the target itself holds of two CPUs: device state, or the file's notes."""

    def swap(machine: Machine, one: int, other: int) -> bool:
        cpus = machine.example.physical_cpus
        values = [{field: getattr(cpus[cpu], field) for field in fields} for cpu in (one, other)]
        cpus[one], cpus[other] = cpus[one]._replace(**values[1]), cpus[other]._replace(**values[0])
        return values[0] != values[1]

    return swap


def register(name: str) -> Callable[[Machine, int, int], bool]:
    def swap(machine: Machine, one: int, other: int) -> bool:
        cpus = machine.example.physical_cpus
        values = [cpus[cpu].registers[name] for cpu in (one, other)]
        machine.physical(one, lambda p: p._replace(registers={**p.registers, name: values[1]}))
        machine.physical(other, lambda p: p._replace(registers={**p.registers, name: values[0]}))
        return values[0] != values[1]

    return swap


def both(*swaps: Callable[[Machine, int, int], bool]) -> Callable[[Machine, int, int], bool]:
    def swap(machine: Machine, one: int, other: int) -> bool:
        changed = [each(machine, one, other) for each in swaps]
        return any(changed)

    return swap


RECORDS: dict[str, Callable[[Machine, int, int], bool]] = {
    "the NMI gate": gate(2),
    "the #MC gate": gate(18),
    "the address of the IDT": element("idt_tables", 8),
    "the per-CPU area": element("__per_cpu_offset", 8),
    "the APIC id": element("x86_cpu_to_apicid", 4),
    "crash_save_done": per_cpu("crash_save_done", 1),
    "the TSS": per_cpu("tss_page", 168),
    "the address of the notes": memory(lambda m, cpu: m.memory.variable("crash_notes") + 16 * cpu, 8),
    "NT_PRSTATUS": note(20, 336),
    "CRASH_REGS": note(372, 32),
    "rsp in NT_PRSTATUS": note(20 + 112 + 19 * 8, 8),
    "both notes, in memory and in the file": both(note(20, 384), physical("registers")),
    "the registers": physical("registers"),
    "rsp": register("rsp"),
    "rip": register("rip"),
    "rflags": register("rflags"),
    "IDTR": physical("idtr"),
    "TR": physical("tr_base"),
    "the NMI latch": physical("nmi_blocked"),
    "the pending NMI": physical("nmi_pending"),
    "whether it is halted": physical("halted"),
    "the LAPIC": physical("lapic"),
    "the whole device state": physical("registers", "idtr", "tr_base", "halted", "nmi_blocked", "nmi_pending", "lapic"),
}
# Where nothing shows whose it is: without registers as they are, any of Xen's tables may be any CPU's, and its APIC id
# where no device state has one. What is in them is the same.
ANYBODYS = {
    ("4.20-crashed-vmcore", "the address of the IDT"),
    ("4.20-crashed-vmcore", "the APIC id"),
    ("4.14-shootdown", "the address of the notes"),  # both are still empty
    ("4.14-shootdown", "whether it is halted"),  # nothing is asked of a CPU before its NMI
}


@pytest.mark.parametrize("what", RECORDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_passes_on_another_cpus(name: str, what: str) -> None:
    for one, other in itertools.combinations(range(4), 2):
        machine = Machine(name)
        before = judged_as(machine)
        if not RECORDS[what](machine, one, other):
            continue
        after = judged_as(machine)
        assert after is not Verdict.PASS or (name, what) in ANYBODYS, (one, other)
        assert before is Verdict.PASS


def judged_as(machine: Machine) -> Verdict:
    try:
        return machine.report().verdict
    except Undecidable:
        return Verdict.UNKNOWN


def test_each_record_differs_somewhere() -> None:
    """Or its exchange would show nothing."""
    pairs = list(itertools.combinations(range(4), 2))
    same = {
        what for what, swap in RECORDS.items()
        if not any(swap(Machine(name), *pair) for name in EXAMPLES for pair in pairs)
    }  # fmt: skip
    assert same == set()
