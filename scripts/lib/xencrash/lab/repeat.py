"""`xencrash lab repeat`: crashes in a row, over the rows, from random moments: every one must pass."""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace

from xencrash.lab import matrix
from xencrash.lab.crashes import CPUS, Cell, crash_all, finish
from xencrash.lab.rows import QEMUS

_LONGEST_DELAY = 2.0  # seconds; what dom0 and Xen do after a boot has settled long before


def moments(count: int, seed: int, cells: tuple[Cell, ...]) -> list[Cell]:
    """`count` crashes, over the cells in turn; what is random in them follows from `seed`."""
    chance = random.Random(seed)
    order = list(cells)
    chance.shuffle(order)
    return [_moment(chance, number, order[number % len(order)]) for number in range(count)]


def _moment(chance: random.Random, number: int, cell: Cell) -> Cell:
    cpu = chance.choice((None, *range(CPUS)))
    return replace(
        cell,
        name=f"{number + 1:03}-{cell.name}",
        how="key" if cpu is None else "panic",
        cpu=cpu,
        load=chance.choice((0, chance.randint(CPUS, 2 * CPUS))),
        domu=chance.choice((False, True)) and QEMUS[cell.qemu].domu,
        delay=round(chance.uniform(0, _LONGEST_DELAY), 2),
    )


def run(args: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    cells = matrix.cells()
    crashes = moments(args.number, seed, matrix.chosen(args, cells if args.xen or args.qemu else matrix.settled(cells)))
    outcomes = crash_all(crashes, args.output, args.jobs, args.fresh)
    return finish(outcomes, args.format, f"{args.number} crashes in a row, seed {seed}")
