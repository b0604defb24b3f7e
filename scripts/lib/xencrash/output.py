"""Where reports go: in which format, to which file, and what is said of them with which exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, cast

from xen_symbols.report.model import Report, Verdict, exit_status
from xencrash.errors import UsageError, complain
from xencrash.lazy import load

if TYPE_CHECKING:
    from xen_symbols.report import contract

_WHY = "xen_symbols.report.blocks:why_not_pass"
FORMATS = {
    "table": "xencrash.renderers.table",
    "json": "xencrash.renderers.json",
    "junit": "xencrash.renderers.junit",
}


def finish(report: Report | contract.Report, format: str = "table", output: str | None = None) -> int:
    """Write a report, say on standard error why it is undecided, and return its exit status."""
    write(report, format, output)
    why = why_undecided(report)
    if why is not None:
        complain(why)
    return exit_status(verdict_in(report))


def write(report: Report | contract.Report, format: str = "table", output: str | None = None) -> None:
    """Write a report to a file, or to standard output. Raises UsageError for a file that cannot be written."""
    to(output, lambda stream: load(FORMATS[format]).write(report, stream))


def write_several(reports: Sequence[contract.Report], format: str) -> None:
    """Write several reports to standard output."""
    to(None, lambda stream: load(FORMATS[format]).write_several(reports, stream))


def to(output: str | None, write: Callable[[IO[str]], object]) -> None:
    """Have something written to a file, or to standard output. Raises UsageError for a file that cannot be written."""
    if output is None:
        write(sys.stdout)
        sys.stdout.flush()
        return
    try:
        with open(output, "w", encoding="utf-8") as file:
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
