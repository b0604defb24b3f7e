"""What the processor has: gates, local APICs, page tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdbplugin.declare import CPU, Argument, Command, Session, cell, chosen, hex_or_none, plain
from xen_symbols.absence import Absent, Undecidable
from xen_symbols.describe.machine import describe_gate
from xen_symbols.report.blocks import Block, Cell, Lines, Table
from xen_symbols.x86 import apic, gate
from xen_symbols.x86.apic import LVT_MASKED
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.lapic import lapic_mode
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import Read, in_memory
from xen_symbols.xen.state import CpuState, State, read_state

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


def _idt(session: Session, cpu: int | None = None, vector: int | None = None) -> Json:
    if vector is not None and not 0 <= vector < gate.IDT_ENTRIES:
        raise Undecidable(f"vector {vector} does not exist: an IDT has {gate.IDT_ENTRIES}")
    with session.look() as memory:
        if cpu is None:
            state = read_state(memory, notes=False)
            gates = [
                _gate(memory, known.cpu, number, read)
                for known in chosen(state, None)
                for number, read in (
                    (gate.VECTOR_NMI, known.nmi_gate),
                    (gate.VECTOR_DF, known.df_gate),
                    (gate.VECTOR_MC, known.mc_gate),
                )
            ]
        else:
            table = idt_address(memory, cpu)
            first, count = (0, gate.IDT_ENTRIES) if vector is None else (vector, 1)
            raw = memory.read(table + first * gate.SIZE, count * gate.SIZE)
            gates = []
            for number in range(first, first + count):
                at = (number - first) * gate.SIZE
                entry = raw[at : at + gate.SIZE]
                read = in_memory(gate.decode(entry), table + number * gate.SIZE, entry)
                gates.append(_gate(memory, cpu, number, read))
        return {"gates": gates}


def _gate(memory: XenMemory, cpu: int, vector: int, read: Read) -> Json:
    out: Json = {"cpu": cpu, "vector": vector, "name": gate.VECTOR_NAMES.get(vector)}
    out["address"] = hex_or_none(read.address)
    out["gate"] = describe_gate(memory.symbols, read.value) if read.present else None
    if isinstance(read.value, Absent):
        out["absent"] = read.value.reason
    return out


def _show_idt(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "vector", "", "handler", "selector", "type", "DPL", "present", "IST", "at"]
    rows = []
    for item in answer["gates"]:
        gate = item["gate"]
        head = [cell(item["cpu"], "strong"), cell(item["vector"]), Cell(item["name"] or "")]
        if gate is None:
            rows.append([*head, Cell(item["absent"], "unknown"), *[Cell("")] * 6])
            continue
        values = (gate["handler"], gate["selector"], gate["type"], gate["dpl"], gate["present"], gate["ist"])
        rows.append([*head, *map(cell, values), Cell(item["address"], "dim")])
    return [Table("Interrupt gates", columns, rows)]


def _lapic(session: Session, cpu: int | None = None) -> Json:
    with session.look() as memory:
        state = read_state(memory, notes=False)
        return {"cpus": [_lapic_of(state, known) for known in chosen(state, cpu)]}


def _lapic_of(state: State, cpu: CpuState) -> Json:
    mode, source = lapic_mode(state, cpu)
    out: Json = {"cpu": cpu.cpu, "apic_id": plain(cpu.apic_id.value), "mode": mode, "mode_source": source}
    physical = cpu.physical
    lapic = physical if isinstance(physical, Absent) else physical.lapic
    if isinstance(lapic, Absent):
        return out | {"absent": lapic.reason}
    out["source"] = lapic.source
    for name in ("apic_base", "spiv", "icr_low", "icr_high"):
        out[name] = hex_or_none(getattr(lapic, name))
    out["enabled"] = None if isinstance(lapic.spiv, Absent) else bool(lapic.spiv & apic.SPIV_SOFTWARE_ENABLE)
    out["lvt"] = (
        None if isinstance(lapic.lvt, Absent)
        else {name: hex(entry) for name, entry in zip(apic.LVT_NAMES, lapic.lvt, strict=True)}
    )  # fmt: skip
    return out


def _show_lapic(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "APIC ID", "mode", "by", "APIC_BASE", "enabled", "SPIV", "ICR", "LVT unmasked"]
    rows = []
    for cpu in answer["cpus"]:
        icr = None if cpu.get("icr_low") is None else f"{cpu['icr_high']}:{cpu['icr_low']}"
        lvt = cpu.get("lvt")
        unmasked = None if lvt is None else [name for name, entry in lvt.items() if not int(entry, 16) & LVT_MASKED]
        values = (cpu.get("apic_base"), cpu.get("enabled"), cpu.get("spiv"), icr, unmasked)
        rows.append(
            [cell(cpu["cpu"], "strong"), cell(cpu["apic_id"]), cell(cpu["mode"]), Cell(cpu["mode_source"], "dim"),
             *map(cell, values)]
        )  # fmt: skip
    return [Table("Local APICs", columns, rows)]


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


def _show_vtop(answer: Json) -> Sequence[Block]:
    rows = [[Cell(entry["level"]), Cell(entry["address"]), Cell(entry["value"])] for entry in answer["entries"]]
    size = answer["page_size"]
    unit = f"{size >> 30} GiB" if size >> 30 else f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
    where = f"{answer['address']} ({answer['symbol']})" if answer["symbol"] != answer["address"] else answer["address"]
    return [
        Table(f"{where}, from the root at {answer['root']}", ["level", "entry at", "entry"], rows),
        Lines([[Cell("physical ", "dim"), Cell(answer["physical"], "strong"), Cell(f", in a page of {unit}")]]),
    ]


COMMANDS = (
    Command(
        ("idt",), "Show gates of the interrupt descriptor tables.",
        "Without arguments, the NMI, #DF and #MC gates of every CPU; with a CPU, all of its gates; with a vector, one.",
        (CPU, Argument("VECTOR", "vector", "an interrupt vector, 0 to 255", True)), _idt, _show_idt,
    ),
    Command(
        ("lapic",), "Show the local APICs and their modes.",
        "Every answer names its source: QEMU's device state (set xen qmp-socket), an rdmsr executed on the CPU\n"
        "(set xen rdmsr on), or an inference from Xen's variables.",
        (CPU,), _lapic, _show_lapic,
    ),
    Command(
        ("vtop",), "Translate one of Xen's virtual addresses by Xen's own page tables.",
        "Prints the physical address and every page-table entry on the way, whatever the selected CPU runs.",
        (Argument("ADDRESS", "address", "a symbol of Xen's (file#name too), or an expression"),), _vtop, _show_vtop,
    ),
)  # fmt: skip
