"""The cells of the matrix: each Xen, QEMU, gdb and LAPIC mode of the lab; a few that cover all pairs; and crashes at
random moments across them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xencrash.lab.crash import Crash, crashes
from xencrash.lab.errors import BadSpecification
from xencrash.lab.own import OwnXen, own_xen
from xencrash.lab.rows import ACCELS, DEFAULT_ACCEL, GDBS, QEMUS, SUITES, XENS

CPUS = 4
_LONGEST_DELAY = 2.0  # seconds; dom0 and Xen settle long before this after a boot
DIMENSIONS = ("xen", "qemu", "gdb", "lapic")
# The ways of crashing, and whether a domU runs (if the QEMU allows it), assigned to the cells in turn.
_WAYS = (("key", None), *(("panic", cpu) for cpu in range(CPUS)))
_DOMU = (False, True)


@dataclass(frozen=True)
class Cell:
    """One crash: the rows of the lab it is made of, and how and when Xen crashes.

    `xen` is a row, or the name of an own Xen: then `image` and `symbols` are its files. `how` and `cpu` are Crash's.
    `load` is the number of busy loops in dom0, `domu` whether a domU spins on every CPU, `delay` the seconds that Xen
    runs before it crashes, once all is ready.
    """

    name: str
    xen: str
    qemu: str
    gdb: str
    lapic: str
    how: str = "key"
    cpu: int | None = None
    load: int = 0
    domu: bool = False
    delay: float = 0.0
    image: str = ""
    symbols: str = ""
    accel: str = DEFAULT_ACCEL

    @property
    def own(self) -> OwnXen | None:
        return own_xen(self.image, self.symbols) if self.image else None

    @property
    def generation(self) -> str | None:
        """The one that must be identified, where it is known."""
        return None if self.image else XENS[self.xen].generation


def cells(own: OwnXen | None = None, accel: str = DEFAULT_ACCEL) -> tuple[Cell, ...]:
    """Every cell, of all rows or of one own Xen: none for a LAPIC mode that a QEMU does not have; domUs under TCG."""
    made = []
    suffix = [accel] * (accel != DEFAULT_ACCEL)
    image, symbols = (str(own.image), str(own.symbols)) if own else ("", "")
    names = [own.name] if own else list(XENS)
    for number, xen in enumerate(names):  # each Xen starts at another way, or all would be crashed alike
        ways = itertools.islice(itertools.cycle(_WAYS), number, None)
        domus = itertools.islice(itertools.cycle(_DOMU), number, None)
        for qemu, gdb in itertools.product(QEMUS, GDBS):
            for lapic in sorted(ACCELS[accel].cpu or QEMUS[qemu].cpu, reverse=True):
                how, cpu = next(ways)
                domu = QEMUS[qemu].domu and next(domus) and not own and accel == DEFAULT_ACCEL
                made.append(
                    Cell(
                        "-".join((xen, qemu, gdb, lapic, *suffix)), xen, qemu, gdb, lapic, how=how, cpu=cpu, domu=domu,
                        image=image, symbols=symbols, accel=accel,
                    )
                )  # fmt: skip
    return tuple(made)


def settled(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The cells whose packages do not change: none comes from a moving suite."""
    return tuple(cell for cell in cells if not any(SUITES[suite].moving for suite in _suites(cell)))


def _suites(cell: Cell) -> set[str]:
    if cell.image:
        return {QEMUS[cell.qemu].suite}
    xen = XENS[cell.xen]
    return {xen.suite, xen.kexec_suite, QEMUS[cell.qemu].suite}


def covering(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """A selection of the cells with every pair of values of two dimensions that occurs in any cell."""
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


def wanted(options: Mapping[str, Any]) -> dict[str, Collection[str]]:
    """The rows that options name, by dimension: --xen, --qemu, --gdb and --lapic, if given."""
    return {name: options[name] for name in DIMENSIONS if options[name]}


def chosen(names: Mapping[str, Collection[str]], cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells that have the named rows in each dimension. Raises BadSpecification for none."""
    left = tuple(cell for cell in cells if all(getattr(cell, name) in values for name, values in names.items()))
    if not left:
        reasons = "; ".join(f"QEMU {row.name}: {row.reason}" for row in QEMUS.values())
        raise BadSpecification(f"the matrix has no such cell ({reasons})")
    return left


def moments(count: int, seed: int, cells: tuple[Cell, ...], without: Collection[str] = ()) -> list[Cell]:
    """`count` crashes, across the cells in turn; `seed` determines their random parts. Every second machine whose
    QEMU can run one has a domU; each way on each CPU that it can be crashed in is as likely as another, but for the
    ways that these Xens are `without`."""
    chance = random.Random(seed)
    order = list(cells)
    chance.shuffle(order)
    ways = [crash for crash in crashes(CPUS) if crash.way.name not in without]
    return [_moment(chance, number, order[number % len(order)], ways) for number in range(count)]


def _moment(chance: random.Random, number: int, cell: Cell, ways: Sequence[Crash]) -> Cell:
    domu = chance.choice((False, True)) and QEMUS[cell.qemu].domu and not cell.image
    # What is planted needs a CPU that is not in a guest.
    crash = chance.choice([each for each in ways if not (domu and each.way.planted)])
    return replace(
        cell,
        name=f"{number + 1:03}-{cell.name}",
        how=crash.way.name,
        cpu=crash.cpu,
        load=chance.choice((0, chance.randint(CPUS, 2 * CPUS))),
        domu=domu,
        delay=round(chance.uniform(0, _LONGEST_DELAY), 2),
    )
