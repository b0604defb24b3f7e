"""Crash one machine again and again from a snapshot, each time with a different
disturbance: an NMI or a machine check before an instruction, a CPU that is late or
never comes, CPUs in another order. Each time the crash kernel must start.

It judges what the crash path does, not the values of gates and flags, and needs no
table of generations. An ID describes an experiment completely, and repeats it:

  nmi@0:kexec_crash+0x12        an NMI on CPU 0, before it executes that instruction
  mc>2@0:kexec_reloc+0x5        a machine check on CPU 2, when CPU 0 is there
  yield@1:do_nmi_crash+0x6a~2   CPU 1, when there for the second time, lets the others run first
  stop@1:do_nmi_crash           CPU 1 stops there for good
"""

from __future__ import annotations

import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from xen_symbols.report.model import ExitStatus
from xencrash.errors import UsageError, complain
from xencrash.lab import progress
from xencrash.lab.options import add_crash, add_machine, specification
from xencrash.lab.storm import shown
from xencrash.lab.storm.begin import Scenery, begin
from xencrash.lab.storm.drive import Driver
from xencrash.lab.storm.experiment import Experiment, parse
from xencrash.lab.storm.explore import DEFAULT_KINDS, KINDS, plan
from xencrash.lab.storm.judge import Verdict
from xencrash.lab.storm.report import to_json, verdict_of
from xencrash.lab.storm.run import Budget, Result, Storm, plain_crash
from xencrash.lab.storm.snapshot import folder_for_snapshot
from xencrash.options import count
from xencrash.output import begin as begin_output
from xencrash.output import to

EPILOG = """\
exit status: 0 no experiment failed, 1 at least one failed, 2 bad usage, 3 none could be
run, or one could not be decided"""
# Options that make a machine what it is.
_MACHINE = (
    "xen", "xen_image", "symbols", "boot", "guest", "fault", "qemu", "lapic", "cpus", "memory", "dom0_vcpus",
    "domu_vcpus", "xen_args", "dom0_args", "how", "cpu",
)  # fmt: skip


def add_options(parser: ArgumentParser) -> None:
    add_machine(parser)
    add_crash(parser)
    parser.add_argument("--minutes", type=float, metavar="N", help="end after N minutes, and report what was done")
    parser.add_argument("--experiments", type=count, metavar="N", help="run N experiments; default: all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the order and of random experiments")
    parser.add_argument("--jobs", type=count, default=2, metavar="N", help="machines to run in parallel; default: 2")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these; default: all but random")
    parser.add_argument(
        "--switches", type=count, default=1, metavar="N", help="at most N forced switches in an order; default: 1"
    )
    parser.add_argument("--replay", metavar="ID", help="run only this experiment")
    parser.add_argument("--repeat", type=count, default=1, metavar="N", help="with --replay: run it N times")
    parser.add_argument(
        "--stop-at", type=int, metavar="N", help="with --replay: stop after N of its events, for gdb to attach"
    )
    parser.add_argument(
        "--picture", action="append", default=[], metavar="FUNCTION",
        help="show this function's instructions with the outcomes beside them",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("table", "json", "junit", "html"), default="table", help="default: %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", help="write the report there instead of standard output")


def run(args: Namespace) -> int:
    if why := problem(args):
        raise UsageError(why)
    begin_output(args.output)
    begun, tell, wanted = time.monotonic(), progress.on_stderr(), specification(args)
    with folder_for_snapshot() as folder:
        scenery = begin(wanted, folder, tell)
        if args.stop_at is not None:
            return _stop_at(scenery, _named(args.replay, scenery), args.stop_at)
        storm = Storm(scenery, Budget(args.minutes and args.minutes * 60, args.experiments, args.jobs), tell)
        if args.replay is not None:
            planned: int | None = args.repeat
            storm.repeat(_named(args.replay, scenery), args.repeat)
        else:
            planned = _all(args, storm)
        about = {
            "machine": wanted.name + (f", fault {wanted.fault}" if wanted.fault else ""),
            "qemu": wanted.qemu,
            "seed": args.seed,
            "seconds": round(time.monotonic() - begun, 1),
            "interrupted": storm.interrupted,
            "replay": _again(args),
        }
        report = to_json(storm.results, scenery, about, planned)
    to(args.output, lambda stream: shown.write(report, args.format, stream, args.picture))
    return status(storm.results)


def problem(args: Namespace) -> str | None:
    """What is wrong with the options together."""
    if args.replay is None and (args.repeat > 1 or args.stop_at is not None):
        return "--repeat and --stop-at are for --replay ID: give one"
    if args.stop_at is not None and args.repeat > 1:
        return "--stop-at stops once: leave --repeat out"
    if args.stop_at is not None and args.stop_at < 0:
        return "--stop-at: events are counted from 0, before the first"
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        return f"--minutes {args.minutes}: give a number above 0"
    return None


def _named(text: str, scenery: Scenery) -> Experiment:
    return parse(text, scenery.scene.symbols, scenery.scene.cpus)


def _all(args: Namespace, storm: Storm) -> int | None:
    """All planned experiments. Returns how many there are; None if there is no end."""
    plain_crash(storm.scenery)
    bounded = args.minutes is not None or args.experiments is not None
    experiments, planned = plan(storm.scenery, args.kind or DEFAULT_KINDS, args.switches, args.seed, bounded)
    storm.progress(f"{'no end of' if planned is None else planned} experiments are planned")
    storm.run(experiments, planned)
    if not storm.interrupted:
        storm.look_again()
    return planned


def _stop_at(scenery: Scenery, experiment: Experiment, events: int) -> int:
    """Leave the machine stopped there until Enter is pressed, or the input ends."""
    with scenery.snapshot.machine() as live:
        driver = Driver(live, scenery.scene, experiment)
        driver.until(events)
        happened = len(experiment.events) - len(driver.left)
        live.rsp.close()
        symbols = scenery.snapshot.recipe.boot.symbols
        print(f"{happened} of {len(experiment.events)} events have happened; the machine is stopped:")
        print(f"  xencrash gdb gdb:{live.paths.gdb} --qmp {live.paths.qmp} --symbols {symbols}")
        print("Enter ends it.", flush=True)
        sys.stdin.readline()
    return ExitStatus.PASSED


def _again(args: Namespace) -> str:
    """The command that repeats an experiment of this machine, but for the ID."""
    given = [(name, getattr(args, name)) for name in _MACHINE if getattr(args, name) is not None]
    options = [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["xencrash", "lab", "storm", *options, "--replay"])


def status(results: Sequence[Result]) -> ExitStatus:
    """The exit status; problems are reported on standard error."""
    verdict = verdict_of(results)
    if verdict is Verdict.PASS:
        return ExitStatus.PASSED
    if not results:
        complain("storm: no experiment was run")
        return ExitStatus.UNDECIDED
    first = next(result for result in results if result.outcome.verdict is verdict)
    count = sum(result.outcome.verdict is verdict for result in results)
    complain(f"storm: {count} of {len(results)} {verdict}; first: {first.id}: {first.outcome.says}")
    return ExitStatus.FAILED if verdict is Verdict.FAIL else ExitStatus.UNDECIDED
