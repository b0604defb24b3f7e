"""What the pytest plugin (xencrash.pytest_plugin) does with the lab."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xen_symbols.report.blocks import why_not_pass
from xencrash.lab import judged
from xencrash.lab.crash import Crash
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.own import own_xen
from xencrash.lab.rows import DEFAULT_QEMU
from xencrash.lab.specification import Specification

if TYPE_CHECKING:
    from xen_symbols.report import contract


@dataclass(frozen=True)
class Judged:
    """A trace, or a dump, and what it was found to be. `report` is the JSON report; `path` the vmcore, or the folder of
    the trace's files."""

    report: contract.Report
    path: Path

    @property
    def verdict(self) -> str:
        """`pass`, `fail` or `unknown`."""
        return self.report["verdict"]

    @property
    def why(self) -> str:
        """What did not pass, in a line; empty if all did."""
        return why_not_pass(self.report)


def specification(
    image: str, symbols: str | None, qemu: str | None, cpus: int, xen_args: str, crash: Crash
) -> Specification:
    """The machine that is asked for, to be crashed so. Raises BadSpecification."""
    return Specification(
        xen_image=own_xen(image, symbols),
        qemu=qemu or DEFAULT_QEMU,
        cpus=cpus,
        dom0_vcpus=None if crash.cpu is None else cpus,  # otherwise the machine, and the snapshot, of a plain `lab run`
        xen_args=xen_args,
        crash=crash,
    )


def check(wanted: Specification) -> None:
    """Raise BadSpecification unless the image and its symbols go together."""
    assert wanted.xen_image is not None
    wanted.xen_image.check(crash_kernel=True)


def machine(output: Path, wanted: Specification) -> AbstractContextManager[Machine]:
    """The machine, whose logs are left in the folder. Raises LabError."""
    return judged.machine(judged.folder(output), wanted)


def traced(lab: Machine, crash: Crash, output: Path) -> Judged:
    """Crash it, and judge each stage. Raises Undecidable."""
    lab.prepare(crash.how, crash.cpu)
    return Judged(judged.follow(lab, output, lambda: lab.crash(crash.how, crash.cpu)), output)


def dumped(lab: Machine, trace: Judged, output: Path) -> Judged:
    """The vmcore of the crash that was traced. Raises Undecidable."""
    if not judged.was_followed(trace.report):
        raise LabError(f"no vmcore is taken, since the crash was not followed to its end: {trace.why}")
    return Judged(judged.check_vmcore(lab, output), output / "vmcore")
