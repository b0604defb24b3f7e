"""`xencrash lab matrix`: each Xen, QEMU, gdb and LAPIC mode of the lab, crashed and judged; or a few that cover all."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence

from xencrash.lab.crashes import CPUS, Cell, crash_all, finish
from xencrash.lab.rows import GDBS, QEMUS, SUITES, XENS

DIMENSIONS = ("xen", "qemu", "gdb", "lapic")
# The ways of crashing, and whether a domU runs then (where the QEMU is one for it), dealt to the cells in turn.
_WAYS = (("key", None), *(("panic", cpu) for cpu in range(CPUS)))
_DOMU = (False, True)


def cells() -> tuple[Cell, ...]:
    """Every cell there is: a LAPIC mode that a QEMU does not have makes none."""
    made = []
    for number, xen in enumerate(XENS):  # each Xen begins elsewhere, or all would be crashed alike
        ways = itertools.islice(itertools.cycle(_WAYS), number, None)
        domus = itertools.islice(itertools.cycle(_DOMU), number, None)
        for qemu, gdb in itertools.product(QEMUS, GDBS):
            for lapic in sorted(QEMUS[qemu].cpu, reverse=True):
                how, cpu = next(ways)
                domu = QEMUS[qemu].domu and next(domus)
                made.append(Cell("-".join((xen, qemu, gdb, lapic)), xen, qemu, gdb, lapic, how=how, cpu=cpu, domu=domu))
    return tuple(made)


def settled(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Those of the cells whose packages are the same tomorrow: no suite that they come from is a moving one."""
    return tuple(cell for cell in cells if not any(SUITES[suite].moving for suite in _suites(cell)))


def _suites(cell: Cell) -> set[str]:
    xen = XENS[cell.xen]
    return {xen.suite, xen.kexec_suite, QEMUS[cell.qemu].suite}


def covering(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Some of the cells, in which each pair of values of two dimensions appears that appears in any."""
    left = {cell: _pairs(cell) for cell in cells}
    chosen = []
    while any(left.values()):
        best = max(left, key=lambda cell: len(left[cell]))
        chosen.append(best)
        covered = left.pop(best)
        left = {cell: pairs - covered for cell, pairs in left.items()}
    return tuple(chosen)


def _pairs(cell: Cell) -> frozenset[tuple[str, ...]]:
    values = [(name, getattr(cell, name)) for name in DIMENSIONS]
    return frozenset((*one, *other) for one, other in itertools.combinations(values, 2))


def chosen(args: argparse.Namespace, cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Those of the cells that the options --xen, --qemu, --gdb and --lapic leave. Raises UsageError for none."""
    from xencrash.cli import UsageError

    wanted = {name: getattr(args, name) for name in DIMENSIONS if getattr(args, name)}
    left = tuple(cell for cell in cells if all(getattr(cell, name) in values for name, values in wanted.items()))
    if not left:
        reasons = "; ".join(f"QEMU {row.name}: {row.reason}" for row in QEMUS.values())
        raise UsageError(f"there is no such cell in the matrix ({reasons})")
    return left


def run(args: argparse.Namespace) -> int:
    everything = cells()
    filtered = any(getattr(args, name) for name in DIMENSIONS)
    selected = chosen(args, everything if args.all or filtered else covering(settled(everything)))
    return finish(crash_all(selected, args.output, args.jobs, args.fresh), args.format, "The matrix")
