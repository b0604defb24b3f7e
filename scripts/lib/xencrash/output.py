"""Where reports go: in which format, to which file, and what is said of them with which exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from xen_symbols.report.model import ExitStatus, Finding, Report, Verdict
from xencrash.errors import UsageError, complain
from xencrash.lazy import load

Json = dict[str, Any]


class Format(NamedTuple):
    """A format of reports: the suffix of a file's name, and the module that writes it."""

    suffix: str
    module: str


FORMATS = {
    "table": Format(".txt", "xencrash.renderers.table"),
    "json": Format(".json", "xencrash.renderers.json"),
    "junit": Format(".xml", "xencrash.renderers.junit"),
}


def finish(report: Report | Json, format: str = "table", output: str | None = None) -> int:
    """Write a report, say on standard error why it is undecided, and return its exit status."""
    write(report, format, output)
    why = why_undecided(report)
    if why is not None:
        complain(why)
    return status_of(report)


def write(report: Report | Json, format: str = "table", output: str | None = None) -> None:
    """Write a report to a file, or to standard output. Raises UsageError for a file that cannot be written."""
    to(output, lambda stream: load(FORMATS[format].module).write(report, stream))


def write_several(reports: list[Json], format: str) -> None:
    """Write several reports to standard output."""
    to(None, lambda stream: load(FORMATS[format].module).write_several(reports, stream))


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


def status_of(report: Report | Json) -> ExitStatus:
    """The exit status that a report asks for."""
    verdict = str(report.verdict) if isinstance(report, Report) else report["verdict"]
    return {"pass": ExitStatus.PASSED, "fail": ExitStatus.FAILED}.get(verdict, ExitStatus.UNDECIDED)


def why_undecided(report: Report | Json) -> str | None:
    """Why a report is neither a pass nor a failure; None for one that is."""
    if isinstance(report, Report):
        unknowns = [finding for finding in report.findings if finding.verdict is Verdict.UNKNOWN]
        report = {**report.members(), "findings": map(Finding.to_json, unknowns)}
    if report.get("undecided"):
        return str(report["undecided"])
    return _first_unknown(report) if report["verdict"] == str(Verdict.UNKNOWN) else None


def _first_unknown(report: Json) -> str:
    unknowns = [finding for finding in report["findings"] if finding["verdict"] == "unknown"]
    if not unknowns:
        return "nothing could be judged: every check was skipped"
    first = unknowns[0]
    more = f" (and {len(unknowns) - 1} more)" if len(unknowns) > 1 else ""
    return f"{first['check']} could not be decided: {first['reason']}{more}"
