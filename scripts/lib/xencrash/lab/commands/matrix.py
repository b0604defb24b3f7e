"""Boot, crash and judge a machine for each cell of the matrix of the lab's rows,
some with a domU that runs on every CPU, and show a table of verdicts.

By default a few cells are run, in which every pair of rows appears (except those of
a suite whose packages change from day to day); --xen, --qemu, --gdb and --lapic
select all cells with the named rows. A cell is `skip`, with the reason, if what it
needs no longer exists. Reports, logs and errors of every cell stay in the output
folder.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash.lab.cells import chosen, covering, settled, wanted
from xencrash.lab.crashes import crash_all
from xencrash.lab.options import CRASHES, add_cells, own_cells
from xencrash.lab.outcomes import finish

EPILOG = CRASHES


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every cell")
    add_cells(parser, "xencrash-matrix")


def run(args: Namespace) -> int:
    everything, names = own_cells(args), wanted(vars(args))
    selected = chosen(names, everything if args.all or names else covering(settled(everything)))
    return finish(crash_all(selected, args.output, args.jobs, args.fresh), args.format, "The matrix")
