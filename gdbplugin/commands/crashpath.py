"""Where on its crash path Xen is, and whether its state is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdbplugin.declare import Command, Session, plain
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.crashpath.position import crashing_cpu, infer
from xen_symbols.crashpath.preflight import preflight
from xen_symbols.describe.machine import describe_cpus
from xen_symbols.report.blocks import Block, Cell, Lines, cpus_table, report_blocks, show
from xen_symbols.report.crashpath import crash_path
from xen_symbols.text import cpu_list
from xen_symbols.xen.kexec import is_crash_image_loaded
from xen_symbols.xen.state import read_state

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json


def _status(session: Session) -> Json:
    with session.look() as memory:
        identification = session.identification(memory)
        generation = identification.generation
        state = read_state(memory, notes=False)
        position = infer(state, generation)
        context = Context(memory, state, position, generation)
        out: Json = {
            "generation": generation and generation.id,
            "introduced": generation and generation.introduced,
            "releases": generation and generation.releases,
            "stage": position.stage.id,
            "says": position.stage.says,
            "subject": position.subject,
            "crashing_cpu": position.crashing_cpu,
            "crashing_cpu_by": [] if position.crashing_cpu is None else list(crashing_cpu(state, generation)[1]),
            "crash_kernel_loaded": is_crash_image_loaded(state),
            "online_at_crash": sorted(position.online),
        }
        for name in ("online", "saved", "waiting_mask", "waiting_count", "kexecing"):
            value = state.system[name].value
            out[name] = sorted(value) if isinstance(value, frozenset) else plain(value)
        if generation is None:
            out["absent"] = identification.reason
        out["cpus"] = describe_cpus(context.state, context.cpus, position.crashing_cpu, position.online)
        return out


def _show_status(answer: Json) -> Sequence[Block]:
    crashing = answer["crashing_cpu"]
    lines = [
        ("stage", f"{answer['stage']}: {answer['says']}"
         + ("" if answer["subject"] is None else f" (CPU {answer['subject']})")),
        ("crash path", answer.get("absent") or crash_path(answer)),
        ("crashing CPU", "none" if crashing is None else f"{crashing} ({'; '.join(answer['crashing_cpu_by'])})"),
        ("crash kernel", {True: "loaded", False: "NOT loaded", None: "not known"}[answer["crash_kernel_loaded"]]),
    ]  # fmt: skip
    for name, title in (("online", "online"), ("saved", "notes saved"), ("waiting_mask", "waited for"),
                        ("waiting_count", "waited for")):  # fmt: skip
        if (value := answer[name]) is not None:
            lines.append((title, cpu_list(value) if isinstance(value, list) else show(value)))
    text = Lines([[Cell(f"{name:14}", "dim"), Cell(value)] for name, value in lines])
    return [text, cpus_table(answer["cpus"], answer["stage"])]


def _check(session: Session) -> contract.Report:
    with session.look() as memory:
        session.report = evaluate(memory, session.identification(memory)).to_json()
    return session.report


def _preflight(session: Session) -> contract.Report:
    with session.look() as memory:
        try:
            identification = session.identification(memory)
        except Undecidable:
            identification = None  # a Xen without kexec has no crash path
        session.report = preflight(memory, identification).to_json()
    return session.report


def _report(session: Session) -> contract.Report:
    if session.report is None:
        raise Undecidable("there is no report yet: xen crash check makes one, and so does xen crash trace")
    return session.report


COMMANDS = (
    Command(
        ("preflight",), "Judge whether a crash would work, of a Xen that runs.",
        "Kexec built in, a crash kernel loaded and its memory, CPUs, local APICs, what an NMI does, and the gates as\n"
        "they should be in normal running.",
        (), _preflight, report_blocks,
    ),
    Command(
        ("crash", "status"), "Show where on its crash path Xen is, without judging it.",
        "The stage, the crashing CPU and the evidence for it, whom it waits for, and each CPU's gates.",
        (), _status, _show_status,
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
