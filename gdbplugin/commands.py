"""The xen commands, each declared once: what it takes, what it answers as JSON, and how the answer is printed.

Nothing here knows gdb: `gdbplugin.register` binds the rows of COMMANDS to gdb's command line and to its machine
interface, and documentation and tests walk them. An answer holds the JSON contract's names; addresses are hex strings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from gdbplugin import tables
from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.checks import BOOT_MODES, Context
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.crashpath.follow import crash_image_loaded
from xen_symbols.crashpath.generations import Identification
from xen_symbols.crashpath.missing import missing
from xen_symbols.crashpath.position import crashing_cpu, infer
from xen_symbols.describe.machine import describe_cpus, describe_gate, describe_symbols, describe_target
from xen_symbols.describe.notes import describe_crash_notes
from xen_symbols.report.blocks import Block, report_blocks
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86 import apic, gate
from xen_symbols.xen.backtrace import backtrace
from xen_symbols.xen.console import printable, read_console
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.percpu import per_cpu_areas, per_cpu_variable
from xen_symbols.xen.reads import Read, in_memory
from xen_symbols.xen.state import CpuState, State, read_state

Json = dict[str, Any]

IDT_ENTRIES = 256


class Session(Protocol):
    """What the commands ask of the debugger."""

    report: Json | None  # the last one, by a check or a trace

    def look(self) -> AbstractContextManager[XenMemory]:
        """Xen in the stopped machine, for the length of one look. Raises Undecidable."""
        ...

    def symbols(self) -> SymbolTable: ...

    def connected(self) -> bool: ...

    def identification(self, memory: XenMemory) -> Identification: ...

    def thread(self, cpu: int | None, physical: PhysicalCpu) -> int | None:
        """gdb's number of the thread that is a CPU; `cpu` is Xen's number of it, if it has one."""
        ...

    def evaluate(self, expression: str) -> int:
        """The value of an expression in gdb's words. Raises Undecidable."""
        ...

    def formatted(self, name: str, raw: bytes) -> str | None:
        """The value of a per-CPU variable as gdb shows its type; None without debug information."""
        ...


@dataclass(frozen=True)
class Argument:
    """`kind` chooses how it is read and completed: cpu, vector, percpu, address."""

    name: str
    kind: str
    says: str
    optional: bool = False


@dataclass(frozen=True)
class Command:
    """`answer` gives the JSON; `blocks` the tables for people. The MI twin is `-xen-` and the words, hyphenated."""

    words: tuple[str, ...]
    summary: str
    details: str
    arguments: tuple[Argument, ...]
    answer: Callable[..., Json]
    blocks: Callable[[Json], Sequence[Block]]

    @property
    def name(self) -> str:
        return " ".join(("xen", *self.words))

    @property
    def mi(self) -> str:
        return "-".join(("-xen", *self.words))

    @property
    def usage(self) -> str:
        return " ".join([self.name, *(f"[{a.name}]" if a.optional else a.name for a in self.arguments)])

    @property
    def help(self) -> str:
        lines = [self.summary, f"Usage: {self.usage}", "", self.details]
        if self.arguments:
            lines += ["", *(f"  {argument.name:8} {argument.says}" for argument in self.arguments)]
        return "\n".join([*lines, "", f"For programs: {self.mi} returns the same as JSON, in the field json."])


def _hex(value: int | Absent | None) -> str | None:
    return None if value is None or isinstance(value, Absent) else hex(value)


def _plain(value: Any) -> Any:
    return None if isinstance(value, Absent) else value


def _chosen(state: State, cpu: int | None) -> list[CpuState]:
    """The one asked for, or all that exist. Raises Undecidable for a number that Xen does not have."""
    if cpu is None:
        return [known for known in state.cpus.values() if known.exists]
    if cpu not in state.cpus:
        raise Undecidable(f"CPU {cpu} does not exist: nr_cpu_ids is {len(state.cpus)}")
    return [state.of(cpu)]


# -- xen idt ----------------------------------------------------------------------------------


