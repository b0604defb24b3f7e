"""Crashing Xen: how, on which CPU, and what the machine needs for that."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from xencrash.guests import generations
from xencrash.lab.dom0 import Dom0
from xencrash.lab.errors import BadSpecification, LabError
from xencrash.lab.planted import CODE, MAKES_IT, plant
from xencrash.lab.process import Process
from xencrash.lab.serial import Serial

WAYS = ("key", "panic", "nmi", *CODE)
_BY_DOM0 = ("panic", *CODE)  # on the CPU that dom0 runs on
# Why a way does not take a CPU, of those that do not take any.
_NOT_CHOSEN = {
    "key": "--how key crashes the CPU that takes the serial interrupt: leave --cpu out, or give --how panic",
    "nmi": "--how nmi crashes CPU 0, the only one whose LINT1 Xen unmasks: leave --cpu out",
}
# What cannot be done on the lab's machines, and why.
_CANNOT = {
    "mce": "a machine check of QEMU's does not end Xen 4.17 on an AMD CPU, which TCG's is: give --how nmi",
    "watchdog": "Xen's watchdog counts with performance counters, which TCG lacks (Xen says that it is stuck): "
    "--how nmi takes the same way through an NMI",
}
_FATAL_NMI = "nmi=fatal"  # Xen's option: without it an NMI that it cannot explain may go to dom0
_RESUMES_IN = 5.0  # seconds from gdb's "running" to QEMU's, on a loaded host
# What Xen, or the reference guest, prints when it begins to crash.
CRASHED = re.compile(
    rb"^(?:\(XEN\) )?(?:'C' pressed -> triggering crashdump|Panic on CPU \d+|(?:.* )?Executing kexec image on cpu)",
    re.MULTILINE,
)
_SHOWN = re.compile(rb"triggering crashdump|crashing|kexec image|panic", re.IGNORECASE)


@dataclass(frozen=True)
class Crash:
    """A crash of Xen. Raises BadSpecification for what cannot be.

    `how` is "key" (Xen's crash key, pressed on its console: the CPU that takes the serial interrupt crashes, not always
    CPU 0), "panic" (dom0's kernel panics), "nmi" (an NMI that Xen takes for fatal: the crash begins inside it, on CPU
    0), "bug", "page-fault" or "double-fault" (Xen's own, by code that is
    planted in a hypercall) or None (by the key, or where a CPU is chosen by panic). `cpu` is the CPU to crash on; None
    for any. Where dom0 has a part in it, dom0 must have a vCPU on each CPU to choose one.
    """

    how: str | None = None
    cpu: int | None = None

    def __post_init__(self) -> None:
        if self.how in _CANNOT:
            raise BadSpecification(f"--how {self.how}: {_CANNOT[self.how]}")
        if self.how not in (None, *WAYS):
            raise BadSpecification(f"--how is {' or '.join(WAYS)}, not {self.how!r}")
        if self.how in _NOT_CHOSEN and self.cpu not in (None, 0 if self.how == "nmi" else None):
            raise BadSpecification(_NOT_CHOSEN[self.how])

    @property
    def way(self) -> str:
        return self.how or ("key" if self.cpu is None else "panic")

    @property
    def xen_args(self) -> str:
        """What Xen's command line needs for it."""
        return _FATAL_NMI if self.how == "nmi" else ""

    def require_cpu(self, cpus: int) -> None:
        """Raise BadSpecification if a machine with this many CPUs does not have the chosen one."""
        if self.cpu is not None and not 0 <= self.cpu < cpus:
            raise BadSpecification(f"--cpu {self.cpu}: the machine's CPUs are 0 to {cpus - 1}")

    def require_vcpus(self, cpus: int, dom0_vcpus: int) -> None:
        """Raise BadSpecification if dom0 cannot panic on the chosen CPU."""
        self.require_cpu(cpus)
        if self.cpu is not None and self.way in _BY_DOM0 and dom0_vcpus != cpus:
            raise BadSpecification(
                f"--cpu {self.cpu} needs a vCPU of dom0 on every CPU: boot the machine with --dom0-vcpus {cpus}"
            )


def prepare(crash: Crash, process: Process) -> None:
    """What must be done before a debugger is attached. Raises LabError."""
    if crash.way not in CODE:
        return
    _require_running(process)
    if held_by_debugger(process):
        raise LabError(f"crashing Xen: --how {crash.way} needs QEMU's gdbstub, and a debugger is attached: detach it")
    try:
        plant(crash.way, process.paths.gdb, Path(process.state.symbols), process.state.cpus)
    finally:
        process.qmp("cont")


def cause(crash: Crash, process: Process, serial: Serial, dom0: Dom0) -> None:
    """Crash Xen, and return when that has been typed, or dom0 has begun to."""
    _require_running(process)
    if process.state.guest in generations():  # whose console has no shell, and whose CPU is chosen when it boots
        if crash != Crash():
            raise BadSpecification("--how and --cpu are for real Xen: the reference guest crashes as it was booted to")
        serial.send(b"C")
        return
    if crash.way == "key":
        serial.to_xen()
        serial.send(b"C")
        return
    if crash.way == "nmi":
        if not re.search(rb"Command line:.*\b" + _FATAL_NMI.encode(), process.read_log(process.paths.serial_log)):
            raise LabError(f"crashing Xen: an NMI does not crash it as it was booted: give --xen-args {_FATAL_NMI}")
        process.qmp("inject-nmi")
        return
    panic = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger"
    if crash.way in CODE:
        panic = MAKES_IT
    if crash.cpu is not None:
        panic = f"taskset -p {1 << crash.cpu:x} $$ >/dev/null && {{ {panic}; }}"
    since = serial.size()
    dom0.begin_last(panic, gone=lambda: _seen(process, since))


def wait_until_seen(process: Process, since: int, timeout: float = 10.0) -> None:
    """Wait until the crash shows on the console after offset `since`, or a debugger has stopped the machine."""
    process.until("crashing Xen", timeout, lambda: _seen(process, since) or None)


def _seen(process: Process, since: int) -> bool:
    stopped = process.qmp("query-status")["status"] != "running"
    return stopped or _SHOWN.search(process.read_log(process.paths.serial_log, since)) is not None


def _require_running(process: Process) -> None:
    """A gdb that has just let the machine run says so before QEMU has heard of it: that moment is waited for."""
    deadline = time.monotonic() + _RESUMES_IN
    told = False
    while (status := process.qmp("query-status")["status"]) != "running":
        who = "a debugger is attached to the machine" if held_by_debugger(process) else "the machine is stopped"
        if time.monotonic() > deadline:
            raise LabError(f"crashing Xen: {who} ({status}): let it run first")
        if not told:
            process.progress(f"{who} ({status}): waiting up to {_RESUMES_IN:.0f} s for it to run")
            told = True
        time.sleep(0.02)


def held_by_debugger(process: Process) -> bool:
    """Whether a debugger is attached to the gdbstub."""
    stubs = [device["filename"] for device in process.qmp("query-chardev") if device["label"] == "gdb"]
    return bool(stubs) and not stubs[0].startswith("disconnected:")
