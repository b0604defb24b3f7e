"""`xencrash lab run`: boot, crash, take the vmcore, judge it, stop."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from xencrash.lab.errors import LabError
from xencrash.lab.machine import Lab


def run(args: argparse.Namespace) -> int:
    """Leaves `check.json` (the vmcore's verdict), `vmcore` and the logs in `args.output`; the check's exit status."""
    from xencrash import judging
    from xencrash.cli import render, show, status_of, write
    from xencrash.lab.cli import machine_arguments, progress

    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"running the lab: {output}: {error.strerror}") from error
    tell = progress()
    with Lab.up(**machine_arguments(args), progress=tell) as lab:
        try:
            tell("crashing Xen")
            lab.crash(args.how or ("key" if args.cpu is None else "panic"), args.cpu)
            vmcore = lab.wait_vmcore(output / "vmcore")
        finally:
            for log in (lab.serial_log, lab.qemu_log, lab.paths.line_log):
                shutil.copy(log, output)
        tell("judging the vmcore")
        checked = argparse.Namespace(symbols=str(lab.symbols), base=None, allow_build_id_mismatch=False)
        report = judging.check_dump(str(vmcore), checked)
    write(render(report, "json"), str(output / "check.json"))
    show(report)
    tell(f"verdict: {report['verdict']}; the reports, vmcore and logs are in {output}")
    return status_of(report)
