"""Several dumps: each judged whatever is wrong with the others, as many at a time as there are CPUs. A dump's report is
written when it is made.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Report, Verdict, exit_status
from xencrash.errors import UsageError, complain
from xencrash.judging import attempt, judge_dump, undecided
from xencrash.lazy import load
from xencrash.options import Request
from xencrash.output import FORMATS, INDEXES, to, verdict_in, write, write_several

if TYPE_CHECKING:
    from xen_symbols.report import contract

_PROBLEMS = (Verdict.UNKNOWN, Verdict.FAIL)


def judge(asked: Sequence[Request], format: str, folder: str | None) -> int:
    """Write a line for each, and where a folder is given a report for each in it; returns the worst status.

    After Ctrl-C what has been judged by then is written all the same.
    """
    for one in asked:
        if one.live:
            raise UsageError(f"{one.target} is a live machine: check it by itself")
    if folder:
        _prepare(Path(folder))
    names = _names(asked, format)
    files = [str(Path(folder) / name) for name in names] if folder else None
    verdicts: list[Verdict] = []
    listed: list[contract.Report] = []

    def reports() -> Iterator[contract.Report]:
        with contextlib.suppress(KeyboardInterrupt):
            for report in _in_order(asked, format, files, ctrl_c.wait):
                verdicts.append(verdict_in(report))
                if folder:  # it holds no more than what is wrong
                    listed.append(report)
                if report.get("undecided"):
                    complain(report["undecided"])
                elif sys.stderr.isatty():
                    complain(f"{len(verdicts)} of {len(asked)}: {report['target']['location']}: {report['verdict']}")
                yield report

    with _CtrlC() as ctrl_c:
        write_several(reports(), "table" if folder else format)
        if folder and format in INDEXES:
            name, writer = INDEXES[format]
            to(str(Path(folder) / name), lambda stream: load(writer)(listed, names[: len(listed)], stream))
    if ctrl_c.pressed:
        raise KeyboardInterrupt
    return exit_status(*verdicts)


class _CtrlC:
    """Ctrl-C ends the wait for a report, and never the writing of one."""

    def __enter__(self) -> _CtrlC:
        self.pressed = self._waits = False
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # else somebody wants it ignored
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.pressed = True
        if self._waits:
            raise KeyboardInterrupt

    def wait(self, connections: Collection[Connection]) -> list[Connection]:
        """Those that can be read. Raises KeyboardInterrupt, also for what came before."""
        try:
            self._waits = True
            if self.pressed:
                raise KeyboardInterrupt
            return [ready for ready in wait(list(connections)) if isinstance(ready, Connection)]
        finally:
            self._waits = False


_Wait = Callable[[Collection[Connection]], Sequence[Connection]]


def _prepare(folder: Path) -> None:
    """Make the folder, and remove the reports that an earlier run left in it."""
    ours = re.compile(r"\d+-.+(" + "|".join(re.escape(load(module).SUFFIX) for module in FORMATS.values()) + ")")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if ours.fullmatch(path.name) and path.is_file():
                path.unlink()
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; several dumps need a directory") from None


def _names(asked: Sequence[Request], format: str) -> list[str]:
    """The name of each report's file."""
    digits = len(str(len(asked) - 1))  # so that they sort
    suffix = load(FORMATS[format]).SUFFIX
    return [f"{number:0{digits}}-{Path(one.target).name}{suffix}" for number, one in enumerate(asked)]


def _in_order(
    asked: Sequence[Request], format: str, files: Sequence[str] | None, wait: _Wait
) -> Iterator[contract.Report]:
    """The reports in the order of the dumps, each as soon as it and those before it are made."""
    jobs = [_Job(one, judge_dump, format, files[number] if files else None) for number, one in enumerate(asked)]
    made: dict[int, contract.Report] = {}
    done = 0
    for number, report in _by_workers(jobs, wait):
        made[number] = report
        while done in made:
            yield made.pop(done)
            done += 1


class _Job(NamedTuple):
    asked: Request
    judge: Callable[[Request], Report]
    format: str
    file: str | None  # for the report

    def lost(self, process: BaseProcess) -> contract.Report:
        """The report where the process that worked on it is gone."""
        process.join()
        status = process.exitcode or 0
        how = f"was killed ({signal.Signals(-status).name})" if status < 0 else "ended"
        why = f"{self.asked.target}: the process that judged it {how}; check it by itself"
        return undecided(self.asked, why).to_json()


def _by_workers(jobs: Sequence[_Job], wait: _Wait) -> Iterator[tuple[int, contract.Report]]:
    """The number of each job and what came of it, as they end. Raises UsageError where a report cannot be written."""
    waiting = list(range(len(jobs)))
    running: dict[Connection, tuple[BaseProcess, int]] = {}

    def give(connection: Connection, process: BaseProcess) -> None:
        number = waiting.pop(0) if waiting else None
        connection.send(number)
        if number is not None:
            running[connection] = process, number

    try:
        for _ in range(min(len(jobs), len(os.sched_getaffinity(0)))):
            give(*_worker(jobs))
        while running:
            for ready in wait(running):
                process, number = running.pop(ready)
                try:
                    answer: contract.Report | UsageError = ready.recv()
                except EOFError:
                    answer = jobs[number].lost(process)
                    ready, process = _worker(jobs)
                give(ready, process)
                if isinstance(answer, UsageError):
                    raise answer
                yield number, answer
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _worker(jobs: Sequence[_Job]) -> tuple[Connection, BaseProcess]:
    """A process that does the jobs whose numbers it is sent, until None."""
    context = multiprocessing.get_context("fork")  # what has been imported is imported once
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(jobs, ours, theirs))
    process.start()
    theirs.close()
    return ours, process


def _work(jobs: Sequence[_Job], parents: Connection, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent to act on
    parents.close()  # or its end would not be seen here
    with contextlib.suppress(EOFError):
        while (number := connection.recv()) is not None:
            connection.send(_done(jobs[number]))


def _done(job: _Job) -> contract.Report | UsageError:
    """Judge one dump and write its report. Returns what is to be said of it, or why the report cannot be written."""
    report = attempt(job.asked, job.judge)
    assert isinstance(report, Report)
    if job.file is None and job.format != "table":
        return report.to_json()
    if job.file is not None:
        try:
            write(report, job.format, job.file)
        except UsageError as error:
            return error
    verdict = report.verdict.word
    report.findings, report.cpus = [finding for finding in report.findings if finding.verdict in _PROBLEMS], ()
    return {**report.to_json(), "verdict": verdict}  # all that a line is made of
