"""Write a JSON report, of check, trace, a run or a storm of the lab, or a summary, in another format.
A list of reports, as check writes it for several dumps, becomes one page, table or document.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import IO, Any

from xen_symbols.absence import Undecidable
from xen_symbols.report.model import ExitStatus
from xencrash.lazy import load
from xencrash.options import add_output
from xencrash.output import FORMATS, begin, to

EPILOG = """\
exit status: 0 written, 2 bad usage, 3 not a report (the reason is on standard error)"""
_MEMBERS = ("tool", "target", "symbols", "generation", "crashing_cpu", "cpus", "stages", "findings", "verdict")
_STORM = "xencrash.lab.storm.shown"
_SUMMARY = "xencrash.commands.summary"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("report", metavar="REPORT", help="a JSON report")
    add_output(parser, "html", "table", "junit")


def run(args: Namespace) -> int:
    """Raises Undecidable for what is not a report."""
    begin(args.output, args.report)
    reports = _reports(args.report)
    try:
        to(args.output, _writer(reports, args.format))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # What is read is anybody's: that it keeps the contract, field by field, is seen when it is shown.
        raise Undecidable(f"{args.report}: damaged, or not a report ({type(error).__name__}: {error})") from None
    return ExitStatus.PASSED


def _writer(reports: Any, format: str) -> Callable[[IO[str]], object]:
    if _is_of_storm(reports):
        return lambda stream: load(_STORM).write(reports, format, stream)
    if _is_summary(reports):
        if format == "junit":
            raise Undecidable("a summary is not made of checks, which JUnit lists: give --format html or table")
        return lambda stream: load(_SUMMARY).write(reports, format, stream)
    renderer = load(FORMATS[format])
    write = renderer.write_several if isinstance(reports, list) else renderer.write
    return lambda stream: write(reports, stream)


def _is_of_storm(report: Any) -> bool:
    return isinstance(report, dict) and report.get("schema") == 1 and "experiments" in report


def _is_summary(report: Any) -> bool:
    return isinstance(report, dict) and report.get("schema") == 1 and "crash_kernel" in report


def _reports(path: str) -> Any:
    """A report, or a list of them. Raises Undecidable."""
    try:
        with open(path, encoding="utf-8") as file:
            read = json.load(file)
    except (ValueError, RecursionError) as error:
        raise Undecidable(f"{path}: not JSON: {error}") from None
    if _is_of_storm(read) or _is_summary(read):
        return read
    for one in read if isinstance(read, list) else [read]:
        if not isinstance(one, dict) or (missing := [name for name in _MEMBERS if name not in one]):
            why = f"it has no {missing[0]}" if isinstance(one, dict) else "it holds something else"
            raise Undecidable(f"{path}: not a report: {why}; give what --format json writes")
        if one.get("schema") != 1:
            raise Undecidable(f"{path}: a report by schema {one.get('schema')!r}: only 1 can be read")
    return read
