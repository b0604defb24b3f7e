"""What users see, word for word: every gdb command and every block of a report, on recorded machines.

Each is a file in tests/recorded/text, to be read in review; `python -m tests.texts` writes them, and a test compares
them with what is shown now. A cell in a verdict's colour is followed by the verdict, as in `3 unknown <unknown>`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gdbplugin.commands import COMMANDS
from tests.machines import stacks
from tests.machines.changed import MC, NMI, Machine
from tests.machines.recorded import RECORDED, load
from xen_symbols.absence import Absent
from xen_symbols.crashpath.gatechanges import CaughtWrite, GateHistory, moment_of
from xen_symbols.crashpath.identification import Identification, identify
from xen_symbols.crashpath.position import infer
from xen_symbols.describe.changes import describe_gate_change, describe_traced_change
from xen_symbols.report.blocks import (
    Block,
    Cell,
    Lines,
    Table,
    dumps_table,
    report_blocks,
    stage_line,
    watched_gates,
)
from xen_symbols.report.console import plain
from xen_symbols.report.junit import to_junit
from xen_symbols.report.model import Verdict, worst
from xen_symbols.report.notelines import buffer_lines
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import Lapic, PhysicalCpu
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import read_state

FOLDER = RECORDED / "text"
BY_NAME = {command.name: command for command in COMMANDS}
Json = dict[str, Any]


class RecordedSession:
    """gdb's part, played by a recorded machine."""

    def __init__(self, name: str = "4.17-handover") -> None:
        self.report: Json | None = None
        self.example, self._symbols = load(name)
        self.memory = locate(self.example, self._symbols)

    @contextlib.contextmanager
    def look(self) -> Iterator[XenMemory]:
        yield self.memory

    def symbols(self) -> SymbolTable:
        return self._symbols

    def connected(self) -> bool:
        return True

    def identification(self, memory: XenMemory) -> Identification:
        return identify(memory)

    def thread(self, cpu: int | None, physical: PhysicalCpu) -> int | None:
        return physical.index + 1

    def evaluate(self, expression: str) -> int:
        return self._symbols.address(expression)

    def formatted(self, name: str, raw: bytes) -> str | None:
        return None


def answer(name: str, *arguments: Any, session: RecordedSession | None = None) -> Any:
    return BY_NAME[name].answer(session or RecordedSession(), *arguments)


def blocks(name: str, *arguments: Any, session: RecordedSession | None = None) -> Sequence[Block]:
    return BY_NAME[name].blocks(answer(name, *arguments, session=session))


# -- machines that show the difference --------------------------------------------------------


def unlike(name: str = "4.17-handover") -> RecordedSession:
    """No two numberings agree: CPU 1 is the machine's CPU 2, and CPU 2 its CPU 1, with APIC IDs 8 and 4."""
    session = RecordedSession(name)
    cpus = session.example.physical_cpus
    array = session.symbols().address("x86_cpu_to_apicid")
    for cpu, index, apic_id in ((1, 2, 8), (2, 1, 4)):
        lapic = cpus[index].lapic
        assert isinstance(lapic, Lapic)
        cpus[index] = cpus[index]._replace(apic_id=apic_id, lapic=lapic._replace(apic_id=apic_id))
        session.example.write(session.memory.physical(array + 4 * cpu), apic_id.to_bytes(4, "little"))
    return session


def elsewhere() -> RecordedSession:
    """CPU 0 in dom0's user space, CPU 1 in a guest, and two that Xen does not use, one without registers."""
    session = unlike()
    cpus = session.example.physical_cpus
    cpus[0] = cpus[0]._replace(registers={**cpus[0].registers, "rip": 0x401000, "cs": 0xE033}, halted=False)
    cpus[2] = cpus[2]._replace(guest_mode=True, halted=False, nmi_pending=False)
    cpus[1] = cpus[1]._replace(registers={}, nmi_blocked=Absent("needs QMP"), nmi_pending=Absent("needs QMP"))
    cpus[1], cpus[3] = cpus[1]._replace(apic_id=77), cpus[3]._replace(apic_id=78)
    return session


