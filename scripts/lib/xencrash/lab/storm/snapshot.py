"""A machine at the beginning of its crash, saved, and started again as often as wanted, each time in the same state.

The devices are QEMU's migration stream, without the RAM (`x-ignore-shared`); the RAM is a file that each machine maps
privately, so that none changes it. A snapshot belongs to one QEMU, one command line and one set of images.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from xen_symbols.targets import hmp
from xen_symbols.targets.qmp import Qmp, QmpError
from xencrash.lab.boot import Recipe
from xencrash.lab.errors import LabError
from xencrash.lab.qemu import Paths, Ram, start
from xencrash.lab.sparse import copy_packed
from xencrash.lab.storm.livetarget import StormTarget
from xencrash.lab.storm.rsp import Gone, Rsp

_START = 30.0  # seconds for a QEMU to answer, on a busy host
_POLL = 0.002


@dataclass(eq=False)
class Live:
    """A stopped machine of the storm's, which may be written to."""

    paths: Paths
    process: subprocess.Popen[bytes] | None  # None: somebody else's to end
    qmp: Qmp
    rsp: Rsp
    target: StormTarget

    def console(self) -> bytes:
        """What it printed after it was started from the snapshot."""
        try:
            return self.paths.serial_log.read_bytes()
        except FileNotFoundError:
            return b""

    def ended(self) -> str:
        """How QEMU ended, if it has: by which event of the machine, or by what happened to QEMU."""
        assert self.process is not None
        try:
            status = self.process.wait(_START)
        except subprocess.TimeoutExpired:
            return "QEMU closed its sockets, but did not exit"
        shutdowns = [event["data"] for event in self.qmp.last_events() if event["event"] == "SHUTDOWN"]
        if status == 0 and shutdowns:
            return f"the machine was reset ({shutdowns[-1].get('reason', 'for no reason given')})"
        said = self.paths.qemu_log.read_text(errors="replace").strip().splitlines()[1:]
        return f"QEMU ended with status {status}" + (f": {said[-1]}" if said else "")

    def close(self) -> None:
        self.rsp.close()
        self.qmp.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """From another thread; whoever uses the machine finds it gone."""
        if self.process is not None:
            self.process.kill()


@dataclass
class Snapshot:
    """`folder` holds the files, and a folder for each machine that runs."""

    recipe: Recipe
    folder: Path
    ram: list[tuple[int, int]] = field(default_factory=list)  # what is RAM or ROM, ends exclusive

    @property
    def ram_file(self) -> Path:
        return self.folder / "ram"

    @property
    def state_file(self) -> Path:
        return self.folder / "state"

    def keep(self, live: Live, ram: Path) -> None:
        """Save the machine, whose RAM is the file `ram`."""
        _ignore_ram(live.qmp)
        live.qmp.execute("migrate", uri=f"exec:cat >{self.state_file}")
        _migrated(live.qmp, "keeping the machine")
        copy_packed(ram, self.ram_file)
        self.ram = hmp.parse_ram(live.qmp.execute("human-monitor-command", command_line="info mtree -f"))

    @contextlib.contextmanager
    def machine(self) -> Iterator[Live]:
        """A machine as it was saved; it ends with the context. It dies with the thread that asks for it."""
        folder = Path(tempfile.mkdtemp(prefix="m", dir=self.folder))
        try:
            paths = Paths(folder)
            self._write_files(paths)
            command = self.recipe.command(paths, Ram(self.ram_file, shared=False), incoming=True)
            live = connected(start(command, paths, owned=True), paths, self.ram)
            try:
                _ignore_ram(live.qmp)
                live.qmp.execute("migrate-incoming", uri=f"exec:cat {self.state_file}")
                _migrated(live.qmp, "starting from the snapshot")
                yield live
            finally:
                live.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write_files(self, paths: Paths) -> None:
        """No experiment runs until the crash kernel reads or writes its disk."""
        with paths.disk.open("wb") as disk:
            disk.truncate((self.recipe.specification.memory_mib + 64) << 20)  # as the machine that was kept has it
        if self.recipe.specification.lapic_row.firmware:
            paths.kernel.write_bytes(self.recipe.kernel())


@contextlib.contextmanager
def folder_for_snapshot() -> Iterator[Path]:
    """In memory if there is room: every experiment reads it. Its name is short, for the sockets in it."""
    shared = "/dev/shm"
    parent = shared if os.access(shared, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix=f"xencrash-storm-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def connected(process: subprocess.Popen[bytes], paths: Paths, ram: list[tuple[int, int]]) -> Live:
    """A QEMU just started, with both its sockets open. On LabError it is ended."""
    opened: list[Qmp | Rsp] = []
    try:
        deadline = time.monotonic() + _START
        while not all(path.exists() for path in paths.sockets):
            if process.poll() is not None or time.monotonic() > deadline:
                said = paths.qemu_log.read_text(errors="replace").strip().splitlines()
                raise LabError(f"starting QEMU: it ended or did not answer: {said[-1] if said else ''}")
            time.sleep(_POLL)
        qmp = Qmp(paths.own_qmp, _START)
        opened.append(qmp)
        rsp = Rsp(paths.gdb, _START)
        opened.append(rsp)
        return Live(paths, process, qmp, rsp, StormTarget(rsp, qmp, ram, paths.run_dir))
    except BaseException as error:
        for one in opened:
            one.close()
        process.kill()
        process.wait()
        if isinstance(error, (QmpError, Gone)):
            raise LabError(f"starting QEMU: {error}") from error
        raise


def _ignore_ram(qmp: Qmp) -> None:
    qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])


def _migrated(qmp: Qmp, step: str) -> None:
    deadline = time.monotonic() + _START
    while (status := qmp.execute("query-migrate").get("status")) != "completed":
        if status in ("failed", "cancelled") or time.monotonic() > deadline:
            raise LabError(f"{step}: QEMU's migration is {status}")
        time.sleep(_POLL)
