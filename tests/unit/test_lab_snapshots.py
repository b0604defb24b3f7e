"""The store of snapshots, without a machine: complete or absent, checked, limited in size, and shared by processes.

More than 400 lines: one store, in whatever state it may be found.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xencrash.lab import boot, dom0, qemu, snapshots
from xencrash.lab.crash import Crash
from xencrash.lab.digests import sha256_of, sparse_digest
from xencrash.lab.errors import LabError
from xencrash.lab.qemu import Boot, Program
from xencrash.lab.snapshots import Snapshot, Snapshots, limit_of_space
from xencrash.lab.specification import Specification

KEY = "0123"
MIB = 1 << 20


def saving(size: int = MIB, about: Any = None) -> Any:
    """Writes a snapshot's files: `ram` has this many bytes that are not zero."""

    def save(folder: Path) -> dict[str, Any]:
        with (folder / "ram").open("wb") as ram:
            ram.truncate(64 * MIB)
            ram.seek(8 * MIB)
            ram.write(b"x" * size)
        (folder / "state").write_bytes(b"devices")
        return about or {}

    return save


def store(tmp_path: Path, limit: int = 100 * MIB, said: list[str] | None = None) -> Snapshots:
    return Snapshots(tmp_path / "snapshots", limit, (said if said is not None else []).append)


def make(kept: Snapshots, key: str = KEY, size: int = MIB, **about: Any) -> None:
    with kept.reserved(key) as snapshot:
        assert not snapshot.exists()
        kept.make(snapshot, saving(size, about))


def names(kept: Snapshots) -> list[str]:
    """The keys of the snapshots kept, and any other files there except locks."""
    return sorted(path.name for path in kept.root.iterdir() if path.suffix != ".lock" and path.name != "lock")


def test_what_was_made_is_there_with_what_was_said_about_it(tmp_path: Path) -> None:
    kept = store(tmp_path)
    make(kept, domus=[[1, [0]]])
    with kept.reserved(KEY) as snapshot:
        assert snapshot.exists()
        assert snapshot.about() == {"domus": [[1, [0]]]}
        assert (snapshot.folder / "state").read_bytes() == b"devices"
        assert MIB <= snapshot.size() < 2 * MIB  # as sparse as it was made
    with kept.reserved("4567") as other:
        assert not other.exists()


@pytest.mark.parametrize("name", ["ram", "state", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "longer", "gone"])
def test_a_damaged_snapshot_is_dropped_and_reported(name: str, damage: str, tmp_path: Path) -> None:
    said: list[str] = []
    kept = store(tmp_path, said=said)
    make(kept)
    with kept.reserved(KEY):
        pass  # this process now knows its digests
    path = kept.root / KEY / name
    if damage == "gone":
        path.unlink()
    elif damage == "longer":
        os.truncate(path, path.stat().st_size + (0 if name == "manifest.json" else 1))
        if name == "manifest.json":
            path.write_text(path.read_text() + "}")
    else:
        with path.open("r+b") as file:
            file.seek(8 * MIB + 5 if name == "ram" else 0)
            file.write(b"!")
    with kept.reserved(KEY) as snapshot:
        assert not snapshot.exists()
        kept.make(snapshot, saving())
    assert len(said) == 1
    assert said[0].startswith(f"the snapshot {kept.root / KEY} is deleted, and the machine booted: ")
    with kept.reserved(KEY) as snapshot:
        assert snapshot.exists()


def test_an_unusable_one_is_made_again(tmp_path: Path) -> None:
    kept = store(tmp_path)
    make(kept)
    with kept.reserved(KEY, anew=True) as snapshot:
        assert not snapshot.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, LabError])
def test_nothing_is_left_of_one_that_was_not_finished(error: type[BaseException], tmp_path: Path) -> None:
    kept = store(tmp_path)

    def fails(folder: Path) -> dict[str, Any]:
        saving()(folder)
        raise error("ended")

    with pytest.raises(error), kept.reserved(KEY) as snapshot:
        kept.make(snapshot, fails)
    assert names(kept) == []


def _dies_while_saving(root: Path) -> None:
    kept = Snapshots(root, 100 * MIB)

    def save(folder: Path) -> dict[str, Any]:
        saving()(folder)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with kept.reserved(KEY) as snapshot:
        kept.make(snapshot, save)


