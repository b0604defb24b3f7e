"""Reports as JSON (xen_symbols/report/schema.json)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from xen_symbols.report.jsontext import json_text, json_texts
from xen_symbols.report.model import Report

if TYPE_CHECKING:
    from xen_symbols.report import contract

SUFFIX = ".json"


def write(report: Report | contract.Report, stream: IO[str]) -> None:
    """One object. A Report's findings are made JSON one by one, never all of them."""
    stream.writelines(json_text(report.members() if isinstance(report, Report) else report))


def write_several(reports: Iterable[contract.Report], stream: IO[str]) -> None:
    """A list."""
    stream.writelines(json_texts(reports))
