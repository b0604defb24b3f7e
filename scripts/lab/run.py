"""`xencrash lab run`: boot, attach gdb, crash, judge every stage live, take the vmcore and judge it, stop."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xencrash.lab.errors import LabError
from xencrash.lab.machine import Lab

# The guest is up in a fraction of a second; Xen's crash key is answered at once.
_CRASH_BEGINS_IN = 60.0


def run(args: argparse.Namespace) -> int:
    """Leaves `trace.json`, `trace.xml` and the logs in `args.output`, and of a real Xen `vmcore` and `check.json`.

    The exit status is the trace's; that of the vmcore's check when the trace passed.
    """
    from xencrash import judging
    from xencrash.cli import finish, render, show, status_of, write
    from xencrash.lab.cli import machine_arguments, progress
    from xencrash.trace import trace

    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"running the lab: {output}: {error.strerror}") from error
    tell = progress()
    with Lab.up(**machine_arguments(args), progress=tell) as lab, _kept_logs(lab, output):
        tell("following the crash")
        report = trace(
            f"gdb:{lab.gdb_socket}",
            str(lab.symbols),
            str(lab.qmp_socket),
            timeout=_CRASH_BEGINS_IN,
            progress=judging.tell_stage,
            trigger=lambda: _crash(lab, args),
        )
        for name, format in (("trace.json", "json"), ("trace.xml", "junit")):
            write(render(report, format), str(output / name))
        status = finish(report, argparse.Namespace(format="table", output=None))
        if args.guest or report.get("undecided"):
            return status
        tell("the crash kernel copies the vmcore")
        vmcore = lab.wait_vmcore(output / "vmcore")
        tell("judging the vmcore")
        options = argparse.Namespace(symbols=str(lab.symbols), base=None, allow_build_id_mismatch=False)
        checked = judging.check_dump(str(vmcore), options)
    write(render(checked, "json"), str(output / "check.json"))
    print("\nThe vmcore:", flush=True)
    show(checked)
    print(f"\nThe reports, the vmcore and the logs are in {output}", file=sys.stderr)
    return status or status_of(checked)


def _crash(lab: Any, args: argparse.Namespace) -> None:
    if args.guest:
        lab.serial_send(b"C")
    else:
        lab.crash(args.how or ("key" if args.cpu is None else "panic"), args.cpu)


@contextlib.contextmanager
def _kept_logs(lab: Any, output: Path) -> Iterator[None]:
    """The logs are in `output` whatever happens to the machine."""
    try:
        yield
    finally:
        for log in (lab.serial_log, lab.qemu_log, lab.paths.line_log):
            if Path(log).exists():
                shutil.copy(log, output)