def inferred(name: str, x2apic: bool) -> RecordedSession:
    """LAPIC modes without the register that holds them, with Xen's x2apic_enabled as it is given."""
    session = unlike(name)
    for index, cpu in enumerate(session.example.physical_cpus):
        assert isinstance(cpu.lapic, Lapic)
        session.example.physical_cpus[index] = cpu._replace(lapic=cpu.lapic._replace(apic_base=Absent("needs QMP")))
    where = session.memory.physical(session.symbols().address("x2apic_enabled", "dDbB"))
    session.example.write(where, bytes([x2apic]))
    return session


def damaged_notes() -> RecordedSession:
    """A vmcore: CPU 1's buffer is half written, CPU 2's is no longer Xen's, CPU 3's is empty."""
    session = RecordedSession("4.17-crashed-vmcore")
    starts = [int(item["address"], 16) for item in answer("xen notes", session=session)["buffers"]]
    for cpu, at, content in ((1, 20, bytes(336)), (2, 0, b"\xff" * 12), (3, 20, bytes(336)), (3, 372, bytes(32))):
        session.example.write(session.memory.physical(starts[cpu]) + at, content)
    return session


def sized(size: int) -> RecordedSession:
    """Symbols that say how large each one is, which examples do not."""
    session = RecordedSession()
    session.symbols().size = lambda name, kinds=None: size  # type: ignore[method-assign]
    return session


def _idt_unread() -> Sequence[Block]:
    gates = answer("xen idt", session=RecordedSession("4.17-shootdown"))["gates"][:4]
    gates[1] |= {"gate": None, "absent": "physical 0x1000 was not recorded"}
    gates[2]["gate"] |= {"type": 15, "dpl": 3, "present": False}
    return BY_NAME["xen idt"].blocks({"gates": gates})


def _symbols(**changes: Any) -> Sequence[Block]:
    found = answer("xen symbols")
    found["symbols"] |= changes.pop("symbols", {})
    return BY_NAME["xen symbols"].blocks({name: value for name, value in (found | changes).items() if value != "gone"})


def _status(name: str, **changes: Any) -> Sequence[Block]:
    return BY_NAME["xen crash status"].blocks(answer("xen crash status", session=RecordedSession(name)) | changes)


def _bt() -> Sequence[Block]:
    """A CPU that was shot down, one in a guest with a stale frame, one that is lost, one with nothing known."""
    messages = []
    for cpu in range(4):
        machine = stacks.Stacks(cpu=cpu)
        stacks.in_nmi_crash(machine)
        if cpu == 1:
            machine.at("guest", machine.tops["NMI"] - 0x200, stacks.GUEST_CS)
        if cpu == 2:
            machine.frame(machine.tops["NMI"], 2, stacks.inside("do_nmi"), machine.tops["NMI"] - 0x200)
        if cpu == 3:
            machine.put_tss(stacks.TSS_PAGE + 64, machine.guest_regs + 168, [stacks.POISON] * 7)
            machine.registers = Absent("no physical CPU could be matched to it")
        messages.append(machine.trace())
    messages[1]["stacks"]["processor_id"] = 2
    return BY_NAME["xen bt"].blocks({"cpus": messages})


# -- reports ----------------------------------------------------------------------------------

# There will be more checks; a few are enough to see the layout.
_TOLD = {"nmi-gate-handler", "nmi-gate-ist", "mc-gate-handler", "mc-gate-ist", "crash-save-done", "lapic-mode"}


def messages(machine: Machine) -> Json:
    made = machine.report().to_json()
    made["findings"] = [finding for finding in made["findings"] if finding["check"] in _TOLD]
    return made | {"verdict": str(worst(Verdict[finding["verdict"].upper()] for finding in made["findings"]))}


def clean() -> Json:
    return messages(Machine())


def faulty() -> Json:
    """Two gates are wrong on three CPUs, one could not be judged, and one LAPIC is off and one not known."""
    machine = Machine()
    machine.gate(0, NMI, 4, b"\x02")
    for cpu in (1, 2):
        machine.gate(cpu, MC, 4, b"\x03")
    machine.gate(3, MC, 5, b"\x6f")
    machine.lapic(1, spiv=0x1FF)
    machine.lapic(2, apic_base=Absent("needs QEMU's QMP socket"))
    machine.physical(3, lambda cpu: cpu._replace(lapic=Absent("no LAPIC"), registers={}))
    return messages(machine)


