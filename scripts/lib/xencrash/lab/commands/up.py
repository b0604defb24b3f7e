"""Boot a machine in the background, and print the folder of its sockets and logs.
`lab down` ends it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash.lab import boot, progress
from xencrash.lab.commands.status import show
from xencrash.lab.options import STEP, add_fresh, add_machine, add_run_dir, specification

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    add_machine(parser)
    parser.add_argument(
        "--paused", action="store_true", help="stop before the first instruction, until a debugger continues"
    )
    add_fresh(parser)
    parser.add_argument(
        "--no-crash-kernel", action="store_true", help="leave Xen without one: its crash path stops early"
    )
    add_run_dir(parser, "folder for the sockets and logs; default: a new one under /tmp")


def run(args: Namespace) -> int:
    tell = progress.on_stderr()
    machine = boot.up(specification(args), args.run_dir, owned=False, fresh=args.fresh, progress=tell)
    show(machine.status())
    return 0
