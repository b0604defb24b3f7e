"""One QEMU process of the lab: its files, its output, its monitor, and waiting for it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from xen_symbols.targets.qmp import Qmp, QmpError
from xencrash.lab.errors import LabError
from xencrash.lab.qemu import Paths, end
from xencrash.lab.rows import ACCELS, AccelRow
from xencrash.lab.runs import State

Progress = Callable[[str], None]
_T = TypeVar("_T")


class Process:
    """A QEMU, and the files of its run. `temporary`: the run's folder is ours to remove."""

    def __init__(
        self,
        paths: Paths,
        state: State,
        temporary: bool,
        progress: Progress,
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.paths = paths
        self.state = state
        self.progress = progress
        self._temporary = temporary
        self.child = child  # if this process started it

    @property
    def accel_row(self) -> AccelRow:
        return ACCELS[self.state.accel]

    def alive(self) -> bool:
        return self.state.alive()

    def qmp(self, command: str, /, timeout: float = 10.0, **arguments: Any) -> Any:
        """One QMP command on the lab's own socket."""
        try:
            with Qmp(self.paths.own_qmp) as client:
                return client.execute_for(timeout, command, **arguments)
        except QmpError as error:
            if not self.alive():
                raise LabError(f"QEMU is gone: {self.where_to_look()}") from error
            raise LabError(f"asking QEMU: {error}: {self.where_to_look()}") from error

    def until(self, step: str, timeout: float, ready: Callable[[], _T | None]) -> _T:
        """What `ready` returns once it is not None. Raises LabError when QEMU ends, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        pause = 0.002
        while True:
            alive = self.alive()  # before looking, so that the last output of a dying QEMU is seen
            if (found := ready()) is not None:
                return found
            if not alive:
                raise LabError(f"{step}: QEMU ended: {self.where_to_look()}")
            if time.monotonic() > deadline:
                raise LabError(f"{step}: nothing after {timeout:.0f} s: {self.where_to_look()}")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def wait_log(self, log: Path, pattern: str | bytes, timeout: float, step: str, since: int = 0) -> re.Match[bytes]:
        """Wait until what a log holds from offset `since` on matches."""
        wanted = re.compile(pattern.encode() if isinstance(pattern, str) else pattern, re.MULTILINE)
        return self.until(step, timeout, lambda: wanted.search(self.read_log(log, since)))

    @staticmethod
    def log_size(log: Path) -> int:
        try:
            return log.stat().st_size
        except FileNotFoundError:
            return 0

    @staticmethod
    def read_log(log: Path, since: int = 0) -> bytes:
        try:
            with log.open("rb") as stream:
                stream.seek(since)
                return stream.read()
        except FileNotFoundError:
            return b""

    def where_to_look(self) -> str:
        """The last words of QEMU or of the console, and where the logs are."""
        serial_log, qemu_log = self.paths.serial_log, self.paths.qemu_log
        if said := self._last_line(qemu_log, skip=1):
            return f"QEMU said {said!r}; see {qemu_log} and {serial_log}"
        return f"the console's last line is {self._last_line(serial_log)!r}; see {serial_log}"

    def _last_line(self, log: Path, skip: int = 0) -> str:
        lines = [line.strip() for line in self.read_log(log).decode(errors="replace").splitlines()[skip:]]
        return next((line for line in reversed(lines) if line), "")

    def end(self, keep: bool) -> None:
        """End QEMU and remove what is no longer useful; the logs stay if `keep` or the folder was given."""
        end(self.state.pid, self.state.started)
        if self.child is not None:
            self.child.kill()  # no-op once it is gone; makes the wait below end
            self.child.wait()
        for paths in (self.paths, Paths(self.paths.outer)):
            for path in (*paths.sockets, paths.disk, paths.kernel, paths.state):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.paths.placed, ignore_errors=True)
        if self._temporary and not keep:
            shutil.rmtree(self.paths.run_dir, ignore_errors=True)
