"""Following a crash from gdb: `xen crash trace`, and the steps by which a driver outside does the same over MI.

The driver's part is breakpoints and continuing; the steps here read the machine and judge it, and never let it run
(gdb drops the result of an MI command that does).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import gdb

from gdbplugin.commands import Json
from gdbplugin.session import Session
from gdbplugin.target import cpu_index
from gdbplugin.watch import end_watching, watch
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.follow import STALL_SECONDS, Follower, StopResult, no_crash
from xen_symbols.report.blocks import Block, Cell, Lines, report_blocks, stage_line


def begin(session: Session, gates: str = "") -> Json:
    """Judge the state before the crash. With the argument `gates`, every change of a gate is listed, too,
    with whoever a watchpoint saw write to it.

    {"anchors": [{"address", "name"}], "crash_kernel_loaded": or null, "report": the report so far}.
    """
    if gates not in ("", "gates"):
        raise Undecidable(f"usage: -xen-crash-trace-begin [gates], not {gates!r}")
    end_watching()
    with session.look() as memory:
        if memory.target.kind != "live":
            raise Undecidable(f"{memory.target.location} is a dump, which does not run: judge it with xen crash check")
        session.follower = Follower(memory, session.identification(memory), gates=gates == "gates")
    watch(session.follower.gate_addresses, session.follower.writes.caught)
    return {
        "anchors": [{"address": hex(address), "name": name} for address, name in session.follower.anchors.items()],
        "crash_kernel_loaded": session.follower.crash_kernel_loaded,
        "report": session.follower.report.to_json(),
    }


def stop(session: Session) -> Json:
    """Judge the stop at which the machine is.

    {"stage", "cpu", "at", "findings", "gate_changes", "cpus", "crashing_cpu", "begun", "finished", "undecided"}: the
    stage is null for a stop that is none of the crash path's; `findings` and `gate_changes` are those of this stop
    alone; `undecided` says why the trace is over before its time.
    """
    follower = _follower(session)
    report = follower.report
    stages, findings, changes = len(report.stages), len(report.findings), len(report.gate_changes or ())
    finished, undecided = False, None
    try:
        finished = _step(session, follower).finished
    except Undecidable as error:
        report.undecided = undecided = str(error)
    seen = report.stages[-1].to_json() if len(report.stages) > stages else {"stage": None, "cpu": None, "at": None}
    return {
        **seen,
        "findings": [finding.to_json() for finding in report.findings[findings:]],
        "gate_changes": (report.gate_changes or [])[changes:],
        "cpus": list(report.cpus),
        "crashing_cpu": report.crashing_cpu,
        "begun": follower.begun,
        "finished": finished,
        "undecided": undecided,
    }


def end(session: Session, stalled: str | None = None) -> Json:
    """End the trace; with an argument, it says why the path did not come to its end.

    {"findings": what that adds, "verdict": of the whole}; -xen-crash-report has the whole report.
    """
    end_watching()
    follower = _follower(session)
    added = [] if stalled is None else [follower.stalled(stalled).to_json()]
    session.report, session.follower = follower.report.to_json(), None
    return {"findings": added, "verdict": session.report["verdict"]}


MI_STEPS = {"-xen-crash-trace-begin": begin, "-xen-crash-trace-stop": stop, "-xen-crash-trace-end": end}


def _follower(session: Session) -> Follower:
    if session.follower is None:
        raise Undecidable("no trace has begun")
    return session.follower


def _step(session: Session, follower: Follower) -> StopResult:
    target = session.target()
    if target is not follower.memory.target:
        raise Undecidable("gdb was connected anew while a crash was followed: the trace is lost")
    index, pc = cpu_index(gdb.selected_thread()), gdb.newest_frame().pc()
    with target.batch():
        return follower.stop(index, pc)


# -- inside gdb -------------------------------------------------------------------------------


def parse_timeout(words: Sequence[str]) -> float | None:
    """SECONDS of `--timeout SECONDS`. Raises Undecidable."""
    if not words:
        return None
    try:
        option, value = words
        seconds = float(value)
    except ValueError:
        raise Undecidable("usage: xen crash trace [--timeout SECONDS]") from None
    if option != "--timeout" or not 0 < seconds < threading.TIMEOUT_MAX:
        raise Undecidable("usage: xen crash trace [--timeout SECONDS]")
    return seconds


def run(session: Session, timeout: float | None, say: Callable[[Sequence[Block]], None]) -> None:
    """The command. Raises Undecidable when the crash cannot be followed."""
    first = begin(session)
    follower = _follower(session)
    try:
        with _breakpoints([int(anchor["address"], 16) for anchor in first["anchors"]]):
            say([Lines([[Cell("waiting for Xen to crash", "dim")]])])
            _follow(session, follower, timeout, say)
    except Undecidable as error:
        follower.report.undecided = str(error)
    end(session)
    say(report_blocks(follower.report.to_json()))


def _follow(
    session: Session, follower: Follower, timeout: float | None, say: Callable[[Sequence[Block]], None]
) -> None:
    since = time.monotonic()  # the last stage: stops that are none do not count as going on
    while True:
        patience = STALL_SECONDS if follower.begun else timeout
        expired = let_run(None if patience is None else max(0.0, since + patience - time.monotonic()))
        if gdb.selected_thread() is None:
            raise Undecidable(_GONE)
        step = stop(session)
        if step["stage"] is not None:
            say([stage_line(step, step["findings"])])
            since = time.monotonic()
        if step["finished"] or step["undecided"]:
            return
        if step["stage"] is None and expired and follower.begun:
            follower.stalled(f"nothing more was reached in {STALL_SECONDS:.0f} s")
            return
        if step["stage"] is None and expired:
            raise Undecidable(no_crash(timeout or 0.0, follower.crash_kernel_loaded))
        if step["stage"] is None and _interrupted():
            raise Undecidable("interrupted before the crash path came to its end")


@contextlib.contextmanager
def _breakpoints(addresses: Sequence[int]) -> Iterator[None]:
    """Hardware breakpoints, of which the user sees nothing."""
    made = []
    try:
        for address in addresses:
            point = gdb.Breakpoint(f"*{address:#x}", type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)
            point.silent = True
            made.append(point)
        yield
    finally:
        for point in made:
            if point.is_valid():
                point.delete()


_GONE = "QEMU went away: the guest was reset with -no-reboot, or QEMU ended; see its log"
_stops: list[gdb.StopEvent] = []


def _note_stop(event: gdb.StopEvent) -> None:
    _stops.append(event)


def _interrupted() -> bool:
    return bool(_stops) and isinstance(_stops[-1], gdb.SignalEvent)


def let_run(seconds: float | None) -> bool:
    """Let the machine run until it stops; after `seconds` make it stop. Returns whether that was needed."""
    fired = threading.Event()

    def interrupt() -> None:
        fired.set()
        os.kill(os.getpid(), signal.SIGINT)  # what gdb turns into a stop of the machine

    timer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, interrupt)
    timer.daemon = True
    _stops.clear()
    gdb.events.stop.connect(_note_stop)
    timer.start()
    try:
        gdb.execute("continue", to_string=True)
    except gdb.error as error:
        raise Undecidable(f"{_GONE} ({error})") from None
    finally:
        timer.cancel()
        gdb.events.stop.disconnect(_note_stop)
    return fired.is_set()
