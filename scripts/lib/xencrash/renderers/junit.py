"""Reports as JUnit's XML: one document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from xen_symbols.report.junit import to_junit
from xen_symbols.report.model import Report

Json = dict[str, Any]


def write(report: Report | Json, stream: IO[str]) -> None:
    stream.write(to_junit(report.to_json() if isinstance(report, Report) else report))


def write_several(reports: Sequence[Json], stream: IO[str]) -> None:
    stream.write(to_junit(*reports))
