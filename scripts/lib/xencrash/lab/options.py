"""Options that several of the lab's steps share, and what they mean."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from xencrash.errors import UsageError
from xencrash.lab import progress
from xencrash.lab.cells import Cell, cells
from xencrash.lab.crash import WAYS, Crash
from xencrash.lab.errors import BadSpecification, LabError
from xencrash.lab.machine import Machine, attach, running
from xencrash.lab.own import OwnXen, own_xen
from xencrash.lab.rows import ACCELS, DEFAULT_ACCEL, DEFAULT_QEMU, DEFAULT_XEN, GDBS, LAPICS, QEMUS, XENS
from xencrash.lab.specification import BOOTS, Specification
from xencrash.options import count

STEP = "exit status: 0 done, 2 bad usage, 3 a step failed (which, why and what to do\nis on standard error)"
CRASHES = """\
exit status: 0 every crash passed, 1 at least one failed, 2 bad usage, 3 one could
not be decided, or what it needs could not be fetched (a package that its source
no longer has is reported, but does not count)"""


def add_machine(parser: ArgumentParser) -> None:
    """Which machine: for `specification`."""
    parser.add_argument("--xen", choices=XENS, help=f"default: {DEFAULT_XEN}")
    add_own_xen(parser)
    parser.add_argument("--qemu", choices=QEMUS, default=DEFAULT_QEMU, help=f"default: {DEFAULT_QEMU}")
    _add_accel(parser)
    parser.add_argument(
        "--boot", choices=BOOTS, help=f"how Xen is booted, by {BOOTS[0]} (default) or as xen.efi by OVMF"
    )
    parser.add_argument("--lapic", choices=LAPICS, help="default: as this QEMU and Xen set it up")
    parser.add_argument("--cpus", type=count, default=4, metavar="N", help="default: 4")
    parser.add_argument(
        "--max-cpus", type=count, metavar="N", help="CPUs that the firmware names as possible; default: those present"
    )
    parser.add_argument("--memory", type=count, metavar="MIB", help="default: 704")
    parser.add_argument("--dom0-vcpus", type=count, metavar="N", help="default: 1; pinned if as many as CPUs")
    parser.add_argument(
        "--domu-vcpus", type=count, metavar="N",
        help="create a PVH domU that spins on CPUs 0 to N-1, in SVM guest mode, once dom0 is up; default: none",
    )  # fmt: skip
    parser.add_argument("--xen-args", metavar="WORDS", help="added to Xen's command line")
    parser.add_argument("--dom0-args", metavar="WORDS", help="added to dom0's command line")
    parser.add_argument("--guest", metavar="GENERATION", help="boot the reference guest of this generation, not Xen")
    parser.add_argument("--fault", metavar="NAME", help="the fault that the reference guest has")


def _add_accel(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--accel", choices=ACCELS, default=DEFAULT_ACCEL, metavar="ROW",
        help="tcg, kvm (with /dev/kvm), or kvm-in-tcg and kvm-split-in-tcg (without it, slow); default: %(default)s",
    )  # fmt: skip


def add_own_xen(parser: ArgumentParser) -> None:
    """A Xen that no row has: for `own`."""
    parser.add_argument(
        "--xen-image", metavar="FILE", help="your own Xen: the xen.gz or xen of a build, instead of a row's"
    )
    parser.add_argument(
        "--symbols", metavar="FILE", help="the xen-syms of --xen-image; default: the one beside it, or installed"
    )


def own(args: Namespace) -> OwnXen | None:
    """The Xen that --xen-image and --symbols name. Raises BadSpecification."""
    image, symbols = getattr(args, "xen_image", None), getattr(args, "symbols", None)
    if symbols and not image:
        raise BadSpecification("--symbols is for --xen-image: a row has its own; leave it out")
    efi = getattr(args, "boot", None) == "efi"
    return own_xen(image, symbols, efi) if image else None


def add_crash(parser: ArgumentParser) -> None:
    """How Xen crashes: for `specification`, or `crash`."""
    parser.add_argument("--how", metavar="WAY", help=f"{', '.join(WAYS)}; default: key, or panic with --cpu")
    parser.add_argument("--cpu", type=int, metavar="N", help="the CPU to crash on (needs --dom0-vcpus)")


def specification(args: Namespace) -> Specification:
    """The machine that the options ask for. Raises BadSpecification."""
    names = ("xen", "guest", "fault", "qemu", "accel", "lapic", "cpus", "max_cpus", "memory", "dom0_vcpus",
             "domu_vcpus", "xen_args", "dom0_args", "paused", "boot")  # fmt: skip
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    loads = not getattr(args, "no_crash_kernel", False)
    return Specification(**given, xen_image=own(args), crash_kernel=loads, crash=crash(args))


def crash(args: Namespace) -> Crash:
    """The crash that the options ask for. Raises BadSpecification."""
    return Crash(getattr(args, "how", None), getattr(args, "cpu", None))


def add_cells(parser: ArgumentParser, output: str) -> None:
    """Which cells of the matrix, and what to do with them."""
    for name, rows in (("xen", XENS), ("qemu", QEMUS), ("gdb", GDBS), ("lapic", ("xapic", "x2apic"))):
        parser.add_argument(f"--{name}", choices=rows, action="append", help="only cells with this; may be repeated")
    _add_accel(parser)
    add_own_xen(parser)
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="machines to run in parallel; default: 1")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--format", choices=("table", "json", "junit", "html", "markdown"), default="table")
    add_fresh(parser)


def own_cells(args: Namespace) -> tuple[Cell, ...]:
    """Every cell there is, of the rows or of the Xen that --xen-image names, as --accel has it. Raises
    BadSpecification."""
    xen = own(args)
    if xen and args.xen:
        raise BadSpecification("--xen and --xen-image are two Xens: leave one out")
    Specification(accel=args.accel)  # which may be refused on this machine
    return cells(xen, args.accel)


def add_fresh(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true",
        help="boot, and keep no snapshot; default: start from a snapshot of an earlier boot of the same machine",
    )  # fmt: skip


def add_run_dir(parser: ArgumentParser, text: str = "the machine's folder; default: that of the only machine") -> None:
    parser.add_argument("--run-dir", metavar="DIR", help=text)


def machine(args: Namespace) -> Machine:
    """The machine that --run-dir names, or the only one. Raises LabError or UsageError."""
    if args.run_dir:
        return attach(args.run_dir, progress.on_stderr())
    found = [machine for machine in running() if not machine.state.owned]
    if not found:
        raise LabError("finding the lab: no machine runs in a folder under /tmp: xencrash lab up, or give --run-dir")
    if len(found) > 1:
        folders = " ".join(str(machine.run_dir) for machine in found)
        raise UsageError(f"several machines run: choose one with --run-dir: {folders}")
    return attach(found[0].run_dir, progress.on_stderr())
