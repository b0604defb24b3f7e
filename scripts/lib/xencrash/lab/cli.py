"""`xencrash lab`: the lab's steps, one by one, from a shell."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xencrash.lab.crash import WAYS, Crash, wait_until_seen
from xencrash.lab.errors import BadSpecification, LabError
from xencrash.lab.rows import DEFAULT_QEMU, DEFAULT_XEN, GDBS, LAPICS, QEMUS, XENS
from xencrash.lab.specification import Specification

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_DESCRIPTION = """\
Real Xen with a real Linux dom0 and a real crash kernel in QEMU (no KVM needed), from Debian's packages:

  xencrash lab up                      boot it, and load the crash kernel
  xencrash lab status                  where its sockets and logs are
  xencrash gdb gdb:SOCKET              look at it, or
  xencrash trace gdb:SOCKET --qmp SOCKET   follow the crash that you cause next
  xencrash lab crash                   press Xen's crash key
  xencrash lab dump --output vmcore    take the crash kernel's vmcore
  xencrash check vmcore
  xencrash lab down

  xencrash lab run                     all of that at once
  xencrash lab matrix                  the same for several Xens, QEMUs, gdbs and LAPIC modes
  xencrash lab repeat -n 50            and many times, at random moments

A machine whose dom0 is up is kept as a snapshot, from which it starts the next time in a fraction of a second; --fresh
boots it. Snapshots are in the cache ($XENCRASH_CACHE, else ~/.cache/xencrash), about 130 MB each. They take 8 GiB at
most ($XENCRASH_SNAPSHOTS is another number of GiB; 0 keeps none): then the least recently used are removed.
"""
_CRASHES_EPILOG = (
    "exit status: 0 every crash passed, 1 at least one failed, 2 bad usage, 3 one could not be decided or got "
    "(a package that its source has no more is told, and does not count)"
)
_RUN_EPILOG = (
    "exit status: 0 every check passed, 1 at least one failed, 2 bad usage, 3 a step failed or could not be decided "
    "(which, why and what to do is on standard error)"
)
_EPILOG = "exit status: 0 done, 2 bad usage, 3 a step failed (which, why and what to do is on standard error)"


def add_parser(commands: Any, summary: str) -> None:
    """Add `lab` and its sub-commands to the command's sub-parsers; each sets `run`."""
    lab = commands.add_parser(
        "lab",
        help=summary,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = lab.add_subparsers(metavar="STEP", required=True)

    fetch = _step(
        steps, "fetch", run_fetch, "fetch packages and make the images, without booting",
        "Fill the cache ($XENCRASH_CACHE, else ~/.cache/xencrash) with what a Xen and a QEMU need, so that `lab up` "
        "needs no network. What is there already is checked against its SHA-256, and fetched again where broken.",
    )  # fmt: skip
    fetch.add_argument("--xen", choices=XENS, action="append", help=f"may be repeated; default: {DEFAULT_XEN}")
    fetch.add_argument("--qemu", choices=QEMUS, action="append", help=f"may be repeated; default: {DEFAULT_QEMU}")
    fetch.add_argument("--all", action="store_true", help="every Xen and every QEMU")
    fetch.add_argument("--domu", action="store_true", help="also what --domu-vcpus needs (it is built with gcc)")
    fetch.add_argument("--refresh", action="store_true", help="ask the package source for newer versions first")

    up = _step(
        steps, "up", run_up, "boot a machine and leave it running",
        "Boot a machine in the background, and print its run's folder, where its sockets and logs are. "
        "`lab down` ends it.",
    )  # fmt: skip
    machine_options(up)
    up.add_argument("--paused", action="store_true", help="stop before the first instruction, for a debugger to go on")
    _fresh(up)
    up.add_argument("--no-crash-kernel", action="store_true", help="leave Xen without one: its crash path stops early")
    _run_dir(up, "folder for the sockets and logs; default: a new one under /tmp")

    crash = _step(
        steps, "crash", run_crash, "crash Xen",
        "Crash Xen on purpose. `--how key` presses C on Xen's console; the CPU that takes the serial interrupt "
        "crashes. `--how panic` makes dom0's kernel panic; with `lab up --dom0-vcpus CPUS` (as many as the machine "
        "has CPUs) `--cpu` chooses the CPU.",
    )  # fmt: skip
    _crash_options(crash)
    _run_dir(crash)

    run = _step(
        steps, "run", run_run, "all of it: boot, crash, take the vmcore, judge, stop",
        "Boot a machine, crash it, follow and judge every stage, take the vmcore, judge it too, and end the machine. "
        "The exit status is the trace's; the vmcore's when the trace passed.",
        _RUN_EPILOG,
    )  # fmt: skip
    machine_options(run)
    _crash_options(run)
    _fresh(run)
    run.add_argument("--output", default="xencrash-run", metavar="DIR", help="default: %(default)s")

    matrix = _step(
        steps, "matrix", run_matrix, "crash every Xen on every QEMU, with every gdb, in every LAPIC mode",
        "Boot, crash and judge a machine for each cell of the matrix of the lab's rows, some with a domU "
        "that runs on every CPU, and show a table of verdicts. "
        "Without options the cells are a few in which every pair of rows appears (without those of a suite whose "
        "packages change from day to day); --xen, --qemu, --gdb and --lapic take all that have what is named. "
        "What a cell needs and cannot get is `skip`, with the reason. "
        "Reports and logs of every cell, and what went wrong, stay in the output folder.",
        _CRASHES_EPILOG,
    )  # fmt: skip
    matrix.add_argument("--all", action="store_true", help="every cell")
    _cells_options(matrix, "xencrash-matrix")

    repeat = _step(
        steps, "repeat", run_repeat, "crash Xen many times in a row, at random moments",
        "Boot, crash and judge one machine after the other, over the cells of the matrix: by the crash key or by "
        "dom0's panic on a random CPU, with dom0 idle or busy on all its vCPUs, with or without a domU that runs on "
        "every CPU, after a random time. Every one must pass: one that does not is a false alarm, or a find. --seed "
        "repeats a run.",
        _CRASHES_EPILOG,
    )  # fmt: skip
    repeat.add_argument("-n", "--number", type=_count, default=50, metavar="N", help="default: 50")
    repeat.add_argument("--seed", type=int, metavar="N", help="of the random choices; default: a new one, told")
    _cells_options(repeat, "xencrash-repeat")

    dump = _step(
        steps, "dump", run_dump, "take a dump of the machine",
        "`--format vmcore` waits for the crash kernel to copy /proc/vmcore, and takes that. The others are QEMU's own "
        "dumps of the machine as it is now, whatever runs in it.",
    )  # fmt: skip
    dump.add_argument("--output", required=True, metavar="FILE", help="where to write it")
    dump.add_argument(
        "--format", default="vmcore", choices=("vmcore", "elf", "kdump-zlib", "kdump-lzo", "kdump-snappy"),
        help="default: vmcore",
    )  # fmt: skip
    dump.add_argument("--timeout", type=float, metavar="S", help="seconds to wait for the vmcore; default: 120")
    _run_dir(dump)

    status = _step(
        steps, "status", run_status, "what runs, how far it came, and where its sockets and logs are",
        "List the machines that run in folders under /tmp, or the one of --run-dir.",
    )  # fmt: skip
    status.add_argument("--format", choices=("table", "json"), default="table")
    _run_dir(status)

    down = _step(
        steps, "down", run_down, "end a machine and remove what it leaves",
        "End QEMU and remove the sockets and the disk. The logs stay where --run-dir was given to `lab up`.",
    )  # fmt: skip
    down.add_argument("--all", action="store_true", help="every machine that `lab up` left in a folder under /tmp")
    _run_dir(down)

    guests = _step(
        steps, "guests", run_guests, "the generations and faults that the reference guest knows",
        "The reference guest is a small bare-metal program with Xen's crash path, in every generation of it, "
        "with faults to be found: `lab up --guest GENERATION --fault NAME`.",
    )  # fmt: skip
    guests.add_argument("--format", choices=("table", "json"), default="table")


def machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which machine: for `machine_arguments`."""
    parser.add_argument("--xen", choices=XENS, help=f"default: {DEFAULT_XEN}")
    parser.add_argument("--qemu", choices=QEMUS, default=DEFAULT_QEMU, help=f"default: {DEFAULT_QEMU}")
    parser.add_argument("--lapic", choices=LAPICS, help="default: what this QEMU and Xen do by themselves")
    parser.add_argument("--cpus", type=_count, default=4, metavar="N", help="default: 4")
    parser.add_argument("--memory", type=_count, metavar="MIB", help="default: 1024")
    parser.add_argument("--dom0-vcpus", type=_count, metavar="N", help="as many as CPUs: pinned; default: 1")
    parser.add_argument(
        "--domu-vcpus", type=_count, metavar="N",
        help="create a PVH domU that spins on CPUs 0 to N-1, in SVM guest mode, once dom0 is up; default: none",
    )  # fmt: skip
    parser.add_argument("--xen-args", metavar="WORDS", help="added to Xen's command line")
    parser.add_argument("--dom0-args", metavar="WORDS", help="added to dom0's command line")
    parser.add_argument("--guest", metavar="GENERATION", help="boot the reference guest of this generation, not Xen")
    parser.add_argument("--fault", metavar="NAME", help="a fault for the reference guest to have")


def specification(args: argparse.Namespace) -> Specification:
    """The machine that the options of `machine_options` and `_crash_options` ask for. Raises UsageError."""
    names = ("xen", "guest", "fault", "qemu", "lapic", "cpus", "memory", "dom0_vcpus", "domu_vcpus", "xen_args",
             "dom0_args", "paused")  # fmt: skip
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    with _bad_usage():
        return Specification(
            **given,
            crash_kernel=not getattr(args, "no_crash_kernel", False),
            crash=Crash(getattr(args, "how", None), getattr(args, "cpu", None)),
        )


@contextlib.contextmanager
def _bad_usage() -> Iterator[None]:
    """What a specification refuses is bad usage here."""
    try:
        yield
    except BadSpecification as error:
        raise _usage(str(error)) from error


def progress() -> Any:
    """A function that tells on standard error what is being done, and when."""
    begun = time.monotonic()
    return lambda text: print(f"{time.monotonic() - begun:6.1f} s  {text}", file=sys.stderr, flush=True)


def run_fetch(args: argparse.Namespace) -> int:
    from xencrash.lab.images import domu_images, qemu_words, xen_images
    from xencrash.lab.packages import Cache

    if args.all and (args.xen or args.qemu):
        raise _usage("--all is every Xen and every QEMU: leave it or --xen and --qemu out")
    cache = Cache(progress=progress())
    if args.refresh:
        cache.refresh()
    for name in QEMUS if args.all else args.qemu or [DEFAULT_QEMU]:
        qemu_words(cache, QEMUS[name])
    for name in XENS if args.all else args.xen or [DEFAULT_XEN]:
        made = (domu_images if args.domu else xen_images)(cache, XENS[name])
        print(f"Xen {name}: symbols {made.symbols}")
    return 0


def run_up(args: argparse.Namespace) -> int:
    from xencrash.lab.boot import up

    machine = up(specification(args), args.run_dir, owned=False, fresh=args.fresh, progress=progress())
    _show(machine.status())
    return 0


def run_crash(args: argparse.Namespace) -> int:
    with _bad_usage():
        crash = Crash(args.how, args.cpu)
        machine = _lab(args)
        crash.require_vcpus(machine.state.cpus, machine.state.dom0_vcpus)
    since = machine.serial.size()
    machine.crash(crash.how, crash.cpu)
    wait_until_seen(machine, since)
    print(f"crashing; see {machine.serial_log}")
    return 0


def run_run(args: argparse.Namespace) -> int:
    from xencrash.lab.run import run

    return run(args)


def run_matrix(args: argparse.Namespace) -> int:
    from xencrash.lab.matrix import run

    return run(args)


def run_repeat(args: argparse.Namespace) -> int:
    from xencrash.lab.repeat import run

    return run(args)


def run_dump(args: argparse.Namespace) -> int:
    if args.format != "vmcore" and args.timeout is not None:
        raise _usage(f"--timeout is for --format vmcore, and {args.format} is taken at once: leave it out")
    lab = _lab(args)
    if args.format == "vmcore":
        written = lab.dumps.vmcore(args.output, args.timeout or 120)
    else:
        written = lab.dumps.qemu(args.output, args.format)
    print(f"{written}  (symbols: {lab.symbols})")
    return 0


def run_status(args: argparse.Namespace) -> int:
    from xencrash.lab.machine import running

    found = [_lab(args)] if args.run_dir else running()
    states = [lab.status() for lab in found]
    if args.format == "json":
        print(json.dumps(states, indent=2))
    elif not states:
        print("no machine runs: xencrash lab up boots one")
    for state in states if args.format == "table" else []:
        _show(state)
    return 0


def run_down(args: argparse.Namespace) -> int:
    from xencrash.lab.machine import running

    if args.all and args.run_dir:
        raise _usage("--all is every machine: leave it or --run-dir out")
    for lab in [lab for lab in running() if not lab.state.owned] if args.all else [_lab(args)]:
        lab.down()
        print(f"{lab.run_dir}: down")
    return 0


def run_guests(args: argparse.Namespace) -> int:
    from xencrash.guests import listing

    known = listing()
    if args.format == "json":
        print(json.dumps(known, indent=2))
        return 0
    print("generations: " + " ".join(generation["id"] for generation in known["generations"]))
    for generation in known["generations"]:
        if generation.get("finds"):
            print(f"{generation['id']} by itself, with {generation['cpus']} CPUs or more, fails: "
                  + " ".join(generation["finds"]))  # fmt: skip
    for fault in known["faults"]:
        needs = [f"{fault['cpus']} CPUs"] if fault["cpus"] > 1 else []
        needs += ["x2APIC"] if fault["lapic"] else []
        needs += ["trace --gates"] if fault["gates"] else []
        print(f"\n{fault['id']}: {fault['does']}")
        if not fault["visible"]:
            print(f"  leaves no trace in any readable state: {fault['reason']}")
        print(f"  in {' '.join(fault['generations'])}" + (f"; needs {', '.join(needs)}" if needs else ""))
    return 0


def _step(
    steps: Any, name: str, run: Any, summary: str, description: str, epilog: str = _EPILOG
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = steps.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(run=functools.partial(_cleaning_up, run))
    return parser


def _cleaning_up(run: Any, args: argparse.Namespace) -> int:
    """Run a step so that who ends it, by SIGTERM or by closing the terminal, leaves no more behind than by Ctrl-C."""

    def end(number: int, frame: object) -> None:
        for sign in _ENDING:
            signal.signal(sign, signal.SIG_IGN)  # once is enough, and is not to disturb the cleaning up
        print(f"xencrash: ended by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    before = {sign: signal.getsignal(sign) for sign in _ENDING}
    for sign, handler in before.items():
        if handler is signal.SIG_DFL:  # not one that nohup(1) has told to be ignored
            signal.signal(sign, end)
    try:
        return int(run(args))
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _crash_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--how", choices=WAYS, default=None, help="default: key, or panic with --cpu")
    parser.add_argument("--cpu", type=int, metavar="N", help="the CPU to crash on (needs --dom0-vcpus)")


def _cells_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Which cells of the matrix, and what to do with them."""
    for name, rows in (("xen", XENS), ("qemu", QEMUS), ("gdb", GDBS), ("lapic", ("xapic", "x2apic"))):
        parser.add_argument(f"--{name}", choices=rows, action="append", help="only cells with this; may be repeated")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="so many machines at a time; default: 1")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--format", choices=("table", "json", "junit", "markdown"), default="table")
    _fresh(parser)


def _fresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true",
        help="boot, and keep no snapshot; default: start from a snapshot of an earlier boot of the same machine",
    )  # fmt: skip


def _run_dir(parser: argparse.ArgumentParser, text: str = "of the machine; default: the only one there is") -> None:
    parser.add_argument("--run-dir", metavar="DIR", help=text)


def _lab(args: argparse.Namespace) -> Any:
    """The machine that is meant."""
    from xencrash.lab.machine import attach, running

    if args.run_dir:
        return attach(args.run_dir, progress())
    found = [lab for lab in running() if not lab.state.owned]
    if not found:
        raise LabError("finding the lab: no machine runs in a folder under /tmp: xencrash lab up, or give --run-dir")
    if len(found) > 1:
        raise _usage("several machines run: choose one with --run-dir: " + " ".join(str(lab.run_dir) for lab in found))
    return attach(found[0].run_dir, progress())


def _show(state: dict[str, Any]) -> None:
    width = max(map(len, state))
    print("\n".join(f"{name:{width}}  {value}" for name, value in state.items()) + "\n")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text, 0)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def _usage(message: str) -> Exception:
    from xencrash.cli import UsageError

    return UsageError(message)
