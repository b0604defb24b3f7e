"""`xencrash lab run`: boot, attach gdb, crash, judge every stage live, take the vmcore and judge it, stop."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xen_symbols.report.model import ExitStatus
from xencrash.lab.boot import up
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.process import Progress
from xencrash.lab.rows import DEFAULT_XEN, LAPICS, XENS
from xencrash.lab.specification import Specification

Json = dict[str, Any]

# Seconds. The guest is up in a fraction of one, and Xen's crash key is answered at once; but dom0's panic waits for its
# turn beside loops and a domU, on a busy host.
_CRASH_BEGINS_IN = 300.0


def run(args: argparse.Namespace) -> int:
    """Leaves `trace.json`, `trace.xml` and the logs in `args.output`, and of a real Xen `vmcore` and `check.json`.

    The exit status is the trace's; that of the vmcore's check when the trace passed.
    """
    from xencrash import judging
    from xencrash.cli import finish, show, status_of
    from xencrash.lab.cli import progress, specification

    wanted = specification(args)
    output = folder(args.output)
    tell = progress()
    with machine(output, wanted, tell, args.fresh) as lab:
        tell("following the crash")
        gates = _shown_by_gates(args)
        report = follow(lab, output, lambda: _crash(lab, args), progress=judging.tell_stage, gates=gates)
        status = finish(report, argparse.Namespace(format="table", output=None))
        if args.guest or report.get("undecided"):
            return status or _as_asked(args, [report])
        tell("the crash kernel copies the vmcore")
        checked = check_vmcore(lab, output)
    print("\nThe vmcore:", flush=True)
    show(checked)
    print(f"\nThe reports, the vmcore and the logs are in {output}", file=sys.stderr)
    return status or status_of(checked) or _as_asked(args, [report, checked])


def _as_asked(args: argparse.Namespace, reports: Sequence[Json]) -> ExitStatus:
    """Undecided, and told why, where the crash was not the one that the options ask for."""
    lapic = LAPICS[args.lapic].mode if args.lapic and not args.guest else None  # a guest's fault may be of its mode
    cpu = None if args.guest else args.cpu
    reasons = list(unlike(reports, args.guest or XENS[args.xen or DEFAULT_XEN].generation, lapic, cpu))
    if reasons:
        print(f"xencrash: {'; '.join(reasons)}", file=sys.stderr)
    return ExitStatus.UNDECIDED if reasons else ExitStatus.PASSED


def unlike(reports: Sequence[Json], generation: str, lapic: str | None, cpu: int | None) -> Iterator[str]:
    """What the reports on one crash tell that is not as it was to be: then nothing was shown of it, whatever they say.

    `lapic` is the mode of all local APICs before the crash, `cpu` the one that crashes; None for any. That a domU or
    dom0's loops run is seen to before the crash (`Machine.require_busy`).
    """
    told, modes, cpus = generations(reports), lapic_modes(reports), {report["crashing_cpu"] for report in reports}
    if reports and told != [generation]:
        yield f"the crash path was to be of generation {generation}, not {' and '.join(told) or 'untold'}"
    if reports and lapic is not None and modes != [lapic]:
        yield f"the local APICs were to be in {lapic} mode, not {' and '.join(modes) or 'unread'}"
    if reports and cpu is not None and cpus != {cpu}:
        yield f"CPU {cpu} was to crash, not {' and '.join(sorted(map(str, cpus)))}"


def generations(reports: Sequence[Json]) -> list[str]:
    """Those that the reports tell."""
    return sorted({report["generation"]["id"] for report in reports if report["generation"]})


def lapic_modes(reports: Sequence[Json]) -> list[str]:
    """The modes of all local APICs before the crash."""
    findings = [finding for report in reports for finding in report["findings"]]
    return sorted({str(f["observed"]) for f in findings if (f["check"], f["stage"]) == ("lapic-mode", "normal")})


def folder(path: str | Path) -> Path:
    """A folder for what a run leaves, made where it is not there. Raises LabError."""
    with _left_in(Path(path)):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def machine(
    output: Path, specification: Specification, progress: Progress = lambda text: None, fresh: bool = False
) -> Iterator[Machine]:
    """A machine whose logs are in `output` whatever happens to it."""
    with up(specification, progress=progress, fresh=fresh) as lab:
        try:
            yield lab
        finally:
            with _left_in(output):
                for log in (lab.serial_log, lab.qemu_log, lab.paths.line_log):
                    if log.exists():
                        shutil.copy(log, output)


@contextlib.contextmanager
def _left_in(output: Path) -> Iterator[None]:
    """What a run leaves cannot be left: a step that failed, not bad usage. Raises LabError."""
    try:
        yield
    except OSError as error:
        raise LabError(f"running the lab: {error.filename or output}: {error.strerror or error}") from error


def follow(lab: Machine, output: Path, crash: Callable[[], None], **options: Any) -> Json:
    """The report on a crash that `crash` causes, also left as `trace.json` and `trace.xml`; `options` are `trace`'s."""
    from xencrash.cli import render
    from xencrash.trace import trace

    report = trace(
        f"gdb:{lab.gdb_socket}",
        str(lab.symbols),
        str(lab.qmp_socket),
        timeout=_CRASH_BEGINS_IN,
        trigger=crash,
        **options,
    )
    with _left_in(output):
        for name, format in (("trace.json", "json"), ("trace.xml", "junit")):
            (output / name).write_text(render(report, format), encoding="utf-8")
    return report


def check_vmcore(lab: Machine, output: Path) -> Json:
    """The report on the vmcore that the crash kernel takes, also left as `check.json` beside the `vmcore`."""
    from xencrash.cli import check_dump, render

    vmcore = lab.dumps.vmcore(output / "vmcore")
    options = argparse.Namespace(symbols=str(lab.symbols), base=None, allow_build_id_mismatch=False)
    checked = check_dump(str(vmcore), options).to_json()
    with _left_in(output):
        (output / "check.json").write_text(render(checked, "json"), encoding="utf-8")
    return checked


def _shown_by_gates(args: argparse.Namespace) -> bool:
    """Whether the guest has a fault that only a trace of who writes to gates shows."""
    from xencrash.guests import BY_ID

    return bool(args.fault) and BY_ID[args.fault].gates


def _crash(lab: Machine, args: argparse.Namespace) -> None:
    if args.guest:
        lab.serial.send(b"C")
    else:
        lab.require_busy()
        lab.crash(args.how, args.cpu)
