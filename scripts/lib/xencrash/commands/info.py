"""Show what a target is and what is known about it, without judging it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.engine import new_report
from xen_symbols.crashpath.identification import identify
from xen_symbols.crashpath.missing import missing
from xen_symbols.crashpath.position import infer
from xen_symbols.crashpath.stages import CRASHING
from xen_symbols.describe.machine import describe_symbols, describe_target, with_warnings
from xen_symbols.describe.notes import describe_crash_notes, describe_notes
from xen_symbols.report.blocks import Block, Cell, Lines, target_line
from xen_symbols.report.console import print_blocks
from xen_symbols.report.crashpath import crash_path, near_line
from xen_symbols.report.model import SCHEMA_VERSION, ExitStatus, Report
from xen_symbols.report.notelines import buffer_lines, info_note_lines, missing_lines, note_lines
from xen_symbols.symbols.functions import names_no_variables
from xen_symbols.symbols.load import load_symbols
from xen_symbols.targets import PhysicalCpu
from xen_symbols.targets.dump import open_dump
from xen_symbols.text import cpu_list
from xen_symbols.xen.images import carried_symbols
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import State, read_state
from xencrash import live
from xencrash.errors import complain
from xencrash.judging import searching, undecided
from xencrash.options import ANY_TARGET, Request, add_given, add_output, add_target, request
from xencrash.output import begin, to

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


EPILOG = f"""\
{ANY_TARGET}

exit status:
  0  everything could be determined
  2  bad usage
  3  something could not be determined (the reason is on standard error)
"""


def add_options(parser: ArgumentParser) -> None:
    add_target(parser)
    add_given(parser)
    add_output(parser, "table", "json")


def run(args: Namespace) -> int:
    """What can be determined is said even where the rest cannot be; then the status is 3."""
    asked = request(args)
    begin(args.output, asked.target, asked.symbols)
    data = describe(asked)
    if data.get("stage") == CRASHING.id and "undecided" not in data:
        data["undecided"] = (
            f"{asked.target}: Xen is {CRASHING.says}, or stuck there: how far it got cannot be determined"
        )
    if args.format == "json":
        to(args.output, lambda stream: print(json.dumps(data, indent=2), file=stream))
    else:
        to(args.output, lambda stream: print_blocks(blocks(data), stream))
    if data.get("undecided"):
        complain(data["undecided"])
        return ExitStatus.UNDECIDED
    return ExitStatus.PASSED


def describe(asked: Request) -> Json:
    """What a target is; of one that cannot be opened why not."""
    try:
        return live.describe(asked) if asked.live else describe_dump(asked)
    except (Undecidable, Unreadable) as error:
        return {"schema": SCHEMA_VERSION, "target": undecided(asked, "").target, "undecided": str(error)}


def describe_dump(asked: Request) -> Json:
    """What a dump is, as far as it can be determined, and else why not. Raises Undecidable for what is not a dump."""
    target = open_dump(asked.target, base=asked.base, maps=asked.maps)
    data: Json = {
        "schema": SCHEMA_VERSION,
        "target": {"kind": target.kind, "format": target.format, "location": target.location},
        "memory": [],
        "notes": describe_notes(target.notes()),
        "registers": [_registers(None, cpu) for cpu in target.cpus()],
    }
    data["target"] = with_warnings(data["target"], [target.truncated] if target.truncated else [])
    try:
        try:
            if asked.symbols is None:
                table = carried_symbols(target, searching(asked.target))
            else:
                table = load_symbols(asked.symbols)
            memory = locate(target, table, asked.given)
            table = memory.symbols
        finally:  # what is where in a raw image is known when Xen is found
            data["memory"] = [[hex(start), hex(end)] for start, end in target.physical_ranges()]
            data["target"]["format"] = target.format
        data["target"] = describe_target(memory)
        data["symbols"] = describe_symbols(memory)
        if table.text_only:
            raise Undecidable(names_no_variables(table))
        data["missing"] = [row.to_json() for row in missing(table, None)]
        try:
            identification = identify(memory)
            data["missing"] = [row.to_json() for row in missing(table, identification.generation)]
            data |= described_generation(new_report(memory, identification))
        finally:  # whose registers are whose does not depend on it
            state = read_state(memory)
            data |= _saved(memory, state)
            data["target"] = with_warnings(data["target"], state.warnings)
        position = infer(state, identification.generation)
        data["stage"] = position.stage.id
        data["crashing_cpu"] = position.crashing_cpu
        data["online_at_crash"] = sorted(position.online)
    except (Undecidable, Unreadable) as error:
        data.setdefault("undecided", str(error))
    return data


def described_generation(report: Report) -> Json:
    """The generation of the crash path; where none fits, why not and which are nearest."""
    if report.generation is not None:
        return {"generation": report.generation}
    return {"nearest": report.nearest, "undecided": report.undecided}


def _saved(memory: XenMemory, state: State) -> Json:
    """Whose registers are in the dump, and the crash notes in the file and in Xen's memory."""
    known = [(cpu.cpu, cpu.physical) for cpu in state.cpus.values() if cpu.exists]
    described = describe_crash_notes(memory, state)
    return {
        "registers": [
            *(_registers(number, cpu) for number, cpu in known),
            *(_registers(None, cpu) for cpu in state.unmatched),
        ],
        "notes": described["file"],
        "crash_notes": {name: described[name] for name in ("buffers", "info")},
    }


