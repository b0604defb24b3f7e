"""Several dumps: each judged, whatever is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.engine import TOOL
from xen_symbols.report.model import ExitStatus, Report
from xencrash.errors import UsageError, complain, internal_error
from xencrash.judging import judge_dump
from xencrash.options import Request
from xencrash.output import FORMATS, status_of, write, write_several

Json = dict[str, Any]


def judge(asked: Sequence[Request], format: str, folder: str | None) -> int:
    """Write a line for each, and where a folder is given a report for each in it; returns the worst status."""
    for one in asked:
        if one.live:
            raise UsageError(f"{one.target} is a live machine: check it alone")
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: {error.strerror}; several dumps need a directory") from None
    reports = [_report(one) for one in asked]
    if folder:
        for number, (one, report) in enumerate(zip(asked, reports, strict=True)):
            name = f"{number}-{Path(one.target).name}{FORMATS[format].suffix}"
            write(report, format, str(Path(folder) / name))
    write_several(reports, "table" if folder else format)
    statuses = [status_of(report) for report in reports]
    return next((s for s in (ExitStatus.FAILED, ExitStatus.UNDECIDED) if s in statuses), ExitStatus.PASSED)


def _report(asked: Request) -> Json:
    """The report on one dump; what goes wrong with it does not stop the others."""
    try:
        return judge_dump(asked).to_json()
    except Undecidable as error:
        why = str(error)
    except Exception:
        why = f"{asked.target}: {internal_error()}"
    complain(why)
    nothing = {"path": None, "build_id": None, "match": None}
    target = {"kind": "dump", "format": "unknown", "location": asked.target}
    return Report(TOOL, target, nothing, undecided=why).to_json()
