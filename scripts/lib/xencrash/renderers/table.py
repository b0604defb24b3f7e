"""Reports for people: in colours on a terminal, else as plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from xen_symbols.report.blocks import dumps_table, report_blocks, stage_line
from xen_symbols.report.console import print_blocks
from xen_symbols.report.model import Report

if TYPE_CHECKING:
    from xen_symbols.report import contract

SUFFIX = ".txt"


def write(report: Report | contract.Report, stream: IO[str]) -> None:
    print_blocks(report_blocks(report.to_json() if isinstance(report, Report) else report), stream)


def write_several(reports: Iterable[contract.Report], stream: IO[str]) -> None:
    """A line for each."""
    print_blocks([dumps_table(reports)], stream)


def show_stage(stage: contract.Stage, findings: Sequence[contract.Finding]) -> None:
    """A line for one stage of a crash that is followed, on standard error."""
    print_blocks([stage_line(stage, findings)], sys.stderr)
