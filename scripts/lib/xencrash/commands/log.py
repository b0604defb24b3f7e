"""Print Xen's console ring, from its oldest line. Any Xen has one, whether built with
kexec or not. Control characters are shown as escapes.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.report.model import ExitStatus
from xen_symbols.xen.console import console_parts, printable
from xencrash.errors import complain
from xencrash.judging import open_xen
from xencrash.lazy import load
from xencrash.options import ANY_TARGET, Request, add_target, request
from xencrash.output import begin, to

_LIVE = "xencrash.live:console"
EPILOG = f"""\
{ANY_TARGET}

exit status:
  0  all of it was printed
  2  bad usage
  3  it could not be read, or not all of it (the reason is on standard error)
"""


def add_options(parser: ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--output", metavar="FILE", help="write the text there instead of standard output")


def run(args: Namespace) -> int:
    """What can be read is printed, with a line in the place of what cannot. Raises Undecidable."""
    asked = request(args)
    begin(args.output, asked.target, asked.symbols)
    parts = _parts(asked)
    missing = [part.reason for part in parts if isinstance(part, Absent)]
    text = "".join(f"\n[{part}]\n" if isinstance(part, Absent) else printable(part) for part in parts)
    to(args.output, lambda stream: stream.write(text + "\n" * (not text.endswith("\n"))))
    if missing:
        more = f" (and {len(missing) - 1} more)" * (len(missing) > 1)
        complain(f"{asked.target}: the console ring: {missing[0]}{more}")
    return ExitStatus.UNDECIDED if missing else ExitStatus.PASSED


def _parts(asked: Request) -> list[str | Absent]:
    if asked.live:
        return [load(_LIVE)(asked)]
    try:
        return console_parts(open_xen(asked))
    except Unreadable as error:
        raise Undecidable(f"{asked.target}: the console ring: {error}") from None
