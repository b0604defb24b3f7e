"""Attach to QEMU's gdbstub, wait for Xen to crash, stop at each stage of the
crash path, read every gate and every CPU there, and judge them. The machine
then runs on into its crash kernel.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from xencrash.errors import UsageError, complain
from xencrash.judging import attempt
from xencrash.options import JUDGED, LIVE_TARGET, Request, add_given, add_output, add_target, request, seconds
from xencrash.output import begin, finish, write
from xencrash.renderers.table import show_stage
from xencrash.trace import trace

if TYPE_CHECKING:
    from xen_symbols.report import contract


EPILOG = f"TARGET is {LIVE_TARGET}.\n\n{JUDGED}"


def add_options(parser: ArgumentParser) -> None:
    add_target(parser, dumps=False)
    add_given(parser)
    add_output(parser, "table", "json", "junit", "html")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="give up after S seconds without a crash")
    parser.add_argument(
        "--gates",
        action="store_true",
        help="also list every change of an NMI or #MC gate, and who wrote it, if seen",
    )
    parser.add_argument(
        "--leave-stopped", action="store_true", help="end at the handover, and leave the machine stopped there"
    )


def run(args: Namespace) -> int:
    """Follow a crash, a line for each stage on standard error."""
    if not args.target.startswith("gdb:"):
        raise UsageError(
            f"{args.target} is not a live machine: trace takes gdb:HOST:PORT or gdb:SOCKET; use check for a dump"
        )
    asked = request(args)
    begin(args.output, asked.symbols)

    def follow(asked: Request) -> contract.Report:
        return trace(
            asked.target,
            asked.symbols,
            asked.qmp,
            asked.given,
            timeout=args.timeout,
            leave_stopped=args.leave_stopped,
            gates=args.gates,
            progress=show_stage,
            notice=complain,
            trigger=_say_waiting,
            interrupted=lambda report: write(report, args.format, args.output),
        )

    return finish(attempt(asked, follow), args.format, args.output)


def _say_waiting() -> None:
    print("waiting for Xen to crash; Ctrl-C ends it", file=sys.stderr)
