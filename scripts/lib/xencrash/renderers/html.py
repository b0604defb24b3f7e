"""Reports as HTML: one file each, for a browser, a mail, or a CI artifact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from xen_symbols.report.model import Report
from xen_symbols.report.page import index, page, pages

if TYPE_CHECKING:
    from xen_symbols.report import contract

SUFFIX = ".html"


def write(report: Report | contract.Report, stream: IO[str]) -> None:
    stream.writelines(page(report.to_json() if isinstance(report, Report) else report))


def write_several(reports: Iterable[contract.Report], stream: IO[str]) -> None:
    """One page: an index, and each report below it."""
    stream.writelines(pages(reports))


def write_index(reports: Iterable[contract.Report], files: Sequence[str], stream: IO[str]) -> None:
    """A page that leads to the reports in files beside it."""
    stream.writelines(index(reports, files))