def _registers(number: int | None, cpu: PhysicalCpu | Absent) -> Json:
    """`cpu` is Xen's number, null where it is not known; `index` the target's own, of a CPU or a pair of notes."""
    if isinstance(cpu, Absent):
        return {"cpu": number, "index": None, "source": cpu.reason, "registers": {}}
    registers = {name: hex(value) for name, value in cpu.registers.items()}
    return {"cpu": number, "index": cpu.index, "source": cpu.source, "registers": registers}


def blocks(data: Json) -> list[Block]:
    def line(name: str, text: object) -> list[Cell]:
        return [Cell(f"{name:13}", "dim"), Cell(str(text))]

    target, symbols, generation = data["target"], data.get("symbols"), data.get("generation")
    lines = [line("target", target_line(target))]
    lines += [line("warning", text) for text in target.get("warnings", [])]
    if "undecided" in data and not {"memory", "symbols"} & data.keys():  # it could not be opened
        return [Lines(lines)]
    memory = data.get("memory", [])
    shown = ", ".join(f"{start}-{end}" for start, end in memory[:4]) + (
        f" and {len(memory) - 4} more" * (len(memory) > 4)
    )
    lines.append(line("memory", shown or "not listed"))
    lines += [line("note", text) for text in note_lines(data.get("notes", []))]
    for cpu in data.get("registers", []):
        where = ", ".join(
            f"{name} {cpu['registers'][name]}" for name in ("rip", "rsp", "cr3") if name in cpu["registers"]
        )
        number = f"number {cpu['index']} in the file" if cpu["cpu"] is None else cpu["cpu"]
        lines.append(line("CPU", f"{number}: {where or 'no registers'} ({cpu['source']})"))
    if symbols:
        lines.append(line("Xen", f"at physical {target['xen_phys_start']}, found by {target['found_by']}"))
        lines.append(line("symbols", f"{symbols['path']} ({symbols['source']})"))
        lines += [line("alias", f"{name} is {actual}, as given") for name, actual in symbols.get("aliases", {}).items()]
        in_memory = symbols["target_build_id"] or "not found"
        lines.append(line("build-id", f"{symbols['build_id'] or 'none'}, in memory {in_memory}"))
    lines += [line("missing", text) for text in missing_lines(data.get("missing", []))]
    if "crash_notes" in data:
        lines += [line("crash notes", text) for text in buffer_lines(data["crash_notes"]["buffers"])]
        lines += [line("crash info", text) for text in info_note_lines(data["crash_notes"]["info"])]
    lines += [line("crash path", near_line(near)) for near in data.get("nearest", [])]
    if generation:
        lines.append(line("crash path", crash_path(generation)))
        lines += [line("", f"evidence: {evidence}") for evidence in generation["evidence"]]
    if "stage" in data:
        crashed = "nobody" if data["crashing_cpu"] is None else f"CPU {data['crashing_cpu']}"
        when = "now" if data["crashing_cpu"] is None else "then"
        online = cpu_list(data["online_at_crash"])
        lines.append(line("stage", f"{data['stage']}; crashed: {crashed}; online {when}: {online}"))
    return [Lines(lines)]
