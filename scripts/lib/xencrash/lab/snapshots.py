"""The snapshots of booted machines, in the cache: complete or absent, checked before use, limited in size.

A snapshot is a folder, named by its key, with a lock beside it. The holder of the exclusive lock may make or remove it;
holders of the shared lock may use it. A folder whose name begins with a dot is being made or removed, or was when its
process died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xencrash.lab.digests import sparse_digest
from xencrash.lab.errors import LabError
from xencrash.lab.process import Progress

LIMIT_GIB = 8.0
LIMIT_VARIABLE = "XENCRASH_SNAPSHOTS"
_MANIFEST = "manifest.json"


def limit_of_space() -> int:
    """How many bytes all snapshots may take: $XENCRASH_SNAPSHOTS GiB, by default 8. Raises LabError."""
    text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GIB)
    try:
        return int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        raise LabError(f"snapshots: ${LIMIT_VARIABLE} is {text!r}: give a number of GiB, or 0 for none") from None


class Snapshot:
    """One snapshot: the saved files, and `about`, what else is needed to start from them."""

    def __init__(self, root: Path, key: str) -> None:
        self.key = key
        self.folder = root / key
        self.unfinished = root / f".{key}"
        self.lock = root / f"{key}.lock"

    def exists(self) -> bool:
        return self.folder.exists()

    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text())["about"]
        return about

    def problem(self) -> str | None:
        """Why it cannot be used: a file is not as it was saved. None if all are."""
        try:
            files = json.loads((self.folder / _MANIFEST).read_text())["files"]
            for name, (size, digest) in files.items():
                path = self.folder / name
                if path.stat().st_size != size or sparse_digest(path) != digest:
                    return f"{name} is not what was saved"
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f"it cannot be read ({error})"
        return None

    def size(self) -> int:
        """What it takes on the disk, in bytes."""
        return sum(path.stat().st_blocks * 512 for path in (self.folder, *self.folder.iterdir()))

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(self.unfinished)
        shutil.rmtree(self.unfinished, ignore_errors=True)


class Snapshots:
    """The snapshots in a folder, which several processes may use at once."""

    def __init__(self, root: Path, limit: int, progress: Progress = lambda text: None) -> None:
        self.root = root
        self.limit = limit
        self.progress = progress

    @contextlib.contextmanager
    def reserved(self, key: str, anew: bool = False) -> Iterator[Snapshot]:
        """The snapshot of a key: complete, to be used; or absent, to be made by the caller alone while others wait.

        With `anew` an existing one is removed.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        snapshot = Snapshot(self.root, key)
        if not anew and snapshot.exists():
            with self._locked(snapshot, fcntl.LOCK_SH):
                problem = snapshot.problem() if snapshot.exists() else "it has just been removed"
                if problem is None:
                    os.utime(snapshot.folder)
                    yield snapshot
                    return
            self.progress(f"the snapshot {snapshot.folder} is deleted, and the machine booted: {problem}")
        with self._locked(snapshot, fcntl.LOCK_EX):
            if anew or not snapshot.exists() or snapshot.problem() is not None:
                snapshot.remove()
            yield snapshot

    def make(self, snapshot: Snapshot, save: Callable[[Path], dict[str, Any]]) -> None:
        """Have `save` write files into a folder, and keep them with what it returns as `about`.

        Others are removed for it, least recently used first. Raises OSError; after any exception nothing is left.
        """
        folder = snapshot.unfinished
        try:
            folder.mkdir(mode=0o700)
            about = save(folder)
            files = {path.name: (path.stat().st_size, sparse_digest(path)) for path in sorted(folder.iterdir())}
            (folder / _MANIFEST).write_text(json.dumps({"about": about, "files": files}, indent=1))
            self._make_room(sum(path.stat().st_blocks * 512 for path in folder.iterdir()))
            folder.rename(snapshot.folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Remove what is not in use, until `size` more bytes are within the limit."""
        if size > self.limit:
            raise OSError(28, f"it takes {size >> 20} MiB of a limit of {self.limit >> 20} (${LIMIT_VARIABLE})")
        with _flock(self.root / "lock", fcntl.LOCK_EX):
            self._sweep()
            kept = sorted(self.kept(), key=lambda other: other.folder.stat().st_mtime)
            total = size + sum(other.size() for other in kept)
            for other in kept:
                if total <= self.limit:
                    break
                with contextlib.suppress(BlockingIOError), self._locked(other, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    total -= other.size()
                    other.remove()
                    other.lock.unlink()

    def kept(self) -> list[Snapshot]:
        """Those that are there."""
        folders = (path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [Snapshot(self.root, path.name) for path in folders]

    def _sweep(self) -> None:
        """Remove what killed processes left."""
        for path in self.root.glob(".*"):
            left = Snapshot(self.root, path.name[1:])
            with contextlib.suppress(BlockingIOError), self._locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, snapshot: Snapshot, how: int) -> Iterator[None]:
        while True:
            with _flock(snapshot.lock, how, lambda: self.progress("waiting for another run of this machine")) as lock:
                if os.fstat(lock).st_nlink:  # else it was removed with its snapshot
                    yield
                    return


@contextlib.contextmanager
def _flock(path: Path, how: int, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the lock on a file (flock(2)). `waiting` is called if that takes time; BlockingIOError with LOCK_NB."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if how & fcntl.LOCK_NB:
                raise
            waiting()
            fcntl.flock(lock, how)
        yield lock
    finally:
        os.close(lock)
