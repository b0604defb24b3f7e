"""Following a crash: `xen crash trace`, and the steps by which a driver outside does the same over MI.

The driver's part is breakpoints and letting the machine run; the steps read the machine and judge it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbplugin.declare import Argument, Command, Say, Session, Step
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.follow import STALL_SECONDS, Follower, StopResult
from xen_symbols.report.blocks import Cell, Lines, report_blocks, stage_line

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json


def _begin(
    session: Session,
    *,
    gates: bool = False,
    stay: bool = False,
    timeout: float | None = None,
    stall: float = STALL_SECONDS,
) -> Json:
    """Judge the state before the crash.

    {"breakpoints": addresses, "wait": seconds or null, "crash_kernel_loaded": or null, "early": what will end the trace
    before its end, "unseen": which stages cannot be seen and why, or null, "report": the report so far}; with
    `undecided` in the report nothing can be followed.
    """
    session.end_watching()
    with session.look() as memory:
        if memory.target.kind != "live":
            raise Undecidable(f"{memory.target.location} is a dump, which does not run: judge it with xen crash check")
        follower = Follower(
            memory, session.identification(memory), gates=gates, stay=stay, timeout=timeout, stall=stall,
            settable=session.settable,
        )  # fmt: skip
    session.follower = follower
    if gates:
        follower.report.writers_absent = session.watch(follower.gate_addresses, follower.writes.caught)
    return {
        **_next(follower),
        "crash_kernel_loaded": follower.crash_kernel_loaded,
        "early": follower.early,
        "unseen": follower.unseen,
        "report": follower.report.to_json(),
    }


def _next(follower: Follower) -> Json:
    return {"breakpoints": [hex(address) for address in follower.breakpoints], "wait": follower.wait()}


def _stop(session: Session, *, expired: bool = False, signal: str | None = None) -> Json:
    """Judge the stop at which the machine is.

    {"stage", "cpu", "at", "findings", "gate_changes", "cpus", "crashing_cpu", "finished", "undecided", "breakpoints",
    "wait"}: the stage is null for a stop that is not one of the crash path; `findings` and `gate_changes` are those
    of this stop alone; `undecided` says why the trace is over before its time.
    """
    follower = _follower(session)
    report = follower.report
    stages, findings, changes = len(report.stages), len(report.findings), len(report.gate_changes or ())
    finished = False
    try:
        finished = _step(session, follower, expired, signal).finished
    except Undecidable as error:
        report.undecided = str(error)
    seen = report.stages[-1].to_json() if len(report.stages) > stages else {"stage": None, "cpu": None, "at": None}
    return {
        **seen,
        "findings": [finding.to_json() for finding in report.findings[findings:]],
        "gate_changes": (report.gate_changes or [])[changes:],
        "cpus": list(report.cpus),
        "crashing_cpu": report.crashing_cpu,
        "finished": finished,
        "undecided": report.undecided,
        **_next(follower),
    }


def _step(session: Session, follower: Follower, expired: bool, signal: str | None) -> StopResult:
    with session.look_again(follower.memory):
        return follower.stop(*session.selected(), expired=expired, signal=signal)


def _end(session: Session) -> Json:
    """End the trace. {"verdict": of the whole, "undecided": why it is not decided, or null}; -xen-crash-report has the
    whole report."""
    session.end_watching()
    report = _follower(session).end().to_json()
    session.report, session.follower = report, None
    return {"verdict": report["verdict"], "undecided": report.get("undecided")}


def _follower(session: Session) -> Follower:
    if session.follower is None:
        raise Undecidable("no trace has begun")
    return session.follower


def _trace(session: Session, *, say: Say, timeout: float | None = None) -> contract.Report:
    """The command. Raises Undecidable when the crash cannot be followed."""
    step = _begin(session, timeout=timeout)
    follower = _follower(session)
    for notice in [*step["early"], *filter(None, [step["unseen"]])]:
        say([Lines([[Cell(notice, "unknown")]])])
    if follower.report.undecided is None:
        try:
            _follow(session, step, say)
        except Undecidable as error:
            follower.report.undecided = str(error)
    _end(session)
    assert session.report is not None
    return session.report


def _follow(session: Session, step: Json, say: Say) -> None:
    say([Lines([[Cell("waiting for Xen to crash", "dim")]])])
    with session.breakpoints() as set_breakpoints:
        while True:
            set_breakpoints([int(address, 16) for address in step["breakpoints"]])
            happened = session.run(step["wait"])
            step = _stop(session, expired=happened.expired)
            if step["stage"] is not None:
                say([stage_line(_follower(session).report.stages[-1].to_json(), step["findings"])])
            if step["finished"] or step["undecided"]:
                return
            if step["stage"] is None and happened.interrupted:
                raise Undecidable("interrupted before the crash path came to its end")


_TIMEOUT = Argument("--timeout SECONDS", "seconds", "how long to wait for a crash; default: no limit", True)

COMMANDS = (
    Command(
        ("crash", "trace"), "Follow a crash of Xen, stage by stage, and judge each stage.",
        "Lets the machine run until Xen crashes, stops it at each stage of the crash path to read every gate\n"
        "and every CPU, prints a line for each stage, and a report at the end, where the machine stays stopped:\n"
        "after the handover, when the crash kernel has run for a moment.\n"
        "Ctrl-C ends the trace. It takes up to four hardware breakpoints, as many as a processor has; where there\n"
        "are fewer it says which stages are not seen.",
        (_TIMEOUT,), _trace, report_blocks,
        (
            Step("begin", _begin, (
                Argument("gates", "flag", "also list every change of a gate, and who made it", True),
                Argument("stay", "flag", "end at the handover, and stay stopped there", True), _TIMEOUT,
                Argument("--stall SECONDS", "seconds", "how long to wait for the next stage", True),
            )),
            Step("stop", _stop, (
                Argument("expired", "flag", "it was stopped because the time to wait was over", True),
                Argument("--signal NAME", "word", "it was stopped by something else", True),
            )),
            Step("end", _end),
        ),
    ),
)  # fmt: skip