def _idt(session: Session, cpu: int | None = None, vector: int | None = None) -> Json:
    if vector is not None and not 0 <= vector < IDT_ENTRIES:
        raise Undecidable(f"vector {vector} does not exist: an IDT has {IDT_ENTRIES}")
    with session.look() as memory:
        if cpu is None:
            state = read_state(memory, notes=False)
            gates = [
                _gate(memory, known.cpu, number, read)
                for known in _chosen(state, None)
                for number, read in (
                    (gate.VECTOR_NMI, known.nmi_gate),
                    (gate.VECTOR_DF, known.df_gate),
                    (gate.VECTOR_MC, known.mc_gate),
                )
            ]
        else:
            table = idt_address(memory, cpu)
            first, count = (0, IDT_ENTRIES) if vector is None else (vector, 1)
            raw = memory.read(table + first * gate.SIZE, count * gate.SIZE)
            gates = []
            for number in range(first, first + count):
                at = (number - first) * gate.SIZE
                entry = raw[at : at + gate.SIZE]
                read = in_memory(gate.decode(entry), table + number * gate.SIZE, entry)
                gates.append(_gate(memory, cpu, number, read))
        return {"gates": gates}


def _gate(memory: XenMemory, cpu: int, vector: int, read: Read) -> Json:
    out: Json = {"cpu": cpu, "vector": vector, "name": gate.VECTOR_NAMES.get(vector), "address": _hex(read.address)}
    out["gate"] = describe_gate(memory.symbols, read.value) if read.present else None
    if isinstance(read.value, Absent):
        out["absent"] = read.value.reason
    return out


# -- xen percpu -------------------------------------------------------------------------------


def _percpu(session: Session, name: str, cpu: int | None = None) -> Json:
    with session.look() as memory:
        plain = name.removeprefix("per_cpu__")
        size = memory.symbols.size(f"per_cpu__{plain}")
        variable, areas = per_cpu_variable(memory.symbols, plain), per_cpu_areas(memory)
        addresses = {number: areas.address(variable, number) for number in (areas.existing if cpu is None else [cpu])}
        if size:
            raws = memory.read_many([(address, size) for address in addresses.values()])
        else:
            raws = [Absent("the symbols do not say how large it is")] * len(addresses)
    values = []
    for number, raw in zip(addresses, raws, strict=True):
        value: Json = {"cpu": number, "address": hex(addresses[number])}
        if isinstance(raw, Absent):
            value |= {"raw": None, "value": None, "absent": raw.reason}
        else:
            value |= {"raw": raw.hex(), "value": session.formatted(plain, raw) or _number(raw)}
        values.append(value)
    return {"name": plain, "size": size, "cpus": values}


def _number(raw: bytes) -> str | None:
    """An integer's worth of bytes as a number: what they are is not known without debug information."""
    return hex(int.from_bytes(raw, "little")) if len(raw) in (1, 2, 4, 8) else None


# -- xen lapic --------------------------------------------------------------------------------


def _lapic(session: Session, cpu: int | None = None) -> Json:
    with session.look() as memory:
        state = read_state(memory, notes=False)
        return {"cpus": [_lapic_of(state, known) for known in _chosen(state, cpu)]}


def _lapic_of(state: State, cpu: CpuState) -> Json:
    mode, source = lapic_mode(state, cpu)
    out: Json = {"cpu": cpu.cpu, "apic_id": _plain(cpu.apic_id.value), "mode": mode, "mode_source": source}
    physical = cpu.physical
    lapic = physical if isinstance(physical, Absent) else physical.lapic
    if isinstance(lapic, Absent):
        return out | {"absent": lapic.reason}
    out["source"] = lapic.source
    for name in ("apic_base", "spiv", "icr_low", "icr_high"):
        out[name] = _hex(getattr(lapic, name))
    out["enabled"] = None if isinstance(lapic.spiv, Absent) else bool(lapic.spiv & apic.SPIV_SOFTWARE_ENABLE)
    out["lvt"] = (
        None if isinstance(lapic.lvt, Absent)
        else {name: hex(entry) for name, entry in zip(apic.LVT_NAMES, lapic.lvt, strict=True)}
    )  # fmt: skip
    return out


