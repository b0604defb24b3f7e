"""Crashes of real Xen, one machine each, and what came of them: what `lab matrix` and `lab repeat` are made of."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from xen_symbols.absence import Undecidable
from xen_symbols.report.model import ExitStatus, Verdict
from xencrash.lab.crash import Crash
from xencrash.lab.errors import LabError, PackageGone
from xencrash.lab.machine import Machine
from xencrash.lab.rows import GDBS, QEMUS, XENS
from xencrash.lab.specification import Specification

Json = dict[str, Any]
CPUS = 4


@dataclass(frozen=True)
class Cell:
    """One crash: the rows of the lab it is made of, and how and when Xen crashes.

    `how` and `cpu` are Crash's. `load` is the number of busy loops in dom0, `domu` whether a domU spins on every
    CPU, `delay` the seconds that Xen runs before it crashes, once all is ready.
    """

    name: str
    xen: str
    qemu: str
    gdb: str
    lapic: str
    how: str = "key"
    cpu: int | None = None
    load: int = 0
    domu: bool = False
    delay: float = 0.0


def crash(cell: Cell, output: Path, fresh: bool = False) -> Json:
    """Start a machine, crash it, judge every stage and the vmcore. Returns the cell and what came of it.

    `verdict` is the worst of the two reports; `unknown` when the crash did not come about, or was not the one that
    was asked for; `skip` when something that the cell needs could not be got (`gone`: its source itself has it no
    more). `reason` is why it is not `pass`. Reports and logs stay in `output`; so does a vmcore that did not pass.
    """
    begun = time.monotonic()
    reports: list[Json] = []
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
    cell: Cell, verdict: Verdict, reason: str, seconds: float = 0.0, reports: Sequence[Json] = (), gone: bool = False
) -> Json:
    from xencrash.lab.run import generations, lapic_modes

    return {
        **asdict(cell),
        "verdict": str(verdict),
        "reason": reason,
        "gone": gone,
        "seconds": round(seconds, 1),
        "generation": " and ".join(generations(reports)) or None,
        "crashing_cpu": reports[0]["crashing_cpu"] if reports else None,
        "lapic_modes": lapic_modes(reports),
    }


def _get(cell: Cell) -> str:
    """Fill the cache with what the cell needs, and return its gdb. Raises LabError."""
    from xencrash.lab.gdbs import gdb_words
    from xencrash.lab.images import domu_images, qemu_words, xen_images
    from xencrash.lab.packages import Cache

    cache = Cache()
    (domu_images if cell.domu else xen_images)(cache, XENS[cell.xen])
    qemu_words(cache, QEMUS[cell.qemu])
    return gdb_words(cache, GDBS[cell.gdb])[0]


def _reports(cell: Cell, gdb: str, output: Path, fresh: bool) -> Iterator[Json]:
    """The trace's report, and the vmcore's. Raises Undecidable."""
    from xencrash.lab.run import check_vmcore, folder, follow, machine

    folder(output)
    with machine(output, _specification(cell), fresh=fresh) as lab:
        lab.dom0.load(cell.load)
        report = follow(lab, output, lambda: _crash_later(lab, cell), gdb=gdb)
        yield report
        if not report.get("undecided"):
            yield check_vmcore(lab, output)


def _specification(cell: Cell) -> Specification:
    return Specification(
        xen=cell.xen,
        qemu=cell.qemu,
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


def _judged(report: Json) -> tuple[Verdict, str]:
    from xen_symbols.report.blocks import first_problem

    return Verdict[report["verdict"].upper()], first_problem(report)


def _unlike(cell: Cell, reports: Sequence[Json]) -> Iterator[tuple[Verdict, str]]:
    from xencrash.lab.run import unlike

    for reason in unlike(reports, XENS[cell.xen].generation, cell.lapic, cell.cpu):
        yield Verdict.UNKNOWN, reason


# Several of them


def crash_all(cells: Sequence[Cell], output: Path, jobs: int = 1, fresh: bool = False) -> list[Json]:
    """What came of each cell, in their order; a line for each on standard error as it ends.

    Each has a process of its own: a machine ends with the process that started it, and so does what a killed cell
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
    """In a process of its own: ends, its machine with it, when it is told to or when who started it has gone."""

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
        return _outcome(cell, Verdict.UNKNOWN, "its process ended without an answer")
    return outcome


