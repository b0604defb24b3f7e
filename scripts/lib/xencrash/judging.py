"""`check`, `info` and `trace`: from a TARGET and its symbols to a report."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath.engine import TOOL, new_report
from xen_symbols.crashpath.generations import identify
from xen_symbols.crashpath.missing import missing
from xen_symbols.crashpath.position import infer
from xen_symbols.crashpath.stages import CRASHING
from xen_symbols.describe.machine import describe_symbols, describe_target
from xen_symbols.describe.notes import describe_crash_notes, describe_notes
from xen_symbols.report.blocks import (
    Block,
    Cell,
    Lines,
    buffer_lines,
    dumps_table,
    info_note_lines,
    missing_lines,
    note_lines,
    stage_line,
)
from xen_symbols.report.console import plain, print_blocks
from xen_symbols.report.jsontext import json_texts
from xen_symbols.report.model import SCHEMA_VERSION, ExitStatus, Report
from xen_symbols.symbols.load import load_symbols
from xen_symbols.targets.dump import open_dump
from xen_symbols.xen.locate import carried_symbols, locate
from xen_symbols.xen.state import read_state
from xencrash.cli import (
    UsageError,
    check_dump,
    complain,
    is_live,
    render,
    searching,
    status_of,
    write,
    write_pieces,
)

Json = dict[str, Any]


def check_live(args: argparse.Namespace) -> Json:
    """The report on a live machine as it is now; it goes on as it was found. Raises Undecidable."""
    from xencrash.gdbmi import open_session

    with open_session(args.target[0], args.symbols, args.qmp, allow_mismatch=args.allow_build_id_mismatch) as session:
        return session.xen("crash-check")


def _live_info(args: argparse.Namespace) -> Json:
    """What a live machine is; it goes on as it was found. Raises Undecidable when there is no Xen to be seen."""
    from xencrash.gdbmi import MiError, open_session

    with open_session(args.target, args.symbols, args.qmp, allow_mismatch=args.allow_build_id_mismatch) as session:
        known = session.xen("symbols")
        data: Json = {"schema": SCHEMA_VERSION} | {name: known[name] for name in ("target", "symbols", "missing")}
        if known["generation"] is None:
            return data | {"undecided": known["absent"]}
        data["generation"] = {name: known["generation"][name] for name in ("id", "introduced", "evidence")}
        try:
            status = session.xen("crash-status")
        except MiError as error:
            return data | {"undecided": str(error)}
    return data | {name: status[name] for name in ("stage", "crashing_cpu", "online_at_crash")}


def trace_live(args: argparse.Namespace) -> Json:
    """Follow a crash, a line for each stage on standard error. Raises Undecidable when it could not begin."""
    from xencrash.trace import trace

    return trace(
        args.target,
        args.symbols,
        args.qmp,
        timeout=args.timeout,
        leave_stopped=args.leave_stopped,
        gates=args.gates,
        allow_mismatch=args.allow_build_id_mismatch,
        progress=tell_stage,
        trigger=_tell_waiting,
    )


def _tell_waiting() -> None:
    print("waiting for Xen to crash; Ctrl-C ends it", file=sys.stderr)


def tell_stage(stage: Json, findings: Sequence[Json]) -> None:
    """A line for one stage, on standard error."""
    print_blocks([stage_line(stage, findings)], sys.stderr)


def check_many(args: argparse.Namespace) -> int:
    """Judge several dumps: a line for each, a report for each with --output DIR, and the worst status."""
    live = [target for target in args.target if is_live(target)]
    if live:
        raise UsageError(f"{live[0]} is a live machine: check it alone")
    if args.output:
        try:
            Path(args.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{args.output}: {error.strerror}; several dumps need a directory") from None
    reports: list[Json] = []
    for path in args.target:
        try:
            reports.append(check_dump(path, args).to_json())
        except Undecidable as error:
            complain(error)
            reports.append(_undecided(path, str(error)))
        except Exception:  # one file's is not the others'
            traceback.print_exc()
            why = f"{path}: an error of its own, above: nothing was decided"
            complain(why)
            reports.append(_undecided(path, why))
    if args.output:
        suffix = {"json": ".json", "junit": ".xml", "table": ".txt"}[args.format]
        for number, (path, report) in enumerate(zip(args.target, reports, strict=True)):
            write(render(report, args.format), str(Path(args.output) / f"{number}-{Path(path).name}{suffix}"))
    if args.output or args.format == "table":
        print_blocks([dumps_table(reports)], sys.stdout)
    elif args.format == "json":
        write_pieces(json_texts(reports), None)
    else:
        from xen_symbols.report.junit import to_junit

        write(to_junit(*reports), None)
    statuses = [status_of(report) for report in reports]
    return next((s for s in (ExitStatus.FAILED, ExitStatus.UNDECIDED) if s in statuses), ExitStatus.PASSED)


def _undecided(path: str, why: str) -> Json:
    nothing = {"path": None, "build_id": None, "match": None}
    target = {"kind": "dump", "format": "unknown", "location": path}
    return Report(TOOL, target, nothing, undecided=why).to_json()


def info(args: argparse.Namespace) -> int:
    """Say what a target is. What can be told is told even where the rest cannot; then the status is 3."""
    data = _live_info(args) if is_live(args.target) else _dump_info(args)
    if data.get("stage") == CRASHING.id:
        data["undecided"] = f"{args.target}: Xen is {CRASHING.says}, or stuck there: how far it came cannot be told"
    if args.format == "json":
        write(json.dumps(data, indent=2) + "\n", args.output)
    elif args.output:
        write(plain(_info_blocks(data)), args.output)
    else:
        print_blocks(_info_blocks(data), sys.stdout)
    if data.get("undecided"):
        complain(data["undecided"])
        return ExitStatus.UNDECIDED
    return ExitStatus.PASSED


def _dump_info(args: argparse.Namespace) -> Json:
    target = open_dump(args.target, base=args.base)
    data: Json = {
        "schema": SCHEMA_VERSION,
        "target": {"kind": target.kind, "format": target.format, "location": target.location},
        "memory": [[hex(start), hex(end)] for start, end in target.physical_ranges()],
        "notes": describe_notes(target.notes()),
        "registers": [
            {"index": cpu.index, "source": cpu.source, "registers": {k: hex(v) for k, v in cpu.registers.items()}}
            for cpu in target.cpus()
        ],
    }
    try:
        table = carried_symbols(target, searching(args.target)) if args.symbols is None else load_symbols(args.symbols)
        memory = locate(target, table, allow_mismatch=args.allow_build_id_mismatch)
        data["target"] = describe_target(memory)
        data["symbols"] = describe_symbols(memory)
        data["missing"] = [row.to_json() for row in missing(table, None)]
        identification = identify(memory)
        data["missing"] = [row.to_json() for row in missing(table, identification.generation)]
        data["generation"] = new_report(memory, identification).generation
        state = read_state(memory)
        described = describe_crash_notes(memory, state)
        data["notes"] = described["file"]
        data["crash_notes"] = {name: described[name] for name in ("buffers", "info")}
        position = infer(state, identification.generation)
        data["stage"] = position.stage.id
        data["crashing_cpu"] = position.crashing_cpu
        data["online_at_crash"] = sorted(position.online)
    except (Undecidable, Unreadable) as error:
        data["undecided"] = str(error)
    return data


def _info_blocks(data: Json) -> list[Block]:
    def line(name: str, text: object) -> list[Cell]:
        return [Cell(f"{name:13}", "dim"), Cell(str(text))]

    target, symbols, generation = data["target"], data.get("symbols"), data.get("generation")
    lines = [line("target", f"{target['location']} ({target['format']})")]
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
        lines.append(line("CPU", f"{cpu['index']}: {where or 'no registers'} ({cpu['source']})"))
    if symbols:
        lines.append(line("Xen", f"at physical {target['xen_phys_start']}, found by {target['found_by']}"))
        lines.append(line("symbols", f"{symbols['path']} ({symbols['source']})"))
        lines.append(line("build-id", f"{symbols['build_id']}, in memory {symbols['target_build_id']}"))
    lines += [line("missing", text) for text in missing_lines(data.get("missing", []))]
    if "crash_notes" in data:
        lines += [line("crash notes", text) for text in buffer_lines(data["crash_notes"]["buffers"])]
        lines += [line("crash info", text) for text in info_note_lines(data["crash_notes"]["info"])]
    if generation:
        lines.append(line("generation", f"{generation['id']} ({generation['introduced']})"))
        lines += [line("", f"evidence: {evidence}") for evidence in generation["evidence"]]
    if "stage" in data:
        crashed = "nobody" if data["crashing_cpu"] is None else f"CPU {data['crashing_cpu']}"
        when = "now" if data["crashing_cpu"] is None else "then"
        lines.append(line("stage", f"{data['stage']}; crashed: {crashed}; online {when}: {data['online_at_crash']}"))
    return [Lines(lines)]
