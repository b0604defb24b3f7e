"""The commands' answers as blocks of text and tables. Reads JSON only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xen_symbols.report.blocks import (
    Block,
    Cell,
    Lines,
    Table,
    cpus_table,
    info_note_lines,
    missing_lines,
    note_lines,
    show,
)
from xen_symbols.x86.apic import LVT_MASKED

Json = dict[str, Any]


def _cell(value: Any, style: str = "") -> Cell:
    return Cell("-", "dim") if value is None else Cell(show(value), style)


def idt(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "vector", "", "handler", "selector", "type", "DPL", "present", "IST", "at"]
    rows = []
    for item in answer["gates"]:
        gate = item["gate"]
        head = [_cell(item["cpu"], "strong"), _cell(item["vector"]), Cell(item["name"] or "")]
        if gate is None:
            rows.append([*head, Cell(item["absent"], "unknown"), *[Cell("")] * 6])
            continue
        values = (gate["handler"], gate["selector"], gate["type"], gate["dpl"], gate["present"], gate["ist"])
        rows.append([*head, *map(_cell, values), Cell(item["address"], "dim")])
    return [Table("Interrupt gates", columns, rows)]


def percpu(answer: Json) -> Sequence[Block]:
    rows = []
    for item in answer["cpus"]:
        value = item["value"] or item["raw"]
        shown = Cell(item["absent"], "unknown") if value is None else Cell(value)
        rows.append([_cell(item["cpu"], "strong"), Cell(item["address"]), shown])
    size = f"{answer['size']} byte{'s' * (answer['size'] > 1)}" if answer["size"] else "size not known"
    return [Table(f"per_cpu({answer['name']}), {size}", ["CPU", "address", "value"], rows)]


def lapic(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "APIC id", "mode", "by", "APIC_BASE", "enabled", "SPIV", "ICR", "LVT unmasked"]
    rows = []
    for cpu in answer["cpus"]:
        icr = None if cpu.get("icr_low") is None else f"{cpu['icr_high']}:{cpu['icr_low']}"
        lvt = cpu.get("lvt")
        unmasked = None if lvt is None else [name for name, entry in lvt.items() if not int(entry, 16) & LVT_MASKED]
        values = (cpu.get("apic_base"), cpu.get("enabled"), cpu.get("spiv"), icr, unmasked)
        rows.append(
            [_cell(cpu["cpu"], "strong"), _cell(cpu["apic_id"]), _cell(cpu["mode"]), Cell(cpu["mode_source"], "dim"),
             *map(_cell, values)]
        )  # fmt: skip
    return [Table("Local APICs", columns, rows)]


def cpus(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "thread", "APIC id", "online", "at", "halted", "NMIs", "NMI pending", "LAPIC"]
    rows = []
    for cpu in answer["cpus"]:
        if not cpu["exists"]:
            rows.append([_cell(cpu["cpu"], "strong"), *[_cell(None)] * 3, Cell("announced and absent", "dim"),
                         *[_cell(None)] * 4])  # fmt: skip
            continue
        rows.append([_cell(cpu["cpu"], "strong"), *_physical_cells(cpu)])
    blocks: list[Block] = [Table("CPUs", columns, rows)]
    if answer["unmatched"]:
        rows = [[Cell("none", "unknown"), *_physical_cells(cpu)] for cpu in answer["unmatched"]]
        blocks.append(Table("CPUs of the machine that are none of Xen's", columns, rows))
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
        _cell(cpu.get("thread")),
        _cell(cpu.get("apic_id")),
        _cell(cpu.get("online")),
        where,
        _cell(cpu.get("halted")),
        _cell(None if blocked is None else "blocked" if blocked else "open"),
        _cell(cpu.get("nmi_pending")),
        _cell(cpu.get("lapic_mode")),
    ]


def bt(answer: Json) -> Sequence[Block]:
    """Running text: a CPU's steps, each with its calls, from where it is back to where it began."""
    lines: list[list[Cell]] = [[Cell("Calls are found by scanning the stacks; some may be left from earlier.", "dim")]]
    for cpu in answer["cpus"]:
        lines += [[], *_bt_head(cpu)]
        for step in cpu["steps"]:
            lines += _bt_step(step)
        if cpu["end"]:
            lines.append([Cell(f"  {cpu['end']}", "unknown" if cpu["lost"] else "")])
        if cpu["guest"] is not None:
            guest = cpu["guest"]
            lines.append([Cell(f"    rip {guest['rip']}, cs {guest['cs']}, rsp {guest['rsp']}")])
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


