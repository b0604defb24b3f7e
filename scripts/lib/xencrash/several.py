"""Several dumps: each judged, whatever is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.engine import TOOL
from xen_symbols.report.model import Report, exit_status
from xencrash.errors import UsageError, complain, internal_error
from xencrash.judging import judge_dump
from xencrash.lazy import load
from xencrash.options import Request
from xencrash.output import FORMATS, verdict_in, write, write_several

if TYPE_CHECKING:
    from xen_symbols.report import contract



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
            name = f"{number}-{Path(one.target).name}{load(FORMATS[format]).SUFFIX}"
            write(report, format, str(Path(folder) / name))
    write_several(reports, "table" if folder else format)
    return exit_status(*map(verdict_in, reports))


def _report(asked: Request) -> contract.Report:
    """The report on one dump; what goes wrong with it does not stop the others."""
    try:
        return judge_dump(asked).to_json()
    except Undecidable as error:
        why = str(error)
    except Exception:
        why = f"{asked.target}: {internal_error()}"
    complain(why)
    nothing: contract.Symbols = {"path": None, "build_id": None, "match": None}
    target: contract.Target = {"kind": "dump", "format": "unknown", "location": asked.target}
    return Report(TOOL, target, nothing, undecided=why).to_json()
