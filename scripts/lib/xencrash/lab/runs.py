"""The folders of the lab's runs: each holds a machine's sockets and logs, and names its process."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from xencrash.lab.errors import LabError
from xencrash.lab.qemu import SOCKET_PATH_LIMIT, Paths, start_time
from xencrash.lab.rows import DEFAULT_ACCEL

_TEMPORARY = "temporary"


@dataclass(frozen=True)
class State:
    """What `state.json` in the run's folder holds: enough to find the machine again."""

    pid: int
    started: int
    symbols: str
    memory_mib: int
    cpus: int
    dom0_vcpus: int
    guest: str  # "Xen 4.17", or the guest's name
    qemu: str
    owned: bool  # it ends with the process that started it
    accel: str = DEFAULT_ACCEL

    def alive(self) -> bool:
        """Whether the machine's process is there, and still the one that was started."""
        return start_time(self.pid) == self.started


def known_run(run_dir: str | Path) -> tuple[Paths, State, bool]:
    """The files of an earlier run, its state, and whether the lab made its folder. Raises LabError."""
    paths = Paths(Path(run_dir).absolute())
    try:
        state = State(**json.loads(paths.state.read_text()))
    except FileNotFoundError as error:
        raise LabError(f"finding the lab: no machine in {run_dir}: xencrash lab status lists those that run") from error
    except (OSError, ValueError, TypeError) as error:
        raise LabError(f"finding the lab: {paths.state} cannot be read ({error}): boot a new one") from error
    return paths, state, (paths.run_dir / _TEMPORARY).exists()


def _runs(folder: Path) -> bool:
    try:
        return known_run(folder)[1].alive()
    except LabError:  # none, or unreadable: no longer of use
        return False


def runs_folder() -> Path:
    """Where runs without a given folder are: a short path, because sockets' paths are limited to 107 bytes."""
    return Path("/tmp") / f"xencrash-{os.getuid()}"


def _sweep(parent: Path) -> None:
    """Remove what failed or killed runs left at least a day ago."""
    for folder in parent.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another machine has just ended
            if not _runs(folder) and time.time() - folder.stat().st_mtime > 86400:
                shutil.rmtree(folder, ignore_errors=True)


def new_run(run_dir: str | Path | None) -> tuple[Paths, bool]:
    """The files of a new run, and whether the lab made its folder, because none was given. Raises LabError."""
    if run_dir is None:
        parent = runs_folder()
        _sweep(parent)
        parent.mkdir(mode=0o700, exist_ok=True)
        found = parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise LabError(f"starting the lab: {parent} is not a folder of this user: remove it, or give --run-dir")
        folder = parent / secrets.token_hex(3)
        folder.mkdir(mode=0o700)
        (folder / _TEMPORARY).touch()
        return Paths(folder), True
    paths = Paths(Path(run_dir).absolute())
    longest = max(len(os.fsencode(path)) for path in paths.sockets)
    if longest > SOCKET_PATH_LIMIT:
        raise LabError(
            f"starting the lab: {run_dir} is too long for the sockets in it "
            f"({longest} bytes, at most {SOCKET_PATH_LIMIT}): give a shorter folder"
        )
    try:
        paths.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"starting the lab: cannot make {run_dir}: {error.strerror}") from error
    if _runs(paths.run_dir):
        raise LabError(f"starting the lab: one already runs in {run_dir}: xencrash lab down --run-dir {run_dir}")
    for path in (*paths.sockets, *paths.logs):
        path.unlink(missing_ok=True)
    return paths, False
