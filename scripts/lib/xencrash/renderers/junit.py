"""Reports as JUnit's XML: one document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from xen_symbols.report.junit import to_junit
from xen_symbols.report.model import Report

if TYPE_CHECKING:
    from xen_symbols.report import contract

SUFFIX = ".xml"


def write(report: Report | contract.Report, stream: IO[str]) -> None:
    stream.write(to_junit(report.to_json() if isinstance(report, Report) else report))


def write_several(reports: Iterable[contract.Report], stream: IO[str]) -> None:
    stream.write(to_junit(*reports))
