"""What Xen says about itself: its build, its console, its crash notes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdbplugin.declare import Command, Session, cell
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.engine import evaluate_if_possible, new_report
from xen_symbols.crashpath.identification import Identification
from xen_symbols.crashpath.missing import missing
from xen_symbols.describe.machine import describe_symbols, describe_target
from xen_symbols.describe.notes import describe_crash_notes
from xen_symbols.describe.summary import summarise
from xen_symbols.report.blocks import Block, Cell, Lines, Table
from xen_symbols.report.crashpath import crash_path, near_line
from xen_symbols.report.notelines import info_note_lines, missing_lines, note_lines
from xen_symbols.report.summary import summary_blocks
from xen_symbols.xen.console import printable, read_console
from xen_symbols.xen.state import read_state

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


def _symbols(session: Session) -> Json:
    if not session.connected():
        symbols = session.symbols()
        build_id = symbols.build_id.hex() if symbols.build_id else None
        return {"symbols": {"path": symbols.path, "source": symbols.source, "build_id": build_id}}
    with session.look() as memory:
        out: Json = {"symbols": describe_symbols(memory), "target": describe_target(memory)}
        try:
            found = session.identification(memory)
        except Undecidable as error:  # they name functions only
            found = Identification(None, reason=str(error))
        out["missing"] = [row.to_json() for row in missing(memory.symbols, found.generation)]
        report = new_report(memory, found)
        if report.generation is None:
            return out | {"generation": None, "nearest": report.nearest, "absent": report.undecided}
        return out | {"generation": report.generation}


def _show_symbols(answer: Json) -> Sequence[Block]:
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
            lines += [("", near_line(near)) for near in answer.get("nearest", ())]
        else:
            lines.append(("crash path", crash_path(generation)))
            lines += [("", says) for says in generation["evidence"]]
    return [Lines([[Cell(f"{name:12}", "dim"), Cell(text)] for name, text in lines])]


def _log(session: Session) -> Json:
    with session.look() as memory:
        return {"text": printable(read_console(memory))}


def _show_log(answer: Json) -> Sequence[Block]:
    return [Lines([[Cell(line)] for line in answer["text"].splitlines()])]


def _summary(session: Session) -> Json:
    with session.look() as memory:
        with contextlib.suppress(Undecidable):
            session.identification(memory)  # a generation may be given
        return summarise(memory, evaluate_if_possible(memory).to_json())


def _notes(session: Session) -> Json:
    with session.look() as memory:
        return describe_crash_notes(memory, read_state(memory))


def _show_notes(answer: Json) -> Sequence[Block]:
    columns = ["CPU", "buffer at", "state", "saved in", "rsp", "cr3", ""]
    rows = []
    for item in answer["buffers"]:
        registers, control = item["registers"] or {}, item["control"] or {}
        style = {"saved": "", "empty": "dim"}.get(item["state"], "unknown")
        rows.append(
            [cell(item["cpu"], "strong"), cell(item["address"]), cell(item["state"], style),
             cell(item["at"] and item["at"]["symbol"]), cell(registers.get("rsp")), cell(control.get("cr3")),
             Cell(item["says"], style)]
        )  # fmt: skip
    blocks: list[Block] = [Table("Crash notes in Xen's memory", columns, rows)]
    lines = [("Xen", text) for text in info_note_lines(answer["info"])]
    lines += [("in the file", text) for text in note_lines(answer["file"])]
    return [*blocks, Lines([[Cell(f"{name:13}", "dim"), Cell(text)] for name, text in lines])]


COMMANDS = (
    Command(
        ("symbols",), "Show which symbols are used, whether they match, what they lack, and which crash path Xen has.",
        "Symbols come from set xen symbols, or else from the file that gdb has loaded.", (), _symbols, _show_symbols,
    ),
    Command(
        ("log",), "Show Xen's console ring, from its oldest line.",
        "Control characters are shown as escapes.", (), _log, _show_log,
    ),
    Command(
        ("summary",), "Show a crash on one page, for a bug report.",
        "Which Xen, why it crashed and where, which domain ran, what the other CPUs did, the verdict on the crash\n"
        "path, and what the crash kernel got. Of a guest's memory nothing is read.",
        (), _summary, summary_blocks,
    ),
    Command(
        ("notes",), "Show the crash notes: what each CPU has saved, and what Xen says of itself.",
        "Read from Xen's memory on every target, where they are empty until a crash; on a dump also the notes of the\n"
        "file, and whether they are the same. The registers are those of Xen in kexec_crash_save_cpu, not of what it\n"
        "interrupted: xen bt shows that.",
        (), _notes, _show_notes,
    ),
)  # fmt: skip