def _bt_step(step: Json) -> list[list[Cell]]:
    where = [Cell(step["at"]["symbol"], "strong"), Cell(f", rsp {step['rsp']} on {step['place']}")]
    if step["interrupted_by"] is not None:
        where = [Cell(f"{step['interrupted_by']} interrupted "), *where,
                 Cell(f" (cs {step['cs']}, frame at {step['frame']})", "dim")]  # fmt: skip
    lines = [[Cell("  "), *where]]
    lines += [[Cell(f"    [<{call['address']}>] {call['symbol']}")] for call in step["calls"]]
    if "absent" in step:
        lines.append([Cell(f"    {step['absent']}", "unknown")])
    return lines


def symbols(answer: Json) -> Sequence[Block]:
    used = answer["symbols"]
    lines = [
        ("symbols", f"{used['path']} ({used['source']})"),
        ("build-id", used["build_id"] or "none"),
    ]
    if "target" in answer:
        matches = {True: "the same", False: "another: DOES NOT MATCH", None: "not comparable"}[used["match"]]
        lines.append(("in memory", f"{used['target_build_id'] or 'not found'} ({matches})"))
        lines.append(("Xen at", f"physical {answer['target']['xen_phys_start']}, by {answer['target']['found_by']}"))
        lines += [("missing", text) for text in missing_lines(answer["missing"])]
        generation = answer["generation"]
        if generation is None:
            lines.append(("crash path", answer["absent"]))
        else:
            lines.append(("crash path", f"{generation['id']} ({generation['introduced']}; {generation['releases']})"))
            lines += [("", says) for says in generation["evidence"]]
    return [Lines([[Cell(f"{name:12}", "dim"), Cell(text)] for name, text in lines])]


def log(answer: Json) -> Sequence[Block]:
    return [Lines([[Cell(line)] for line in answer["text"].splitlines()])]


def notes(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "buffer at", "state", "saved in", "rsp", "cr3", ""]
    rows = []
    for item in answer["buffers"]:
        registers, control = item["registers"] or {}, item["control"] or {}
        style = {"saved": "", "empty": "dim"}.get(item["state"], "unknown")
        rows.append(
            [_cell(item["cpu"], "strong"), _cell(item["address"]), _cell(item["state"], style),
             _cell(item["at"] and item["at"]["symbol"]), _cell(registers.get("rsp")), _cell(control.get("cr3")),
             Cell(item["says"], style)]
        )  # fmt: skip
    blocks: list[Block] = [Table("Crash notes in Xen's memory", columns, rows)]
    lines = [("Xen", text) for text in info_note_lines(answer["info"])]
    lines += [("in the file", text) for text in note_lines(answer["file"])]
    return [*blocks, Lines([[Cell(f"{name:13}", "dim"), Cell(text)] for name, text in lines])]


def vtop(answer: Json) -> Sequence[Block]:
    rows = [[Cell(entry["level"]), Cell(entry["address"]), Cell(entry["value"])] for entry in answer["entries"]]
    size = answer["page_size"]
    unit = f"{size >> 30} GiB" if size >> 30 else f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
    where = f"{answer['address']} ({answer['symbol']})" if answer["symbol"] != answer["address"] else answer["address"]
    return [
        Table(f"{where}, from the root at {answer['root']}", ["level", "entry at", "entry"], rows),
        Lines([[Cell("physical ", "dim"), Cell(answer["physical"], "strong"), Cell(f", in a page of {unit}")]]),
    ]


def status(answer: Json) -> Sequence[Block]:
    crashing = answer["crashing_cpu"]
    lines = [
        ("stage", f"{answer['stage']}: {answer['says']}"
         + ("" if answer["subject"] is None else f" (CPU {answer['subject']})")),
        ("generation", answer["generation"]),
        ("crashing CPU", "none" if crashing is None else f"{crashing} ({'; '.join(answer['crashing_cpu_by'])})"),
        ("crash kernel", {True: "loaded", False: "NOT loaded", None: "not known"}[answer["crash_kernel_loaded"]]),
    ]  # fmt: skip
    for name, title in (("online", "online"), ("saved", "notes saved"), ("waiting_mask", "waited for"),
                        ("waiting_count", "waited for")):  # fmt: skip
        if answer[name] is not None:
            lines.append((title, show(answer[name])))
    text = Lines([[Cell(f"{name:14}", "dim"), Cell(value)] for name, value in lines])
    return [text, cpus_table({"cpus": answer["cpus"], "stages": [{"stage": answer["stage"]}]})]
