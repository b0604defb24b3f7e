"""Boot a machine, crash it, follow and judge every stage, take the vmcore and judge
it too, and end the machine. The exit status is the trace's, or the vmcore's if the
trace passed.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xen_symbols.report.model import ExitStatus, exit_status
from xencrash.errors import complain
from xencrash.guests import BY_ID
from xencrash.lab import judged, progress
from xencrash.lab.machine import Machine
from xencrash.lab.options import add_crash, add_fresh, add_machine, specification
from xencrash.lab.specification import Specification
from xencrash.options import add_given, what_is_given
from xencrash.output import finish, verdict_in, write
from xencrash.renderers.table import show_stage

if TYPE_CHECKING:
    from xen_symbols.report import contract


EPILOG = """\
exit status: 0 every check passed, 1 at least one failed, 2 bad usage, 3 a step
failed or could not be decided (which, why and what to do is on standard error)"""


def add_options(parser: ArgumentParser) -> None:
    add_machine(parser)
    add_crash(parser)
    add_given(parser)
    add_fresh(parser)
    parser.add_argument("--output", default="xencrash-run", metavar="DIR", help="default: %(default)s")


def run(args: Namespace) -> int:
    """Leaves the logs in the folder, `trace` as JSON, JUnit and HTML, and of a real Xen `vmcore` and `check`."""
    wanted, said = specification(args), what_is_given(args)
    output = judged.folder(args.output)
    tell = progress.on_stderr()
    with judged.machine(output, wanted, tell, args.fresh) as machine:
        tell("following the crash")
        # Some faults are shown only by a trace of the writers to gates.
        gates = wanted.fault is not None and BY_ID[wanted.fault].gates
        if not wanted.guest:
            machine.prepare(wanted.crash.how, wanted.crash.cpu)
        report = judged.follow(
            machine, output, lambda: _crash(machine, wanted), progress=show_stage, gates=gates, given=said
        )
        status = finish(report)
        if wanted.guest or not judged.was_followed(report):
            if not wanted.guest:
                tell(f"no vmcore: the crash was not followed to its end; the report and the logs are in {output}")
            return status or as_asked(wanted, [report])
        tell("the crash kernel copies the vmcore")
        checked = judged.check_vmcore(machine, output, said)
    print("\nThe vmcore:", flush=True)
    write(checked)
    print(f"\nThe reports, the vmcore and the logs are in {output}", file=sys.stderr)
    return status or exit_status(verdict_in(checked)) or as_asked(wanted, [report, checked])


def _crash(machine: Machine, wanted: Specification) -> None:
    if wanted.guest:
        machine.serial.send(b"C")
    else:
        machine.require_busy()
        machine.crash(wanted.crash.how, wanted.crash.cpu)


def as_asked(wanted: Specification, reports: Sequence[contract.Report]) -> ExitStatus:
    """Undecided, with the reason on standard error, if the crash was not the one asked for."""
    if wanted.guest:  # a fault may set the mode, and a guest is given its crashing CPU at boot
        reasons = list(judged.unlike(reports, wanted.generation, None, None))
    else:
        lapic = wanted.lapic_row.mode if wanted.lapic else None
        reasons = list(judged.unlike(reports, wanted.generation, lapic, wanted.crash.cpu))
    if reasons:
        complain("; ".join(reasons))
    return ExitStatus.UNDECIDED if reasons else ExitStatus.PASSED