def traced() -> Json:
    """The shootdown, the same with only the machine's skips, and the handover of `faulty`, as one trace saw them."""
    stops = [messages(Machine("4.17-shootdown")), faulty()]
    report = stops[-1] | {"stages": [*stops[0]["stages"], stops[0]["stages"][0], *stops[1]["stages"]]}
    skipped = stops[0]["findings"][0] | {"verdict": "skip", "reason": "does not apply", "stop": 1}
    later = [finding | {"stop": 2} for finding in stops[1]["findings"]]
    report["findings"] = [*stops[0]["findings"], skipped, *later]
    report["gate_changes"] = _changes(describe_traced_change)
    return report


def _changes(to_json: Callable[..., Json]) -> list[Json]:
    """Changes of three gates between the shootdown and the handover; a watchpoint saw the first two writers."""
    before, machine = (Machine(f"4.17-{stage}") for stage in ("shootdown", "handover"))
    machine.gate(1, NMI, 4, b"\x00")
    machine.gate(2, NMI, 5, b"\x6f")
    machine.gate(3, NMI, 12, b"\x01")
    machine.memory.forget()
    history = GateHistory()
    moments = []
    for stop, one in enumerate((before, machine)):
        state = read_state(one.memory)
        moments.append(moment_of(state, infer(state, identify(one.memory).generation), 2 * stop))
    at = machine.symbols.address("do_nmi_crash") + 0x6A
    history.see(moments[0])
    writes = {(0, NMI): [CaughtWrite(0, at, "do_nmi_crash")], (1, NMI): [CaughtWrite(1, at, "do_nmi_crash")] * 2}
    seen = history.see(moments[1], writes)
    return [to_json(machine.symbols, change) for change in seen.values() if change.changed]


def _reports() -> list[Json]:
    """A dump of each kind, as `xencrash check` of several has them."""
    good, bad = clean(), faulty()
    unknown = bad | {"findings": [f for f in bad["findings"] if f["verdict"] != "fail"], "verdict": "unknown"}
    running = messages(Machine("4.17-normal"))
    lost = good | {"findings": [], "stages": [], "verdict": "unknown", "generation": None, "crashing_cpu": None}
    names = ("good", "bad", "half-read", "running", "lost", "empty")
    reports = (good, bad, unknown, running, lost | {"undecided": "lost: is cut off"}, lost)
    return [one | {"target": one["target"] | {"location": name}} for name, one in zip(names, reports, strict=True)]


def _header(**changes: Any) -> list[Block]:
    made = clean() | {"cpus": [], "findings": [], "verdict": "unknown", "undecided": "nothing was looked at"}
    made["symbols"] = made["symbols"] | changes.pop("symbols", {})
    return report_blocks(made | changes)


def _buffers() -> list[Block]:
    found = answer("xen notes", session=damaged_notes())["buffers"]
    unread = found[0] | {"cpu": 4, "state": None, "says": "physical 0x1000 was not recorded"}
    return [Lines([[Cell(line)] for line in buffer_lines([*found, unread])])]


def _running() -> Sequence[Block]:
    return report_blocks(_reports()[3])


