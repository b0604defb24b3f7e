"""End QEMU and remove the sockets and the disk. The logs stay if `lab up` was given
--run-dir.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash.errors import UsageError
from xencrash.lab.machine import running
from xencrash.lab.options import STEP, add_run_dir, machine

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every machine that `lab up` left in a folder under /tmp")
    add_run_dir(parser)


def run(args: Namespace) -> int:
    if args.all and args.run_dir:
        raise UsageError("--all is every machine: leave it or --run-dir out")
    for ending in [found for found in running() if not found.state.owned] if args.all else [machine(args)]:
        ending.down()
        print(f"{ending.run_dir}: down")
    return 0