def lapic_mode(state: State, cpu: CpuState) -> tuple[str | None, str]:
    """(mode, where it is known from). Without the register it is inferred from what Xen means it to be."""
    physical = cpu.physical
    lapic = physical if isinstance(physical, Absent) else physical.lapic
    if not isinstance(lapic, Absent) and not isinstance(lapic.apic_base, Absent):
        return apic.mode(lapic.apic_base).value, lapic.source
    online, boot, running = (state.system[name] for name in ("online", "apic_boot_mode", "x2apic_enabled"))
    stopped = cpu.crash_save_done.present and cpu.crash_save_done.value is True
    offline = online.present and cpu.cpu not in online.value
    if (stopped or offline) and boot.present and boot.value in BOOT_MODES:
        why = "it has been stopped" if stopped else "it is not online"
        return BOOT_MODES[boot.value].value, f"inferred from apic_boot_mode: {why}"
    if running.present:
        mode = apic.Mode.X2APIC if running.value else apic.Mode.XAPIC
        return mode.value, "inferred from x2apic_enabled"
    return None, "not known"


# -- xen cpus ---------------------------------------------------------------------------------


def _cpus(session: Session) -> Json:
    with session.look() as memory:
        state = read_state(memory, notes=False)
        online = state.system["online"]
        cpus = []
        for known in state.cpus.values():
            out: Json = {
                "cpu": known.cpu,
                "exists": known.exists,
                "online": known.cpu in online.value if online.present else None,
                "apic_id": _plain(known.apic_id.value),
            }
            if isinstance(known.physical, Absent):
                out["absent"] = known.physical.reason
            else:
                out |= _physical(session, memory.symbols, known.cpu, known.physical)
                out["lapic_mode"], out["lapic_mode_source"] = lapic_mode(state, known)
            cpus.append(out)
        return {"cpus": cpus, "unmatched": [_physical(session, memory.symbols, None, cpu) for cpu in state.unmatched]}


def _physical(session: Session, symbols: SymbolTable, number: int | None, cpu: PhysicalCpu) -> Json:
    pc = cpu.registers.get("rip")
    out: Json = {
        "index": cpu.index,
        "thread": session.thread(number, cpu),
        "at": None if pc is None else {"symbol": symbols.describe(pc), "pc": hex(pc)},
        "ring": cpu.registers["cs"] & 3 if "cs" in cpu.registers else None,
        "source": cpu.source,
    }
    for name in ("halted", "nmi_blocked", "nmi_pending", "guest_mode"):
        out[name] = _plain(getattr(cpu, name))
    return out


# -- xen bt -----------------------------------------------------------------------------------


def _bt(session: Session, cpu: int | None = None) -> Json:
    with session.look() as memory:
        state = read_state(memory, notes=False)
        chosen = _chosen(state, cpu)
        absent = [known for known in chosen if not known.exists]
        if absent:
            raise Undecidable(f"CPU {absent[0].cpu} is announced and absent: it has no stack")
        return {"cpus": [backtrace(memory, state, known).to_json() for known in chosen]}


# -- xen symbols, log, notes, vtop ------------------------------------------------------------


def _symbols(session: Session) -> Json:
    if not session.connected():
        symbols = session.symbols()
        build_id = symbols.build_id.hex() if symbols.build_id else None
        return {"symbols": {"path": symbols.path, "source": symbols.source, "build_id": build_id}}
    with session.look() as memory:
        out: Json = {"symbols": describe_symbols(memory), "target": describe_target(memory)}
        try:
            found = session.identification(memory)
        except Undecidable as error:
            lacks = [row.to_json() for row in missing(memory.symbols, None)]
            return out | {"missing": lacks, "generation": None, "absent": str(error)}
        generation = found.generation
        return out | {
            "missing": [row.to_json() for row in missing(memory.symbols, generation)],
            "generation": {
                "id": generation.id, "introduced": generation.introduced, "releases": generation.releases,
                "evidence": list(found.evidence),
            }
        }  # fmt: skip


def _log(session: Session) -> Json:
    with session.look() as memory:
        return {"text": printable(read_console(memory))}


def _notes(session: Session) -> Json:
    with session.look() as memory:
        return describe_crash_notes(memory, read_state(memory))


def _vtop(session: Session, address: int) -> Json:
    with session.look() as memory:
        mapping = memory.walk(address)
        return {
            "address": hex(address),
            "symbol": memory.symbols.describe(address),
            "physical": hex(mapping.physical),
            "page_size": mapping.size,
            "root": hex(memory.root),
            "entries": [
                {"level": level, "address": hex(where), "value": hex(value)} for level, where, value in mapping.entries
            ],
        }


