"""Crashing Xen: how, on which CPU, and what the machine needs for that."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xencrash.guests import generations
from xencrash.lab.dom0 import Dom0
from xencrash.lab.errors import BadSpecification, LabError
from xencrash.lab.planted import MAKES_IT, plant
from xencrash.lab.process import Process
from xencrash.lab.serial import Serial


@dataclass(frozen=True)
class Way:
    """One way to crash Xen; `lab crash --help` describes each.

    `by_dom0`: on the CPU where dom0 begins it. `planted`: something is written into Xen before (planted.py). `cpus` are
    those that it can be given; None for any, with `not_chosen` the reason where not all can. `xen_args` and `cpu_args`
    are what Xen's command line and QEMU's -cpu need for it.
    """

    name: str
    by_dom0: bool = False
    planted: bool = False
    cpus: tuple[int, ...] | None = None
    not_chosen: str = ""
    xen_args: str = ""
    cpu_args: str = ""


WAYS = {
    way.name: way
    for way in (
        Way(
            "key",
            cpus=(),
            not_chosen="crashes the CPU that takes the serial interrupt: leave --cpu out, or give --how panic",
        ),
        Way("panic", by_dom0=True),
        Way(
            "nmi",
            cpus=(0,),
            not_chosen="crashes CPU 0, the only one whose LINT1 Xen unmasks: leave --cpu out",
            xen_args="nmi=fatal",  # without it an NMI that it cannot explain may go to dom0
        ),
        # TCG has no performance counters, which would send the watchdog's NMIs: the stuck CPU sends them to itself.
        Way("watchdog", by_dom0=True, planted=True, xen_args="watchdog=force"),
        # TCG's CPU is a K8, in whose machine-check handler Xen calls what only later families have, and dies of #UD.
        Way("mce", planted=True, cpu_args="family=16"),
        Way("bug", by_dom0=True, planted=True),
        Way("page-fault", by_dom0=True, planted=True),
        Way("double-fault", by_dom0=True, planted=True),
    )
}
# Bank 4's IA32_MCi_STATUS: valid, uncorrected, enabled, MISC and ADDR valid, context corrupt, a data read of the
# cache (an error code of 0 has no type, and is a BUG in Xen); IA32_MCG_STATUS: RIPV and MCIP (SDM vol. 3, "Machine-
# Check Architecture"). No handler can continue after that.
FATAL_MCE = "4 0xbe00000000000135 0x5 0 0"
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

    `how` is one of WAYS, or None: by the key, or where a CPU is chosen by panic. `cpu` is the CPU to crash on; None for
    any. Where dom0 has a part in it, dom0 must have a vCPU on each CPU to choose one.
    """

    how: str | None = None
    cpu: int | None = None

    def __post_init__(self) -> None:
        if self.how not in (None, *WAYS):
            raise BadSpecification(f"--how is {' or '.join(WAYS)}, not {self.how!r}")
        if self.cpu is not None and self.way.cpus is not None and self.cpu not in self.way.cpus:
            raise BadSpecification(f"--how {self.how} {self.way.not_chosen}")

    @property
    def way(self) -> Way:
        return WAYS[self.how or ("key" if self.cpu is None else "panic")]

    def require_cpu(self, cpus: int) -> None:
        """Raise BadSpecification if a machine with this many CPUs does not have the chosen one."""
        if self.cpu is not None and not 0 <= self.cpu < cpus:
            raise BadSpecification(f"--cpu {self.cpu}: the machine's CPUs are 0 to {cpus - 1}")

    def require_vcpus(self, cpus: int, dom0_vcpus: int) -> None:
        """Raise BadSpecification if dom0 cannot panic on the chosen CPU."""
        self.require_cpu(cpus)
        if self.cpu is not None and self.way.by_dom0 and dom0_vcpus != cpus:
            raise BadSpecification(
                f"--cpu {self.cpu} needs a vCPU of dom0 on every CPU: boot the machine with --dom0-vcpus {cpus}"
            )


def crashes(cpus: int) -> Iterator[Crash]:
    """Each way on each CPU of a machine that has so many."""
    for way in WAYS.values():
        for cpu in range(cpus) if way.cpus is None else way.cpus or (None,):
            yield Crash(way.name, cpu)


def prepare(crash: Crash, process: Process) -> None:
    """What must be done before a debugger is attached. Raises LabError."""
    _require_booted_for(crash, process)
    if not crash.way.planted:
        return
    _require_running(process)
    name = crash.way.name
    if held_by_debugger(process):
        raise LabError(f"crashing Xen: --how {name} needs QEMU's gdbstub, and a debugger is attached: detach it")
    try:
        note = plant(name, process.paths.gdb, Path(process.state.symbols), process.state.cpus)
    finally:
        process.qmp("cont")
    if note:
        process.progress(note)


def _require_booted_for(crash: Crash, process: Process) -> None:
    words = crash.way.xen_args
    if words and not re.search(rb"Command line:.*\b" + words.encode(), process.read_log(process.paths.serial_log)):
        raise LabError(
            f"crashing Xen: --how {crash.way.name} does not crash it as it was booted: give lab up --xen-args {words}"
        )


def cause(crash: Crash, process: Process, serial: Serial, dom0: Dom0) -> None:
    """Crash Xen, and return when that has been typed, or dom0 has begun to."""
    _require_running(process)
    if process.state.guest in generations():  # whose console has no shell, and whose CPU is chosen when it boots
        if crash != Crash():
            raise BadSpecification("--how and --cpu are for real Xen: the reference guest crashes as it was booted to")
        serial.send(b"C")
        return
    _require_booted_for(crash, process)
    name = crash.way.name
    if name == "key":
        serial.to_xen()
        serial.send(b"C")
    elif name == "nmi":
        process.qmp("inject-nmi")
    elif name == "mce":
        if said := process.qmp("human-monitor-command", command_line=f"mce {crash.cpu or 0} {FATAL_MCE}").strip():
            raise LabError(f"crashing Xen: QEMU made no machine check: {said}")
    else:
        panic = MAKES_IT if crash.way.planted else "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger"
        if crash.cpu is not None:
            panic = f"taskset -p {1 << crash.cpu:x} $$ >/dev/null && {{ {panic}; }}"
        since = serial.size()
        dom0.begin_last(panic, gone=lambda: _seen(process, since))


def wait_until_seen(process: Process, since: int, timeout: float = 60.0) -> None:
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
