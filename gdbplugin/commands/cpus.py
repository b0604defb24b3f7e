"""Where each CPU is, and its variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdbplugin.declare import CPU, Argument, Command, Session, cell, chosen, plain
from xen_symbols.absence import Absent, Undecidable
from xen_symbols.describe.backtrace import describe_backtrace
from xen_symbols.report.backtracelines import SCANNED, way_back
from xen_symbols.report.blocks import Block, Cell, Lines, Table, show
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.xen.backtrace import backtrace
from xen_symbols.xen.lapic import lapic_mode
from xen_symbols.xen.percpu import per_cpu_areas, per_cpu_variable
from xen_symbols.xen.state import read_state

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


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
                "apic_id": plain(known.apic_id.value),
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
        out[name] = plain(getattr(cpu, name))
    return out


def _show_cpus(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "thread", "APIC ID", "online", "at", "halted", "NMIs", "NMI pending", "LAPIC"]
    rows = []
    for cpu in answer["cpus"]:
        if not cpu["exists"]:
            rows.append([cell(cpu["cpu"], "strong"), *[cell(None)] * 3, Cell("possible, not present", "dim"),
                         *[cell(None)] * 4])  # fmt: skip
            continue
        rows.append([cell(cpu["cpu"], "strong"), *_physical_cells(cpu)])
    blocks: list[Block] = [Table("CPUs", columns, rows)]
    if answer["unmatched"]:
        rows = [[Cell("none", "unknown"), *_physical_cells(cpu)] for cpu in answer["unmatched"]]
        blocks.append(Table("CPUs of the machine that Xen does not use", columns, rows))
    return blocks


def _physical_cells(cpu: Json) -> list[Cell]:
    at = cpu.get("at")
    where = Cell(cpu.get("absent", "not known"), "unknown")
    if at is not None:
        where = Cell(at["symbol"] + ("" if cpu["ring"] == 0 else f", ring {cpu['ring']}"))
        if cpu["guest_mode"]:
            where = Cell(f"{at['pc']}, in a guest")
    blocked = cpu.get("nmi_blocked")
    return [
        cell(cpu.get("thread")),
        cell(cpu.get("apic_id")),
        cell(cpu.get("online")),
        where,
        cell(cpu.get("halted")),
        cell(None if blocked is None else "blocked" if blocked else "unblocked"),
        cell(cpu.get("nmi_pending")),
        cell(cpu.get("lapic_mode")),
    ]


def _bt(session: Session, cpu: int | None = None) -> Json:
    with session.look() as memory:
        state = read_state(memory, notes=False)
        wanted = chosen(state, cpu)
        absent = [known for known in wanted if not known.exists]
        if absent:
            raise Undecidable(f"CPU {absent[0].cpu} is possible but not present: it has no stack")
        return {"cpus": [describe_backtrace(backtrace(memory, state, known)) for known in wanted]}


def _show_bt(answer: Json) -> Sequence[Block]:
    """Running text: a CPU's steps, each with its calls, from the innermost frame outwards."""
    lines: list[list[Cell]] = [[Cell(SCANNED, "dim")]]
    for cpu in answer["cpus"]:
        lines += [[], *_bt_head(cpu), *way_back(cpu)]
        for frame in cpu["frames"]:
            if frame["state"] != "current":
                where = f"rip {frame['symbol']}, cs {frame['cs']}, rsp {frame['rsp']}, frame at {frame['address']}"
                lines.append([Cell(f"  {frame['stack']} stack: {frame['says']} ({where})", "dim")])
    return [Lines(lines)]


def _bt_head(cpu: Json) -> list[list[Cell]]:
    source = cpu["source"] if cpu["current"] else f"{cpu['source']}: where it saved them, before it went on"
    lines = [[Cell(f"CPU {cpu['cpu']}", "strong"), Cell(f" ({source})", "dim")]]
    if "absent" in cpu:
        lines.append([Cell(f"  no registers: {cpu['absent']}", "unknown")])
    stacks = cpu["stacks"]
    if stacks is None:
        return [*lines, [Cell(f"  stacks not known: {cpu['stacks_absent']}", "unknown")]]
    lines.append([Cell(f"  stacks {stacks['start']}-{stacks['end']} by {stacks['by']}, named by {stacks['names_by']}",
                       "dim")])  # fmt: skip
    if stacks["processor_id"] != cpu["cpu"]:
        lines.append([Cell(f"  the cpu_info at their end is of CPU {show(stacks['processor_id'])}", "unknown")])
    return lines


def _percpu(session: Session, name: str, cpu: int | None = None) -> Json:
    with session.look() as memory:
        bare = name.removeprefix("per_cpu__")
        size = memory.symbols.size(f"per_cpu__{bare}")
        variable, areas = per_cpu_variable(memory.symbols, bare), per_cpu_areas(memory)
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
            value |= {"raw": raw.hex(), "value": session.formatted(bare, raw) or _number(raw)}
        values.append(value)
    return {"name": bare, "size": size, "cpus": values}


def _number(raw: bytes) -> str | None:
    """The bytes of an integer as a number: without debug information their type is not known."""
    return hex(int.from_bytes(raw, "little")) if len(raw) in (1, 2, 4, 8) else None


def _show_percpu(answer: Json) -> Sequence[Block]:
    rows = []
    for item in answer["cpus"]:
        value = item["value"] or item["raw"]
        shown = Cell(item["absent"], "unknown") if value is None else Cell(value)
        rows.append([cell(item["cpu"], "strong"), Cell(item["address"]), shown])
    size = f"{answer['size']} byte{'s' * (answer['size'] > 1)}" if answer["size"] else "size not known"
    return [Table(f"per_cpu({answer['name']}), {size}", ["CPU", "address", "value"], rows)]


COMMANDS = (
    Command(
        ("cpus",), "Show every CPU: Xen's number, gdb's thread, the APIC ID, and where it is.",
        "The three numberings differ; CPUs are matched by APIC ID.", (), _cpus, _show_cpus,
    ),
    Command(
        ("bt",), "Show where each CPU is and how it got there, across its exception stacks.",
        "Names the stack that a CPU is on by the pointers in its TSS, and goes back over the exception frames to what\n"
        "was interrupted. Calls are found by scanning the stack in use for return addresses behind call instructions,\n"
        "as Xen's own traces are: it needs no debug information, but some may be left from earlier calls. A frame on\n"
        "the NMI, #MC, #DF or #DB stack that is not part of the way back is shown as left from an earlier one.\n"
        "Each frame is a struct cpu_user_regs at the address given.",
        (CPU,), _bt, _show_bt,
    ),
    Command(
        ("percpu",), "Show a per-CPU variable.",
        "The value has the variable's type where the symbols carry debug information; else it is an unsigned number\n"
        "of the variable's size, or its bytes.",
        (Argument("NAME", "percpu", "the variable's name, with or without per_cpu__"), CPU), _percpu, _show_percpu,
    ),
)  # fmt: skip