# -- xen crash --------------------------------------------------------------------------------


def _status(session: Session) -> Json:
    with session.look() as memory:
        generation = session.identification(memory).generation
        state = read_state(memory, notes=False)
        position = infer(state, generation)
        context = Context(memory, state, position, generation)
        flags = state.system["kexec_flags"]
        out: Json = {
            "generation": generation.id,
            "stage": position.stage.id,
            "says": position.stage.says,
            "subject": position.subject,
            "crashing_cpu": position.crashing_cpu,
            "crashing_cpu_by": [] if position.crashing_cpu is None else list(crashing_cpu(state, generation)[1]),
            "crash_kernel_loaded": crash_image_loaded(flags.value) if flags.present else None,
            "online_at_crash": sorted(position.online),
        }
        for name in ("online", "saved", "waiting_mask", "waiting_count", "kexecing"):
            value = state.system[name].value
            out[name] = sorted(value) if isinstance(value, frozenset) else _plain(value)
        out["cpus"] = describe_cpus(context.state, context.cpus, position.crashing_cpu, position.online)
        return out


def _check(session: Session) -> Json:
    with session.look() as memory:
        session.report = evaluate(memory, session.identification(memory)).to_json()
    return session.report


def _report(session: Session) -> Json:
    if session.report is None:
        raise Undecidable("there is no report yet: xen crash check makes one, and so does xen crash trace")
    return session.report


_CPU = Argument("CPU", "cpu", "Xen's number of a CPU (not gdb's thread, not the APIC id); default: every CPU", True)

COMMANDS: tuple[Command, ...] = (
    Command(
        ("idt",), "Show gates of the interrupt descriptor tables.",
        "Without arguments, the NMI, #DF and #MC gates of every CPU; with a CPU, all of its gates; with a vector, one.",
        (_CPU, Argument("VECTOR", "vector", "an interrupt vector, 0 to 255", True)), _idt, tables.idt,
    ),
    Command(
        ("percpu",), "Show a per-CPU variable.",
        "The value has the variable's type where the symbols carry debug information; else it is an unsigned number\n"
        "of the variable's size, or its bytes.",
        (Argument("NAME", "percpu", "the variable's name, with or without per_cpu__"), _CPU), _percpu, tables.percpu,
    ),
    Command(
        ("lapic",), "Show the local APICs and their modes.",
        "Every answer names its source: QEMU's device state (set xen qmp-socket), an rdmsr executed on the CPU\n"
        "(set xen rdmsr on), or an inference from Xen's variables.",
        (_CPU,), _lapic, tables.lapic,
    ),
    Command(
        ("cpus",), "Show every CPU: Xen's number, gdb's thread, the APIC id, and where it is.",
        "The three numberings are different things; CPUs are matched by APIC id.", (), _cpus, tables.cpus,
    ),
    Command(
        ("bt",), "Show where each CPU is and how it got there, across its exception stacks.",
        "Names the stack that a CPU is on by the pointers in its TSS, and goes back over the exception frames to what\n"
        "was interrupted. Calls are found by scanning the stack in use for return addresses behind call instructions,\n"
        "as Xen's own traces are: it needs no debug information, but some may be left from earlier calls. A frame on\n"
        "the NMI, #MC, #DF or #DB stack that is not part of the way back is shown as left from an earlier one.\n"
        "Each frame is a struct cpu_user_regs at the address given.",
        (_CPU,), _bt, tables.bt,
    ),
    Command(
        ("symbols",), "Show which symbols are used, whether they fit, what they lack, and which crash path Xen has.",
        "Symbols come from set xen symbols, or else from the file that gdb has loaded.", (), _symbols, tables.symbols,
    ),
    Command(
        ("log",), "Show Xen's console ring, from its oldest line.",
        "Control characters are shown as escapes, so that no terminal obeys them.", (), _log, tables.log,
    ),
    Command(
        ("notes",), "Show the crash notes: what each CPU has saved, and what Xen says of itself.",
        "Read from Xen's memory on every target, where they are empty until a crash; on a dump also the notes of the\n"
        "file, and whether they are the same. The registers are those of Xen in kexec_crash_save_cpu, not of what it\n"
        "interrupted: xen bt shows that.",
        (), _notes, tables.notes,
    ),
    Command(
        ("vtop",), "Translate one of Xen's virtual addresses by Xen's own page tables.",
        "Prints the physical address and every page-table entry on the way, whatever the selected CPU runs.",
        (Argument("ADDRESS", "address", "a symbol of Xen's (file#name too), or an expression"),), _vtop, tables.vtop,
    ),
    Command(
        ("crash", "status"), "Show where on its crash path Xen is, without judging it.",
        "The stage, the crashing CPU and the evidence for it, whom it waits for, and each CPU's gates.",
        (), _status, tables.status,
    ),
    Command(
        ("crash", "check"), "Judge the state that the machine is in.",
        "Evaluates every check of the crash path for this stage, and keeps the report.", (), _check, report_blocks,
    ),
    Command(
        ("crash", "report"), "Show the last report again.",
        "The report of the last xen crash check or xen crash trace.", (), _report, report_blocks,
    ),
)  # fmt: skip