def test_what_a_killed_process_left_is_not_a_snapshot_and_is_removed(tmp_path: Path) -> None:
    kept = store(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=_dies_while_saving, args=(kept.root,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(kept) == [f".{KEY}"]
    make(kept, "other")
    assert names(kept) == ["other"]
    make(kept)
    assert names(kept) == [KEY, "other"]


def test_the_least_recently_used_are_removed(tmp_path: Path) -> None:
    kept = store(tmp_path, limit=7 * MIB + MIB // 2)
    for key in ("one", "two", "three"):
        make(kept, key, 2 * MIB)
        os.utime(kept.root / key, (len(names(kept)), len(names(kept))))
    with kept.reserved("one"):
        pass  # used just now
    make(kept, "four", 4 * MIB)
    assert names(kept) == ["four", "one"]
    assert sum(snapshot.size() for snapshot in kept.kept()) <= kept.limit
    assert {path.name for path in kept.root.glob("*.lock")} == {"four.lock", "one.lock"}


def test_one_in_use_is_not_removed(tmp_path: Path) -> None:
    kept = store(tmp_path, limit=5 * MIB)
    make(kept, "used", 3 * MIB)
    with kept.reserved("used") as snapshot:
        make(kept, "new", 3 * MIB)
        assert snapshot.problem() is None
    assert names(kept) == ["new", "used"]


def test_one_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    kept = store(tmp_path, limit=2 * MIB)
    make(kept, "small")
    with pytest.raises(OSError, match=r"it takes 3 MiB of a limit of 2 \(\$XENCRASH_SNAPSHOTS\)"):
        make(kept, "large", 3 * MIB)
    assert names(kept) == ["small"]


def _makes(root: Path, made: Any) -> None:
    kept = Snapshots(root, 100 * MIB)
    with kept.reserved(KEY) as snapshot:
        if not snapshot.exists():
            time.sleep(0.5)
            kept.make(snapshot, saving())
            made.put(os.getpid())


def test_of_several_processes_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    processes = [context.Process(target=_makes, args=(tmp_path, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert made.get(timeout=5) in {process.pid for process in processes}
    assert made.empty()


def test_a_waiting_process_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    kept = store(tmp_path, said=said)
    waits = threading.Thread(target=make, args=(kept,))
    with kept.reserved(KEY):
        waits.start()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said == ["waiting for another run of this machine"]
        assert names(kept) == []
    waits.join()
    assert names(kept) == [KEY]


def test_one_is_used_by_several_at_once(tmp_path: Path) -> None:
    kept = store(tmp_path)
    make(kept)
    with kept.reserved(KEY) as one, kept.reserved(KEY) as two:
        assert one.exists() and two.exists()


def test_a_lock_that_was_removed_with_its_snapshot_is_not_held_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path)
    kept.root.mkdir()
    lock = Snapshot(kept.root, KEY).lock
    real = fcntl.flock
    removed: list[bool] = []

    def flock(descriptor: int, how: int) -> None:
        real(descriptor, how)
        if not removed:
            removed.append(True)
            lock.unlink()

    monkeypatch.setattr(snapshots.fcntl, "flock", flock)
    with kept.reserved(KEY):
        assert lock.exists()


@pytest.mark.parametrize(("text", "limit"), [(None, 8 << 30), ("", 8 << 30), ("0", 0), ("0.5", 1 << 29)])
def test_the_limit_is_8_gib_or_what_the_environment_says(
    text: str | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XENCRASH_SNAPSHOTS", raising=False)
    if text is not None:
        monkeypatch.setenv("XENCRASH_SNAPSHOTS", text)
    assert limit_of_space() == limit


def test_a_limit_that_is_not_a_number_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENCRASH_SNAPSHOTS", "lots")
    with pytest.raises(LabError, match=r"\$XENCRASH_SNAPSHOTS is 'lots': give a number of GiB, or 0 for none"):
        limit_of_space()


def test_a_digest_is_of_the_content_not_of_its_holes(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    content = bytes(5 << 16) + b"x" + bytes(200_000)
    full.write_bytes(content)
    with sparse.open("wb") as file:
        file.truncate(len(content))
        file.seek(5 << 16)
        file.write(b"x")
    assert sparse_digest(sparse) == sparse_digest(full)
    full.write_bytes(content + b"\0")
    assert sparse_digest(sparse) != sparse_digest(full)
    full.write_bytes(content[1:] + b"\0")
    assert sparse_digest(sparse) != sparse_digest(full)


def test_a_digest_is_made_again_when_the_file_was_written_to(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    before, times = sha256_of(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_of(path) != before


@pytest.fixture
def recipe(tmp_path: Path) -> boot.Recipe:
    (tmp_path / "qemu").mkdir()
    for name in ("qemu/qemu-system-x86_64", "qemu/bios.bin", "xen", "vmlinux", "dom0.cpio.gz"):
        (tmp_path / name).write_text(name)
    modules = f"{tmp_path}/vmlinux console=hvc0,{tmp_path}/dom0.cpio.gz"
    return boot.Recipe(
        Specification(domu_vcpus=1),
        Program((str(tmp_path / "qemu/qemu-system-x86_64"), "-L", str(tmp_path / "qemu")), "max"),
        Boot(tmp_path / "xen", tmp_path / "syms", "xen noreboot", modules),
    )


@pytest.mark.parametrize("name", ["qemu/qemu-system-x86_64", "qemu/bios.bin", "xen", "vmlinux", "dom0.cpio.gz"])
def test_the_key_is_of_every_file(name: str, recipe: boot.Recipe, tmp_path: Path) -> None:
    before = recipe.key()
    assert recipe.key() == before
    (tmp_path / name).write_text("another")
    assert recipe.key() != before


@pytest.mark.parametrize(
    "fields",
    [
        {"cpus": 3}, {"max_cpus": 8}, {"memory": 2048}, {"crash_kernel": False}, {"pvh": True}, {"qemu_args": ("-X",)},
    ],
)  # fmt: skip
def test_the_key_is_of_the_machine_and_of_what_is_done_after_the_boot(
    fields: dict[str, Any], recipe: boot.Recipe
) -> None:
    other = replace(recipe, specification=replace(recipe.specification, **fields))
    assert other.key() != recipe.key()


def test_the_key_is_of_the_command_lines_and_of_kexec(recipe: boot.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe.key()
    assert replace(recipe, program=replace(recipe.program, cpu="max,-smap")).key() != before
    assert replace(recipe, boot=replace(recipe.boot, append="xen")).key() != before
    monkeypatch.setattr(dom0, "KEXEC", "kexec -l")
    assert recipe.key() != before


def test_the_key_is_not_of_the_run_or_of_how_it_will_crash(recipe: boot.Recipe, tmp_path: Path) -> None:
    for later in ({"crash": Crash("panic")}, {"domu_vcpus": 2}):  # a domU is created in each machine anew
        specification = replace(recipe.specification, **later)  # type: ignore[arg-type]
        assert replace(recipe, specification=specification).key() == recipe.key()
    assert str(tmp_path / "run") not in json.dumps(recipe.command(qemu.Paths(Path("/run")), qemu.Ram(Path("/ram"))))


class Started:
    """Stands for a machine, and how it was started."""

    def __init__(self, how: str) -> None:
        self.how = how


@pytest.fixture
def starting(tmp_path: Path, recipe: boot.Recipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`up` without a QEMU: returns how the machine was started, and what was said."""
    ran: dict[str, Any] = {"save": saving(), "load": None}

    def booted(run: boot.Run, then: Any = None) -> Started:
        assert not any(log.exists() for log in run.paths.logs)
        if then:
            then(argparse.Namespace(progress=run.progress, qmp=lambda command: {"status": "running"}))
        return Started("booted" + " and kept" * bool(then))

    def loaded(run: boot.Run, snapshot: Snapshot, shared_ram: bool) -> Started:
        if ran["load"]:
            run.paths.serial_log.touch()
            raise ran["load"]
        return Started("loaded" + ", shared" * shared_ram)

    monkeypatch.setenv("XENCRASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(boot.Run, "booted", booted)
    monkeypatch.setattr(boot.Run, "loaded", loaded)
    monkeypatch.setattr(boot.saved, "save", lambda machine, folder: ran["save"](folder))
    monkeypatch.setattr(boot, "recipe_of", lambda spec, cache: replace(recipe, specification=spec))

    def start(spec: Specification | None = None, **options: Any) -> tuple[str, list[str]]:
        said: list[str] = []
        machine: Any = boot.up(spec or Specification(), tmp_path / "run", progress=said.append, **options)
        return machine.how, said

    start.ran = ran  # type: ignore[attr-defined]
    return start


def test_the_first_boots_and_the_others_start_from_its_snapshot(starting: Any) -> None:
    assert [starting()[0], starting()[0], starting(shared_ram=True)[0]] == [
        "booted and kept", "loaded", "loaded, shared"
    ]  # fmt: skip
    assert starting(Specification(cpus=2))[0] == "booted and kept"


@pytest.mark.parametrize("fields", [{"paused": True}, {"wait": "xen"}, {"wait": "none"}, {"guest": "rfc-v1"}])
def test_what_tests_booting_boots(fields: dict[str, Any], starting: Any) -> None:
    assert [starting(Specification(**fields))[0] for _ in range(2)] == ["booted", "booted"]


def test_fresh_boots(starting: Any) -> None:
    assert starting(fresh=True)[0] == "booted"
    assert starting()[0] == "booted and kept"
    assert starting(fresh=True)[0] == "booted"


def test_one_that_does_not_start_is_dropped_and_booted(starting: Any) -> None:
    starting()
    starting.ran["load"] = LabError("loading the machine: QEMU ended")
    how, said = starting()
    assert how == "booted and kept"
    assert len(said) == 1 and said[0].endswith("does not start, and is deleted: loading the machine: QEMU ended")
    starting.ran["load"] = None
    assert starting() == ("loaded", [])


@pytest.mark.parametrize("limit", ["0", "0.0001"])
def test_where_there_is_no_room_it_boots_each_time(limit: str, starting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENCRASH_SNAPSHOTS", limit)
    for _ in range(2):
        how, said = starting()
        assert how == ("booted" if limit == "0" else "booted and kept")
        assert [text.partition(":")[0] for text in said] == ["no snapshot is kept of this machine"] * (limit != "0")


def test_a_full_disk_costs_the_snapshot_alone(starting: Any) -> None:
    def full(folder: Path) -> Any:
        raise OSError(28, "No space left on device")

    starting.ran["save"] = full
    how, said = starting()
    assert how == "booted and kept"
    assert said == ["no snapshot is kept of this machine: [Errno 28] No space left on device"]
