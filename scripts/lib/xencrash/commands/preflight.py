"""Judge whether a crash would work, before one is needed: kexec built in, a crash
kernel loaded and the memory reserved for it, CPUs that would break the crash path,
the mode of the local APICs, what an NMI does, and every gate as it should be while
Xen runs. The machine is stopped for a moment, and goes on as it was.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from xen_symbols.crashpath.preflight import preflight
from xen_symbols.report.model import Report
from xencrash import live
from xencrash.judging import attempt, open_xen
from xencrash.options import ANY_TARGET, JUDGED, Request, add_output, add_target, request
from xencrash.output import begin, finish

if TYPE_CHECKING:
    from xen_symbols.report import contract


EPILOG = f"{ANY_TARGET}\n\n{JUDGED}"


def add_options(parser: ArgumentParser) -> None:
    add_target(parser)
    add_output(parser, "table", "json", "junit", "html")


def run(args: Namespace) -> int:
    asked = request(args)
    begin(args.output, asked.target, asked.symbols)
    return finish(attempt(asked, _judge), args.format, args.output)


def _judge(asked: Request) -> Report | contract.Report:
    """Raises Undecidable."""
    return live.preflight(asked) if asked.live else preflight(open_xen(asked))
