"""A running machine of the lab. Each thing done to it has a module: serial, dom0, domu, crash, dumps."""

from __future__ import annotations

import contextlib
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from xencrash.lab import crash, dom0
from xencrash.lab.crash import Crash
from xencrash.lab.dom0 import Dom0
from xencrash.lab.domu import DomUs
from xencrash.lab.dumps import Dumps
from xencrash.lab.errors import LabError
from xencrash.lab.process import Process, Progress
from xencrash.lab.qemu import Memory, Paths
from xencrash.lab.runs import State, known_run, runs_folder
from xencrash.lab.serial import Serial

XEN_UP = rb"Brought up \d+ CPUs"
GUEST_UP = rb"^\d+ CPUs ready"
_PHASES = (  # the newest that a log shows is where the machine is
    ("vmcore copied", "line", rb"^@vmcore copied"),
    ("crash kernel runs", "line", rb"^@crash kernel"),
    ("crash kernel runs", "crashed", rb"^crash image: alive"),  # the reference guest's
    ("crashed", "crashed", crash.CRASHED.pattern),
    ("crash kernel loaded", "line", dom0.LOADED),
    ("dom0 runs", "line", dom0.READY),
    ("Xen runs", "serial", XEN_UP),
    ("guest runs", "serial", GUEST_UP),
)


class Machine(Process):
    """A running machine, from `boot.up` or `attach`. A context manager: the machine ends with it."""

    def __init__(
        self,
        paths: Paths,
        state: State,
        temporary: bool,
        progress: Progress,
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        super().__init__(paths, state, temporary, progress, child)
        self.serial = Serial(self)
        self.dom0 = Dom0(self)
        self.domus = DomUs(self, self.dom0)
        self.dumps = Dumps(self)

    @property
    def run_dir(self) -> Path:
        return self.paths.run_dir

    @property
    def gdb_socket(self) -> Path:
        """Of QEMU's gdbstub: `target remote PATH`."""
        return self.paths.gdb

    @property
    def qmp_socket(self) -> Path:
        """For tools; the lab itself uses another socket."""
        return self.paths.qmp

    @property
    def serial_log(self) -> Path:
        """Everything that Xen, dom0's kernel and the crash kernel printed."""
        return self.paths.serial_log

    @property
    def qemu_log(self) -> Path:
        return self.paths.qemu_log

    @property
    def symbols(self) -> Path:
        """An ELF file with the symbols of exactly this build."""
        return Path(self.state.symbols)

    @property
    def qemu_pid(self) -> int:
        return self.state.pid

    @property
    def ram_file(self) -> Path:
        """The guest's RAM as a file that can be mapped: the offset is the physical address (RAM below 2 GiB).

        LabError for a machine with private RAM: one from a snapshot, unless `up` was asked for `shared_ram`, or one
        whose QEMU runs in another machine.
        """
        if self.accel_row.nested:
            raise LabError(f"the RAM of this machine is in another's, as --accel {self.state.accel} has it")
        for link in Path(f"/proc/{self.state.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if Memory.NAME in str(link.readlink()):
                    return link
        raise LabError(f"QEMU (process {self.state.pid}) has no RAM file to share: start it with shared_ram")

    def prepare(self, how: str | None = None, cpu: int | None = None) -> None:
        """What the same crash needs before a debugger is attached."""
        crash.prepare(Crash(how, cpu), self)

    def crash(self, how: str | None = None, cpu: int | None = None) -> None:
        """Crash Xen as `Crash` says, and return when that has begun."""
        crash.cause(Crash(how, cpu), self, self.serial, self.dom0)

    def require_busy(self) -> None:
        """Raise LabError unless dom0's loops and each vCPU of each domU run."""
        self.dom0.require_busy()
        self.domus.require_busy()

    def status(self) -> dict[str, Any]:
        """What runs, how far it got, and where everything is."""
        alive = self.alive()
        logs = {"line": self.read_log(self.paths.line_log), "serial": self.read_log(self.paths.serial_log)}
        boots = list(re.finditer(XEN_UP + b"|" + GUEST_UP, logs["serial"], re.MULTILINE))
        logs["crashed"] = logs["serial"][boots[-1].end() if boots else 0 :]  # not one before a reset
        phase = next((name for name, log, seen in _PHASES if re.search(seen, logs[log], re.MULTILINE)), "started")
        return {
            "run_dir": str(self.run_dir),
            "running": alive,
            "machine": self.qmp("query-status")["status"] if alive else "gone",
            "phase": phase,
            "gdb": str(self.gdb_socket),
            "qmp": str(self.qmp_socket),
            "serial_log": str(self.serial_log),
            "qemu_log": str(self.qemu_log),
            **asdict(self.state),
        }

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down(keep=logs_say_why(error))

    def down(self, keep: bool = False) -> None:
        """End the machine; on a failure (`keep`) its logs stay."""
        self.serial.close()
        self.dom0.close()
        self.end(keep)


def logs_say_why(error: BaseException | None) -> bool:
    """Whether a machine's logs may say why it ended: not if that was asked for (Ctrl-C, SIGTERM)."""
    return isinstance(error, Exception)


def attach(run_dir: str | Path, progress: Progress = lambda text: None) -> Machine:
    """The machine that was left running in `run_dir`. Raises LabError."""
    return Machine(*known_run(run_dir), progress)


def running() -> list[Machine]:
    """The machines that run in folders made by the lab, and the remains of those that died."""
    found = []
    for folder in sorted(runs_folder().glob("*")):
        with contextlib.suppress(LabError):  # a run that just ended, or never began
            found.append(attach(folder))
    return found
