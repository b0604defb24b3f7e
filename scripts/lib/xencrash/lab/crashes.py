"""Crashes of real Xen, one machine each, and their outcomes, for `lab matrix` and `lab repeat`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xen_symbols.absence import Undecidable
from xen_symbols.report.blocks import why_not_pass
from xen_symbols.report.model import Verdict
from xencrash.lab import judged
from xencrash.lab.cells import CPUS, Cell
from xencrash.lab.crash import Crash
from xencrash.lab.errors import LabError, PackageGone
from xencrash.lab.gdbs import gdb_words
from xencrash.lab.images import domu_images, own_images, qemu_words, xen_images
from xencrash.lab.machine import Machine
from xencrash.lab.outcomes import words
from xencrash.lab.packages import Cache
from xencrash.lab.rows import GDBS, QEMUS, XENS
from xencrash.lab.specification import Specification

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json



def crash(cell: Cell, output: Path, fresh: bool = False) -> Json:
    """Start a machine, crash it, judge every stage and the vmcore. Returns the cell and its outcome.

    `verdict` is the worst of the two reports; `unknown` if Xen did not crash, or not in the way that was asked
    for; `skip` if something that the cell needs could not be fetched (`gone`: its source no longer has it). `reason`
    is why it is not `pass`. Reports and logs stay in `output`; so does a vmcore that did not pass.
    """
    begun = time.monotonic()
    reports: list[contract.Report] = []
    problems: list[tuple[Verdict, str]] = []
    gone = False
    try:
        gdb = _get(cell)
    except LabError as error:
        problems.append((Verdict.SKIP, str(error)))
        gone = isinstance(error, PackageGone)
    else:
        try:
            for report in _reports(cell, gdb, output, fresh):
                reports.append(report)
        except Undecidable as error:
            problems.append((Verdict.UNKNOWN, str(error)))
        except OSError as error:  # a full disk under /tmp, where the machine's own files are
            problems.append((Verdict.UNKNOWN, f"{error.filename or output}: {error.strerror or error}"))
    verdict, reason = max([*map(_judged, reports), *_unlike(cell, reports), *problems], key=lambda problem: problem[0])
    if verdict is Verdict.PASS:
        (output / "vmcore").unlink()
    return _outcome(cell, verdict, reason, time.monotonic() - begun, reports, gone)


def _outcome(
    cell: Cell,
    verdict: Verdict,
    reason: str,
    seconds: float = 0.0,
    reports: Sequence[contract.Report] = (),
    gone: bool = False,
) -> Json:
    return {
        **asdict(cell),
        "verdict": str(verdict),
        "reason": reason,
        "gone": gone,
        "seconds": round(seconds, 1),
        "generation": " and ".join(judged.generations(reports)) or None,
        "crashing_cpu": reports[0]["crashing_cpu"] if reports else None,
        "lapic_modes": judged.lapic_modes(reports),
    }


def _get(cell: Cell) -> str:
    """Fill the cache with what the cell needs, and return its gdb. Raises LabError."""
    cache = Cache()
    if own := cell.own:
        own.check(crash_kernel=True)
        own_images(cache, own)
    else:
        (domu_images if cell.domu else xen_images)(cache, XENS[cell.xen])
    qemu_words(cache, QEMUS[cell.qemu])
    return gdb_words(cache, GDBS[cell.gdb])[0]


def _reports(cell: Cell, gdb: str, output: Path, fresh: bool) -> Iterator[contract.Report]:
    """The trace's report, and the vmcore's. Raises Undecidable."""
    judged.folder(output)
    with judged.machine(output, _specification(cell), fresh=fresh) as lab:
        lab.dom0.load(cell.load)
        lab.prepare(cell.how, cell.cpu)
        report = judged.follow(lab, output, lambda: _crash_later(lab, cell), gdb=gdb)
        yield report
        if judged.was_followed(report):
            yield judged.check_vmcore(lab, output)


def _specification(cell: Cell) -> Specification:
    return Specification(
        xen=None if cell.image else cell.xen,
        xen_image=cell.own,
        qemu=cell.qemu,
        accel=cell.accel,
        lapic=cell.lapic,
        cpus=CPUS,
        dom0_vcpus=CPUS,
        domu_vcpus=CPUS * cell.domu,
        crash=Crash(cell.how, cell.cpu),
    )


def _crash_later(lab: Machine, cell: Cell) -> None:
    lab.require_busy()
    time.sleep(cell.delay)
    lab.crash(cell.how, cell.cpu)


def _judged(report: contract.Report) -> tuple[Verdict, str]:
    return Verdict.of(report["verdict"]), why_not_pass(report)


def _unlike(cell: Cell, reports: Sequence[contract.Report]) -> Iterator[tuple[Verdict, str]]:
    for reason in judged.unlike(reports, cell.generation, cell.lapic, cell.cpu):
        yield Verdict.UNKNOWN, reason


# Several of them


def crash_all(cells: Sequence[Cell], output: Path, jobs: int = 1, fresh: bool = False) -> list[Json]:
    """The outcome of each cell, in their order; a line for each on standard error as it ends.

    Each has its own process: a machine ends with the process that started it, and so does what a killed cell
    leaves. `output` gets a folder for each.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(cells)
    running: dict[Connection, tuple[Cell, Any]] = {}
    outcomes: dict[Cell, Json] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(cell, output / cell.name, fresh, theirs))
                process.start()
                theirs.close()
                running[ours] = cell, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                cell, process = running.pop(ready)
                outcomes[cell] = _received(ready, cell)
                process.join()
                _tell(outcomes[cell], len(outcomes), len(cells))
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    return [outcomes[cell] for cell in cells]


def _work(cell: Cell, output: Path, fresh: bool, outcome: Connection) -> None:
    """In a separate process, which ends, with its machine, when asked to or when its parent is gone."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent to act on
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=end_with_parent, daemon=True).start()
    outcome.send(crash(cell, output, fresh))


def _received(connection: Connection, cell: Cell) -> Json:
    try:
        outcome: Json = connection.recv()
    except EOFError:
        return _outcome(cell, Verdict.UNKNOWN, "its process ended without a result")
    return outcome


def _tell(outcome: Json, done: int, of: int) -> None:
    what = ", ".join(filter(None, words(outcome)[:5]))
    print(f"[{done:2}/{of}] {outcome['verdict']:7} {outcome['seconds']:5.1f} s  {what}", file=sys.stderr, flush=True)
    if outcome["reason"]:
        print(f"        {outcome['reason']}", file=sys.stderr, flush=True)
