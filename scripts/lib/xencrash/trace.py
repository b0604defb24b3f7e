"""Following a crash live from outside gdb: what `xencrash trace` and the lab do.

gdb sets the breakpoints and lets the machine run; the plugin, asked once at each stop, reads and judges, and says where
to break next and how long to wait. A report comes out of every trace that could begin, whatever happens to the guest,
to QEMU or to gdb on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.follow import STALL_SECONDS
from xen_symbols.report.model import Verdict, verdict_of
from xen_symbols.xen.given import NOTHING_GIVEN, Given
from xencrash.gdbmi import GdbSession, open_session

if TYPE_CHECKING:
    from xen_symbols.report import contract

Progress = Callable[["contract.Stage", "Sequence[contract.Finding]"], None]


def _quiet(stage: contract.Stage, findings: Sequence[contract.Finding]) -> None:
    pass


def _silent(text: str) -> None:
    pass


def _unreported(report: contract.Report) -> None:
    pass


def trace(
    target: str,
    symbols: str | None = None,
    qmp: str | None = None,
    given: Given = NOTHING_GIVEN,
    *,
    timeout: float | None = None,
    stall: float = STALL_SECONDS,
    progress: Progress = _quiet,
    notice: Callable[[str], None] = _silent,
    trigger: Callable[[], None] | None = None,
    on_stop: Callable[[GdbSession], None] | None = None,
    leave_stopped: bool = False,
    gates: bool = False,
    interrupted: Callable[[contract.Report], None] = _unreported,
    gdb: str | None = None,
) -> contract.Report:
    """Follow the crash of a machine, with a gdb for this alone; `gdb` is the program to use (None: `find_gdb`).

    The rest is as for `follow`. What prevents its beginning is raised as Undecidable.
    """
    with open_session(target, symbols, qmp, given, gdb=gdb, notice=notice) as session:
        return follow(
            session, timeout=timeout, stall=stall, progress=progress, notice=notice, trigger=trigger, on_stop=on_stop,
            leave_stopped=leave_stopped, gates=gates, interrupted=interrupted,
        )  # fmt: skip


def follow(
    session: GdbSession,
    *,
    timeout: float | None = None,
    stall: float = STALL_SECONDS,
    progress: Progress = _quiet,
    notice: Callable[[str], None] = _silent,
    trigger: Callable[[], None] | None = None,
    on_stop: Callable[[GdbSession], None] | None = None,
    leave_stopped: bool = False,
    gates: bool = False,
    interrupted: Callable[[contract.Report], None] = _unreported,
) -> contract.Report:
    """Wait for Xen to crash, judge every stage of its crash path, let it run on, and return the JSON report.

    The session is attached to the machine, and no longer after a trace that was not lost. `timeout` bounds the wait for
    the crash to begin (None: forever), `stall` the time between two stages, in seconds. `trigger` is called once the
    machine runs with the breakpoints set; `on_stop` at each stop, before it is judged; `progress` after it, with the
    stage as the report has it and its findings, the machine still stopped. `notice` is given, before the machine runs,
    what will end the trace early and what will not be seen, and why. `leave_stopped` ends at the handover and leaves
    the machine there; `gates` lists every change of a gate in the report. What ends a trace early stands in the report
    as `undecided`; what prevents its beginning is raised as Undecidable. `interrupted` is given the report so far on
    Ctrl-C, which is raised on.
    """
    report: contract.Report | None = None
    try:
        options = ["--stall", str(stall), *(["gates"] if gates else []), *(["stay"] if leave_stopped else [])]
        if timeout is not None:
            options += ["--timeout", str(timeout)]
        begin = session.xen("crash-trace-begin", *options)
        report = begin["report"]
        for early in begin["early"]:
            notice(early)
        if begin["unseen"]:
            notice(begin["unseen"])
        if "writers_absent" in report:
            notice(f"writers not seen: {report['writers_absent']}")
        for stage in report["stages"]:
            progress(stage, report["findings"])
        if "undecided" in report:
            return report
        session.set_breakpoints(int(address, 16) for address in begin["breakpoints"])
        session.run()
        if trigger is not None:
            trigger()
        _to_the_end(session, report, begin["wait"], progress, on_stop)
        end = session.xen("crash-trace-end")
        report["verdict"] = end["verdict"]
        if end["undecided"]:
            report["undecided"] = end["undecided"]
        session.leave(running=False if leave_stopped else None)
    except Undecidable as error:
        if report is None:
            raise
        _give_up(report, str(error))
    except KeyboardInterrupt:
        if report is not None:
            _give_up(report, "interrupted before the crash path came to its end")
            interrupted(report)
        raise
    return report


def _give_up(report: contract.Report, why: str) -> None:
    if [stage["stage"] for stage in report["stages"]][-1:] == ["handover"]:
        why += "; this was after the handover: whether the other CPUs came to rest was not seen"
    report["undecided"] = why
    found = (Verdict.of(finding["verdict"]) for finding in report["findings"])
    report["verdict"] = verdict_of(found, why).word


def _to_the_end(
    session: GdbSession,
    report: contract.Report,
    wait: float | None,
    progress: Progress,
    on_stop: Callable[[GdbSession], None] | None,
) -> None:
    """Collect each stage in `report` until the trace is finished. Raises Undecidable when it is lost."""
    while True:
        stopped = session.wait_stop(wait)
        if stopped is None:
            session.interrupt()
            step = session.xen("crash-trace-stop", "expired")
        elif stopped.signal is not None:
            step = session.xen("crash-trace-stop", "--signal", stopped.signal)
        else:
            if on_stop is not None:
                on_stop(session)
            step = session.xen("crash-trace-stop")
        report["findings"] += step["findings"]
        if step["stage"] is not None:
            stage: contract.Stage = {"stage": step["stage"], "cpu": step["cpu"], "at": step["at"]}
            report["stages"].append(stage)
            if "gate_changes" in report:
                report["gate_changes"] += step["gate_changes"]
            report["cpus"], report["crashing_cpu"] = step["cpus"], step["crashing_cpu"]
            progress(stage, step["findings"])
        if step["undecided"]:
            raise Undecidable(step["undecided"])
        if step["finished"]:
            return
        wait = step["wait"]
        session.set_breakpoints(int(address, 16) for address in step["breakpoints"])
        session.run()