TEXTS: dict[str, Callable[[], Sequence[Block] | str]] = {
    "gdb-idt": lambda: blocks("xen idt"),
    "gdb-idt-one": lambda: blocks("xen idt", 1, 18),
    "gdb-idt-unread": _idt_unread,
    "gdb-percpu": lambda: blocks("xen percpu", "crash_save_done", session=sized(1)),
    "gdb-percpu-bytes": lambda: blocks("xen percpu", "crash_save_done", 2, session=sized(3)),
    "gdb-percpu-unsized": lambda: blocks("xen percpu", "crash_save_done"),
    "gdb-lapic": lambda: blocks("xen lapic", session=unlike()),
    "gdb-lapic-of-one": lambda: blocks("xen lapic", 1, session=unlike()),
    "gdb-lapic-inferred-stopped": lambda: blocks("xen lapic", session=inferred("4.17-handover", True)),
    "gdb-lapic-inferred-xapic": lambda: blocks("xen lapic", session=inferred("4.17-shootdown", False)),
    "gdb-lapic-inferred-x2apic": lambda: blocks("xen lapic", session=inferred("4.17-shootdown", True)),
    "gdb-cpus": lambda: blocks("xen cpus", session=unlike()),
    "gdb-cpus-elsewhere": lambda: blocks("xen cpus", session=elsewhere()),
    "gdb-symbols": lambda: blocks("xen symbols"),
    "gdb-symbols-of-another": lambda: _symbols(
        symbols={"match": False, "target_build_id": "00ff"}, generation=None, absent="no crash path fits: do_nmi_crash"
    ),
    "gdb-symbols-unverified": lambda: _symbols(symbols={"match": None, "build_id": None, "target_build_id": None}),
    "gdb-symbols-alone": lambda: _symbols(target="gone"),
    "gdb-log": lambda: BY_NAME["xen log"].blocks({"text": "(XEN) one\n(XEN) \\x1b[2J two\n"}),
    "gdb-notes": lambda: blocks("xen notes", session=RecordedSession("4.17-crashed-vmcore")),
    "gdb-notes-damaged": lambda: blocks("xen notes", session=damaged_notes()),
    "gdb-notes-live": lambda: blocks("xen notes", session=RecordedSession("4.20-shootdown")),
    "gdb-bt": _bt,
    "gdb-bt-without-stacks": lambda: blocks("xen bt", 1, session=RecordedSession("4.17-normal")),
    "gdb-summary": lambda: blocks("xen summary", session=RecordedSession("summary/4.17-page-fault")),
    "gdb-summary-little-known": lambda: blocks("xen summary", session=RecordedSession("4.17-crashed-vmcore")),
    "gdb-summary-running": lambda: blocks("xen summary", session=RecordedSession("4.17-normal")),
    "gdb-vtop": lambda: blocks("xen vtop", RecordedSession().symbols().address("idle_pg_table")),
    "gdb-crash-status": lambda: _status("4.17-handover"),
    "gdb-crash-status-shootdown": lambda: _status("4.17-shootdown"),
    "gdb-crash-status-running": lambda: _status("4.17-normal"),
    "gdb-crash-status-unloaded": lambda: _status("4.17-normal", crash_kernel_loaded=False),
    "gdb-preflight": lambda: blocks("xen preflight", session=RecordedSession("4.17-normal")),
    "report-clean": lambda: report_blocks(clean()),
    "report-faulty": lambda: report_blocks(faulty()),
    "report-trace": lambda: report_blocks(traced()),
    "report-running": _running,
    "report-of-another-build": lambda: _header(symbols={"match": False}),
    "report-unverified": lambda: _header(symbols={"match": None, "build_id": None}, generation=None, crashing_cpu=2),
    "report-stage-lines": lambda: [
        stage_line(stage, [f for f in traced()["findings"] if f["stop"] == number])
        for number, stage in enumerate(traced()["stages"])
    ],
    "report-junit": lambda: to_junit(faulty() | {"undecided": "the connection was lost"}),
    "dumps": lambda: [dumps_table(_reports())],
    "gdb-watch-gates": lambda: watched_gates({"changes": _changes(describe_gate_change)}),
    "gdb-watch-gates-none": lambda: watched_gates({"changes": []}),
    "crash-note-buffers": _buffers,
}


def shown(name: str) -> str:
    """What the file of that name must hold."""
    made = TEXTS[name]()
    return made if isinstance(made, str) else plain([_marked(block) for block in made])


def _marked(block: Block) -> Block:
    if isinstance(block, Lines):
        return block._replace(lines=[[_cell(cell) for cell in line] for line in block.lines])
    return Table(block.title, block.columns, [[_cell(cell) for cell in row] for row in block.rows])


def _cell(cell: Cell) -> Cell:
    """Only the colours of verdicts carry meaning; dim and strong do not."""
    return Cell(f"{cell.text} <{cell.style}>") if cell.style in {str(verdict) for verdict in Verdict} else cell


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def main() -> None:
    for name in TEXTS:
        path_of(name).write_text(shown(name))


if __name__ == "__main__":
    main()
