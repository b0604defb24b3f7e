"""A crash on one page, for a bug report: which Xen, why it crashed and where, which
domain ran, what the other CPUs did, whether the crash path left a dump to trust,
and what the crash kernel got. The first five lines say it; what is not known says
why. Of a guest's memory nothing is shown.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import IO, TYPE_CHECKING

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath.engine import evaluate_if_possible
from xen_symbols.describe.summary import summarise
from xen_symbols.report.console import print_blocks
from xen_symbols.report.model import ExitStatus
from xen_symbols.report.page import summary_page
from xen_symbols.report.summary import summary_blocks
from xencrash import live
from xencrash.judging import open_xen
from xencrash.options import ANY_TARGET, Request, add_given, add_output, add_target, request
from xencrash.output import begin, to

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json

EPILOG = f"""\
{ANY_TARGET}

exit status:
  0  written, whatever it says
  2  bad usage
  3  no Xen could be found there (the reason is on standard error)
"""


def add_options(parser: ArgumentParser) -> None:
    add_target(parser)
    add_given(parser)
    add_output(parser, "table", "json", "html")


def run(args: Namespace) -> int:
    """Raises Undecidable."""
    asked = request(args)
    begin(args.output, asked.target, asked.symbols)
    summary = _summary(asked)
    to(args.output, lambda stream: write(summary, args.format, stream))
    return ExitStatus.PASSED


def write(summary: Json, format: str, stream: IO[str]) -> None:
    """A summary in one of the formats."""
    if format == "json":
        print(json.dumps(summary, indent=2), file=stream)
    elif format == "html":
        stream.writelines(summary_page(summary))
    else:
        print_blocks(summary_blocks(summary), stream)


def _summary(asked: Request) -> Json:
    if asked.live:
        return live.summary(asked)
    memory = open_xen(asked)
    try:
        return summarise(memory, evaluate_if_possible(memory).to_json())
    except Unreadable as error:
        raise Undecidable(f"{asked.target}: {error}") from None
