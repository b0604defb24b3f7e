"""One crash of a machine: traced, and judged at every stage and in the vmcore; a folder keeps the results."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from xen_symbols.crashpath.complete import COMPLETE
from xen_symbols.crashpath.follow import STALL_SECONDS
from xen_symbols.crashpath.stages import AFTERWARDS
from xen_symbols.report.model import Verdict
from xen_symbols.xen.given import NOTHING_GIVEN, Given
from xencrash.judging import judge_dump
from xencrash.lab.boot import up
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.process import Progress
from xencrash.lab.specification import Specification
from xencrash.options import Request
from xencrash.renderers import html, json, junit
from xencrash.trace import trace

if TYPE_CHECKING:
    from xen_symbols.report import contract


# Seconds. The guest is up in a fraction of one, and Xen handles its crash key at once; but on a busy host dom0's panic
# waits for its turn beside loops and a domU.
_CRASH_BEGINS_IN = 300.0
_COPIED_IN = 120.0  # the vmcore, on a busy host
# What a run leaves besides the logs.
_TRACE = {"trace.json": json, "trace.xml": junit, "trace.html": html}
_CHECK = {"check.json": json, "check.html": html}
_VMCORE = "vmcore"


def unlike(
    reports: Sequence[contract.Report], generation: str | None, lapic: str | None, cpu: int | None
) -> Iterator[str]:
    """How the crash that was judged differs from the one asked for: its verdict then says nothing about the latter.

    `generation` is that of the crash path, `lapic` the mode of all local APICs before the crash, `cpu` the one that
    crashes; None for any. `Machine.require_busy` checks before the crash that a domU and dom0's loops run.
    """
    told, modes, cpus = generations(reports), lapic_modes(reports), {report["crashing_cpu"] for report in reports}
    if reports and generation is not None and told != [generation]:
        yield f"the crash path should be generation {generation}, and is {' and '.join(told) or 'not identified'}"
    if reports and lapic is not None and modes != [lapic]:
        yield f"the local APICs were to be in {lapic} mode, not {' and '.join(modes) or 'unread'}"
    if reports and cpu is not None and cpus != {cpu}:
        yield f"CPU {cpu} was to crash, not {' and '.join(sorted(map(str, cpus)))}"


def generations(reports: Sequence[contract.Report]) -> list[str]:
    """Those that the reports name."""
    return sorted({report["generation"]["id"] for report in reports if report["generation"]})


def lapic_modes(reports: Sequence[contract.Report]) -> list[str]:
    """The modes of all local APICs before the crash."""
    findings = [finding for report in reports for finding in report["findings"]]
    return sorted({str(f["observed"]) for f in findings if (f["check"], f["stage"]) == ("lapic-mode", "normal")})


def folder(path: str | Path) -> Path:
    """A folder for the results of a run, made if it does not exist, and without an earlier run's: they would be taken
    for this one's if it ends early. Raises LabError."""
    with _left_in(Path(path)):
        Path(path).mkdir(parents=True, exist_ok=True)
        for name in (*_TRACE, *_CHECK, _VMCORE):
            if (old := Path(path) / name).is_file():
                old.unlink()
    return Path(path)


@contextlib.contextmanager
def machine(
    output: Path, specification: Specification, progress: Progress = lambda text: None, fresh: bool = False
) -> Iterator[Machine]:
    """A machine whose logs are in `output` whatever happens to it."""
    with up(specification, progress=progress, fresh=fresh) as made:
        try:
            yield made
        finally:
            with _left_in(output):
                for log in (made.serial_log, made.qemu_log, made.paths.line_log):
                    if log.exists():
                        shutil.copy(log, output)


@contextlib.contextmanager
def _left_in(output: Path) -> Iterator[None]:
    """The results of a run cannot be written: a failed step, not bad usage. Raises LabError."""
    try:
        yield
    except OSError as error:
        raise LabError(f"running the lab: {error.filename or output}: {error.strerror or error}") from error


def follow(machine: Machine, output: Path, crash: Callable[[], None], **options: Any) -> contract.Report:
    """The report on a crash that `crash` causes, also left as the files of _TRACE; `options` are `trace`'s."""
    report = trace(
        f"gdb:{machine.gdb_socket}",
        str(machine.symbols),
        str(machine.qmp_socket),
        timeout=_CRASH_BEGINS_IN,
        stall=STALL_SECONDS * machine.accel_row.slower,
        trigger=crash,
        **options,
    )
    _leave(report, output, _TRACE)
    return report


def was_followed(report: contract.Report) -> bool:
    """Whether a crash was followed to its end, whatever is not known of its path: a vmcore is to be had."""
    if any((f["check"], f["verdict"]) == (COMPLETE.id, Verdict.FAIL.word) for f in report["findings"]):
        return False
    return not report.get("undecided") or [stage["stage"] for stage in report["stages"]][-1:] == [AFTERWARDS.id]


def check_vmcore(machine: Machine, output: Path, given: Given = NOTHING_GIVEN) -> contract.Report:
    """The report on the vmcore that the crash kernel takes, also left as the files of _CHECK beside the `vmcore`."""
    vmcore = machine.dumps.vmcore(output / _VMCORE, _COPIED_IN * machine.accel_row.slower)
    checked = judge_dump(Request(str(vmcore), str(machine.symbols), given=given)).to_json()
    _leave(checked, output, _CHECK)
    return checked


def _leave(report: contract.Report, output: Path, files: Mapping[str, ModuleType]) -> None:
    with _left_in(output):
        for name, renderer in files.items():
            with (output / name).open("w", encoding="utf-8") as file:
                renderer.write(report, file)
