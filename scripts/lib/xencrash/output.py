"""Where reports go: in which format, to which file, and what is said of them with which exit status."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, cast

from xen_symbols.report.model import Report, Verdict, exit_status
from xencrash.errors import UsageError, complain
from xencrash.lazy import load

if TYPE_CHECKING:
    from xen_symbols.report import contract

UNENCODABLE = "backslashreplace"  # what is written of a character that an output's encoding does not have
_WHY = "xen_symbols.report.blocks:why_not_pass"
FORMATS = {
    "table": "xencrash.renderers.table",
    "json": "xencrash.renderers.json",
    "junit": "xencrash.renderers.junit",
    "html": "xencrash.renderers.html",
}
INDEXES = {"html": ("index.html", "xencrash.renderers.html:write_index")}  # of a folder of reports


def begin(output: str | None, *inputs: str | None) -> None:
    """What an earlier run left in the output's file goes: whatever becomes of this run, it is not this run's report.

    Raises UsageError for a file that cannot be written, or that is one of the inputs.
    """
    if output is None:
        return
    mode, file = _identity(output)
    if file is not None and file in [_identity(path)[1] for path in inputs if path]:
        raise UsageError(f"--output {output} would overwrite the input: give another file")
    if mode is None or stat.S_ISREG(mode):  # a pipe's reader would take an empty report for the report
        to(output, lambda stream: None)


def finish(report: Report | contract.Report, format: str = "table", output: str | None = None) -> int:
    """Write a report, say on standard error why it is undecided, and return its exit status."""
    write(report, format, output)
    why = why_undecided(report)
    if why is not None:
        complain(why)
    return exit_status(verdict_in(report))


def _identity(path: str) -> tuple[int | None, tuple[int, int] | None]:
    """A file's mode, and what is the same for all its names; None where there is no such file (yet)."""
    try:
        found = os.stat(path)  # noqa: PTH116 - pathlib costs more to import than a CPU to judge
    except (OSError, ValueError):
        return None, None
    return found.st_mode, (found.st_dev, found.st_ino)


def write(report: Report | contract.Report, format: str = "table", output: str | None = None) -> None:
    """Write a report to a file, or to standard output. Raises UsageError for a file that cannot be written."""
    to(output, lambda stream: load(FORMATS[format]).write(report, stream))


def write_several(reports: Iterable[contract.Report], format: str) -> None:
    """Write several reports to standard output, each when it comes where the format allows that."""
    to(None, lambda stream: load(FORMATS[format]).write_several(reports, stream))


def to(output: str | None, write: Callable[[IO[str]], object]) -> None:
    """Have something written to a file, or to standard output. Raises UsageError for a file that cannot be written."""
    if output is None:
        write(sys.stdout)
        sys.stdout.flush()
        return
    try:
        with open(output, "w", encoding="utf-8", errors=UNENCODABLE) as file:
            write(file)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}") from None


def verdict_in(report: Report | contract.Report) -> Verdict:
    return report.verdict if isinstance(report, Report) else Verdict.of(report["verdict"])


def why_undecided(report: Report | contract.Report) -> str | None:
    """Why a report is neither a pass nor a failure, or not all of it; None for one that is."""
    undecided = report.undecided if isinstance(report, Report) else report.get("undecided")
    if undecided or verdict_in(report) is not Verdict.UNKNOWN:
        return undecided
    if isinstance(report, Report):
        unknowns = [finding.to_json() for finding in report.findings if finding.verdict is Verdict.UNKNOWN]
        report = cast("contract.Report", {**report.members(), "findings": unknowns})  # not all of thousands of CPUs
    return str(load(_WHY)(report))
