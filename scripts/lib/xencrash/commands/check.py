"""Judge the state that a dump or a live machine is in.

Several dumps get a line each (with --format json a list of reports, with junit
one document); --output then names a directory for their reports. The exit status
is the worst: 1 if a check failed in any of them, else 3 if any could not be
decided or opened.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash import garbage
from xencrash.judging import attempt, judge
from xencrash.lazy import load
from xencrash.options import ANY_TARGET, JUDGED, add_given, add_output, add_target, requests
from xencrash.output import begin, finish

_SEVERAL = "xencrash.several:judge"  # what several dumps take would slow one down

EPILOG = f"{ANY_TARGET}\n\n{JUDGED}"


def add_options(parser: ArgumentParser) -> None:
    add_target(parser, several=True)
    add_given(parser)
    add_output(parser, "table", "json", "junit", "html")


def run(args: Namespace) -> int:
    asked = requests(args)
    if len(asked) > 1:
        return int(load(_SEVERAL)(asked, args.format, args.output))
    begin(args.output, asked[0].target, asked[0].symbols)
    with garbage.none_in_cycles():
        return finish(attempt(asked[0], judge), args.format, args.output)