def _tell(outcome: Json, done: int, of: int) -> None:
    what = ", ".join(filter(None, _words(outcome)[:5]))
    print(f"[{done:2}/{of}] {outcome['verdict']:7} {outcome['seconds']:5.1f} s  {what}", file=sys.stderr, flush=True)
    if outcome["reason"]:
        print(f"        {outcome['reason']}", file=sys.stderr, flush=True)


def status_of(outcomes: Sequence[Json]) -> ExitStatus:
    """1 if any failed; else 3 if any is unknown or skipped, but for packages that are no more; else 0."""
    verdicts = [outcome["verdict"] for outcome in outcomes if not outcome["gone"]]
    if "fail" in verdicts:
        return ExitStatus.FAILED
    return ExitStatus.PASSED if verdicts and set(verdicts) == {"pass"} else ExitStatus.UNDECIDED


# Showing them

COLUMNS = ("Xen", "QEMU", "gdb", "LAPIC", "crash", "generation", "crashed on", "verdict", "seconds", "reason")


def _words(outcome: Json) -> list[str]:
    """An outcome's text for each of the COLUMNS."""
    crash = outcome["how"] if outcome["cpu"] is None else f"{outcome['how']} on CPU {outcome['cpu']}"
    busy = f"{outcome['load']} busy loops in dom0" * bool(outcome["load"])
    guest = "a domU on every CPU" * outcome["domu"]
    later = f"after {outcome['delay']:.2f} s" * bool(outcome["delay"])
    cpu = "-" if outcome["crashing_cpu"] is None else f"CPU {outcome['crashing_cpu']}"
    return [
        *(outcome[name] for name in ("xen", "qemu", "gdb", "lapic")),
        ", ".join(filter(None, (crash, busy, guest, later))),
        outcome["generation"] or "-",
        cpu,
        outcome["verdict"],
        f"{outcome['seconds']:.0f}",
        outcome["reason"],
    ]


def summary(outcomes: Sequence[Json]) -> str:
    """How many came to which verdict, the bad ones first."""
    verdicts = [outcome["verdict"] for outcome in outcomes]
    counts = [f"{verdicts.count(name)} {name}" for name in ("fail", "unknown", "skip", "pass") if name in verdicts]
    return f"{len(verdicts)} crashes: {', '.join(counts)}"


def render(outcomes: Sequence[Json], format: str, title: str) -> str:
    """The outcomes as text as table, json, junit or markdown."""
    if format == "json":
        return json.dumps({"title": title, "summary": summary(outcomes), "cells": outcomes}, indent=2) + "\n"
    if format == "junit":
        from xen_symbols.report.junit import to_junit

        return to_junit({"findings": [_finding(outcome) for outcome in outcomes]})
    rows = [_words(outcome) for outcome in outcomes]
    if format == "markdown":
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        table = "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)
        return f"## {title}\n\n{summary(outcomes)}.\n\n{table}"
    from xen_symbols.report.blocks import Cell as Text
    from xen_symbols.report.blocks import Lines, Table
    from xen_symbols.report.console import plain

    cells = [[Text(text) for text in row] for row in rows]
    return plain([Table(title, COLUMNS, cells), Lines([[Text(summary(outcomes))]])])


def _finding(outcome: Json) -> Json:
    """An outcome as a report's finding, for JUnit."""
    return {
        "check": outcome["name"],
        "stage": "crashes",
        "cpu": None,
        "verdict": outcome["verdict"],
        "expected": "pass",
        "observed": outcome["verdict"],
        "reason": outcome["reason"],
    }


def finish(outcomes: Sequence[Json], format: str, title: str) -> int:
    """Print the outcomes, say on standard error what is not as it should be, and return the exit status."""
    from xencrash.cli import write

    write(render(outcomes, format, f"{title}, {time.strftime('%Y-%m-%d')}"), None)
    for outcome in outcomes:
        if outcome["gone"]:
            print(f"xencrash: NOT RUN, ITS PACKAGE IS GONE: {outcome['name']}: {outcome['reason']}", file=sys.stderr)
    status = status_of(outcomes)
    if status is not ExitStatus.PASSED:
        first = next((o for o in outcomes if o["verdict"] != "pass" and not o["gone"]), outcomes[0])
        print(f"xencrash: {summary(outcomes)}; first: {first['name']}: {first['reason']}", file=sys.stderr)
    return status