TRACE_HELP = """Follow a crash of Xen, stage by stage, and judge each stage.
Usage: xen crash trace [--timeout SECONDS]

Lets the machine run until Xen crashes, stops it at each stage of the crash path to read every gate
and every CPU, prints a line for each stage, and a report at the end, where the machine stays stopped.
Ctrl-C ends the trace. Without --timeout it waits for a crash as long as it takes.

For programs: -xen-crash-trace-begin, -xen-crash-trace-stop after each stop at one of the anchors that
it named, and -xen-crash-trace-end. Each returns JSON in the field json."""

WATCH_HELP = """List what changes the NMI and #MC gates of the CPUs while the machine runs.
Usage: xen watch gates

Lets the machine run until Ctrl-C or a breakpoint stops it, and lists each gate that is not as it was:
whose, which property, before and after, and the writer's CPU, function and offset where a write
watchpoint saw it. A gate that changed and changed back is not listed; a writer is missed where several
CPUs write at once. While a guest runs on an AMD CPU its gates change at each switch, which makes it slow.

For programs: -xen-watch-gates-begin, -xen-watch-gates-stop after each stop for the changes since the
last one, and -xen-watch-gates-end. Each returns JSON in the field json."""

# What a handler may raise that is an answer to the user, not a fault of ours.
ERRORS = (Undecidable, Unreadable)


@dataclass(frozen=True)
class Setting:
    """One parameter under `set xen`. `kind` is gdb's PARAM_ constant."""

    name: str
    kind: str
    summary: str
    details: str


SETTINGS = (
    Setting("symbols", "PARAM_OPTIONAL_FILENAME", "the file with Xen's symbols",
            "Its xen-syms, a .map, or the image. Empty: the first file loaded into gdb that is Xen's, else the table\n"
            "that Xen carries in its own image."),
    Setting("qmp-socket", "PARAM_OPTIONAL_FILENAME", "QEMU's QMP socket (a unix socket's path)",
            "Through it come the LAPIC mode, the NMI latch and pending NMIs of every CPU, also of halted ones.\n"
            "Empty: QEMU's monitor is asked through gdb, which has no answer for those."),
    Setting("allow-build-id-mismatch", "PARAM_BOOLEAN", "whether symbols of another build are used",
            "Off: they are refused. On: they are used, and every report says so."),
    Setting("rdmsr", "PARAM_BOOLEAN", "whether the LAPIC mode may be read by executing an rdmsr on each CPU",
            "Needed only without QMP. It executes one instruction of Xen's on each CPU that is awake in Xen, with the\n"
            "registers put back afterwards; halted CPUs are left alone. For the command line alone, not for -xen-…\n"
            "commands. Off: no register is ever changed."),
)  # fmt: skip

# Convenience functions, by name.
FUNCTIONS = {
    "xen_per_cpu": """$xen_per_cpu("NAME", CPU): the value of a per-CPU variable of Xen's.

It has the variable's type where the symbols carry debug information; else it is an unsigned
integer of the variable's size (1, 2, 4 or 8 bytes), or an array of unsigned char.
It is a copy, read by Xen's own page tables whatever CPU is selected: it has no address
(xen percpu shows that), and assigning to it changes nothing in the machine.""",
    "xen_gate": """$xen_gate(CPU, VECTOR): the handler's address in one of Xen's interrupt gates, an unsigned long.

For instance: info symbol $xen_gate(0, 2)""",
}
