"""Boot, crash and judge one machine after another, across the cells of the matrix:
in one of the ways that `lab crash` knows on a random CPU, with dom0 idle or busy on
all its vCPUs, with or without a domU that runs on every CPU, after a random time.

Every one must pass: a failure is a false alarm or a real bug. --seed repeats a run.
"""

from __future__ import annotations

import random
import sys
from argparse import ArgumentParser, Namespace

from xencrash.errors import complain
from xencrash.lab.cells import chosen, moments, settled, wanted
from xencrash.lab.crashes import crash_all
from xencrash.lab.options import CRASHES, add_cells, own, own_cells
from xencrash.lab.outcomes import finish
from xencrash.lab.planted import ways_it_lacks
from xencrash.options import count

EPILOG = CRASHES


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("-n", "--number", type=count, default=50, metavar="N", help="default: 50")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the random choices; default: a new one, printed")
    add_cells(parser, "xencrash-repeat")


def run(args: Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    everything = own_cells(args)
    left = chosen(wanted(vars(args)), everything if args.xen or args.qemu else settled(everything))
    cannot = ways_it_lacks(xen.symbols) if (xen := own(args)) else {}
    for why in cannot.values():
        complain(f"{why}: it is not crashed in this way")
    crashes = moments(args.number, seed, left, cannot)
    outcomes = crash_all(crashes, args.output, args.jobs, args.fresh)
    return finish(outcomes, args.format, f"{args.number} crashes in a row, seed {seed}")
