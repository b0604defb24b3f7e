"""Following a crash live from outside gdb: what `xencrash trace` and the lab do.

gdb sets the breakpoints and lets the machine run; the plugin, asked once at each stop, reads and judges. A report
comes out of every trace that could begin, whatever happens to the guest, to QEMU or to gdb on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.follow import STALL_SECONDS, no_crash
from xen_symbols.report.model import Verdict
from xencrash.gdbmi import GdbSession, open_session

Json = dict[str, Any]
Progress = Callable[[Json, Sequence[Json]], None]


def _quiet(stage: Json, findings: Sequence[Json]) -> None:
    pass


def trace(
    target: str,
    symbols: str | None = None,
    qmp: str | None = None,
    *,
    timeout: float | None = None,
    stall: float = STALL_SECONDS,
    progress: Progress = _quiet,
    trigger: Callable[[], None] | None = None,
    on_stop: Callable[[GdbSession], None] | None = None,
    leave_stopped: bool = False,
    allow_mismatch: bool = False,
    gates: bool = False,
    gdb: str | None = None,
) -> Json:
    """Wait for Xen to crash, judge every stage of its crash path, let it run on, and return the JSON report.

    `timeout` bounds the wait for the crash to begin (None: for ever), `stall` the time between two stages, in seconds.
    `trigger` is called once the machine runs with the breakpoints set; `on_stop` at each stop, before it is judged;
    `progress` after it, with the stage as the report has it and its findings, the machine still stopped.
    `leave_stopped` leaves it at the last stage; `gates` lists every change of a gate in the report; `gdb` is the
    program to use (None: `find_gdb`). What ends a trace early stands in the report as
    `undecided`; what prevents its beginning is raised as Undecidable.
    """
    report: Json | None = None
    try:
        with open_session(target, symbols, qmp, allow_mismatch=allow_mismatch, gdb=gdb) as session:
            begin = session.xen("crash-trace-begin", *(["gates"] if gates else []))
            report = begin["report"]
            for anchor in begin["anchors"]:
                session.break_at(int(anchor["address"], 16))
            for stage in report["stages"]:
                progress(stage, report["findings"])
            session.run()
            if trigger is not None:
                trigger()
            stalled = _follow(session, report, timeout, stall, progress, on_stop, begin["crash_kernel_loaded"])
            end = session.xen("crash-trace-end", *([stalled] if stalled else []))
            report["findings"] += end["findings"]
            report["verdict"] = end["verdict"]
            session.leave(running=False if leave_stopped else None)
    except Undecidable as error:
        if report is None:
            raise
        report["undecided"] = str(error)
        report["verdict"] = _verdict(report)
    return report


def _follow(
    session: GdbSession,
    report: Json,
    timeout: float | None,
    stall: float,
    progress: Progress,
    on_stop: Callable[[GdbSession], None] | None,
    crash_kernel_loaded: bool | None,
) -> str | None:
    """Collect each stage in `report` until the path's end. Returns why it did not come to it, once it had begun.

    Raises Undecidable when the trace is lost.
    """
    begun = bool(report["stages"]) and report["stages"][-1]["stage"] != "normal"
    since = time.monotonic()  # the last stage: stops that are none do not count as going on
    while True:
        patience = stall if begun else timeout
        stopped = session.wait_stop(None if patience is None else since + patience - time.monotonic())
        if stopped is None:
            session.interrupt()
            if begun:
                return f"nothing more was reached in {stall:.0f} s"
            raise Undecidable(no_crash(timeout or 0.0, crash_kernel_loaded))
        if stopped.signal is not None:
            raise Undecidable(f"the machine was stopped by something else ({stopped.signal}) while it was followed")
        if on_stop is not None:
            on_stop(session)
        step = session.xen("crash-trace-stop")
        begun = step["begun"]
        if step["stage"] is not None:
            stage = {name: step[name] for name in ("stage", "cpu", "at")}
            report["stages"].append(stage)
            report["findings"] += step["findings"]
            if "gate_changes" in report:
                report["gate_changes"] += step["gate_changes"]
            report["cpus"], report["crashing_cpu"] = step["cpus"], step["crashing_cpu"]
            progress(stage, step["findings"])
            since = time.monotonic()
        if step["undecided"]:
            raise Undecidable(step["undecided"])
        if step["finished"]:
            return None
        session.run()


def _verdict(report: Json) -> str:
    """The verdict of a report that is not the engine's last word: what was found, and not less than unknown."""
    found = (Verdict[finding["verdict"].upper()] for finding in report["findings"])
    return str(max(Verdict.UNKNOWN, *found))
