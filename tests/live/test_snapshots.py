"""Machines from snapshots: judged as booted ones are, private to whoever starts them, and booted where need be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import booted
from xencrash.lab import saved
from xencrash.lab.boot import up
from xencrash.lab.errors import LabError
from xencrash.lab.judged import check_vmcore
from xencrash.lab.machine import Machine, attach
from xencrash.lab.packages import default_root
from xencrash.lab.qemu import start_time
from xencrash.lab.snapshots import Snapshots
from xencrash.lab.specification import Specification
from xencrash.trace import trace

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("default_row")]

Json = dict[str, Any]
ROWS = [{}, {"qemu": "10.0"}, {"qemu": "10.0", "lapic": "x2apic-firmware"}, {"domu_vcpus": 4}]
PLAIN = Specification(dom0_vcpus=4)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with all that was fetched and made, and no snapshots."""
    root = tmp_path / "cache"
    root.mkdir()
    for name in ("made", "packages", "suites", "guests"):
        (root / name).symlink_to(default_root() / name)
    monkeypatch.setenv("XENCRASH_CACHE", str(root))
    return root


def started(spec: Specification, **options: Any) -> tuple[Machine, str]:
    """A machine, and all that was said while it was started."""
    told: list[str] = []
    return up(spec, progress=told.append, **options), "\n".join(told)


def kept() -> None:
    """Make sure that there is a snapshot of the plain machine."""
    up(PLAIN).down()


def followed(lab: Machine) -> Json:
    lab.require_busy()
    return trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60,
                 trigger=lambda: lab.crash("panic", 2))  # fmt: skip


def judged(report: Json, busy: bool) -> list[tuple[Any, ...]]:
    """What a report says, without what differs from one crash of the same machine to the next.

    Where a guest runs (`busy`), what does not apply depends on which CPUs are in it at the moment.
    """
    return sorted((f["stage"], f["check"], f["cpu"] or 0, busy or f["verdict"]) for f in report["findings"])


@pytest.mark.parametrize("fields", ROWS, ids=lambda fields: "-".join(map(str, fields.values())) or "plain")
def test_one_from_a_snapshot_is_judged_as_a_booted_one(fields: Json, tmp_path: Path) -> None:
    spec = Specification(**fields, dom0_vcpus=4)
    up(spec).down()
    lab, told = started(spec)
    reports = []
    with lab:
        assert "from a snapshot" in told and "dom0 is up" not in told
        assert lab.status()["phase"] == "crash kernel loaded"
        # What was printed before is there, and what is printed now comes behind it.
        console = lab.serial_log.read_text(errors="replace")
        assert console.count("Xen version 4.17") == 1 and "Brought up 4 CPUs" in console
        assert abs(int(lab.dom0.run("date +%s")) - time.time()) < 60
        assert float(lab.dom0.run("cut -d ' ' -f 1 /proc/uptime")) < 600
        reports += [followed(lab), check_vmcore(lab, tmp_path)]
        assert lab.serial_log.read_text(errors="replace").count("Executing kexec image on cpu2") == 1
    with booted(**fields, dom0_vcpus=4) as lab:
        reports += [followed(lab), check_vmcore(lab, tmp_path)]
    assert [report["verdict"] for report in reports] == ["pass"] * 4
    assert {report["crashing_cpu"] for report in reports} == {2}
    assert len({report["generation"]["id"] for report in reports}) == 1
    for one, other in ((reports[0], reports[2]), (reports[1], reports[3])):
        assert judged(one, spec.domu_vcpus > 0) == judged(other, spec.domu_vcpus > 0)


def test_machines_from_one_snapshot_are_private(tmp_path: Path) -> None:
    kept()
    (one, _), (two, _), (three, _) = started(PLAIN), started(PLAIN), started(PLAIN, shared_ram=True)
    with one, two, three:
        one.dom0.run("echo mine >/note")
        one.crash("panic", 1)
        one.dumps.vmcore(tmp_path / "vmcore").unlink()
        assert two.dom0.status("cat /note")[0] == three.dom0.status("cat /note")[0] == 1
        assert two.status()["phase"] == three.status()["phase"] == "crash kernel loaded"
        with pytest.raises(LabError, match="has no RAM file to share: start it with shared_ram"):
            _ = two.ram_file
        assert three.ram_file.stat().st_size == 1 << 30
    four, told = started(PLAIN)
    with four:
        assert "from a snapshot" in told
        assert four.dom0.status("cat /note")[0] == 1


def test_shared_ram_is_what_the_machine_has(tmp_path: Path) -> None:
    """A word in dom0's memory, found in the file, and changed there."""
    kept()
    lab, _ = started(PLAIN, shared_ram=True)
    with lab, lab.ram_file.open("r+b") as ram:
        word = os.urandom(8).hex()
        lab.dom0.run(f"echo -n {word} >/note")
        content = ram.read()
        places = [match.start() for match in re.finditer(word.encode(), content)]
        page = next(place for place in places if place % 4096 == 0)  # of the page cache
        ram.seek(page)
        ram.write(b"changed!")
        ram.flush()
        assert lab.dom0.run("cat /note") == "changed!" + word[8:]


def test_one_that_qemu_cannot_load_is_dropped_and_booted(cache: Path) -> None:
    """Whole, by its manifest, and of no use all the same."""
    real = saved.save

    def cut(machine: Machine, folder: Path) -> Json:
        about = real(machine, folder)
        os.truncate(folder / "state", 1000)
        return about

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "save", cut)
        kept()
    (folder,) = (snapshot.folder for snapshot in Snapshots(cache / "snapshots", 0).kept())
    lab, told = started(PLAIN)
    with lab:
        assert f"the snapshot {folder} does not start, and is dropped: loading the machine: QEMU ended:" in told
        assert "dom0 is up" in told
        assert lab.serial_log.read_text(errors="replace").count("Xen version 4.17") == 1
    lab, told = started(PLAIN)
    with lab:
        assert "from a snapshot" in told and "dropped" not in told
    # A page of its RAM is changed: noticed, though the times say nothing.
    with (folder / "ram").open("r+b") as ram:
        times = os.fstat(ram.fileno())
        ram.seek(1 << 20)
        ram.write(b"\xf4" * 64)
    os.utime(folder / "ram", ns=(times.st_atime_ns, times.st_mtime_ns))
    lab, told = started(PLAIN)
    with lab:
        assert f"the snapshot {folder} is dropped, and the machine booted: ram is not what was saved" in told
        assert "dom0 is up" in told


def test_where_there_is_no_room_the_booted_machine_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENCRASH_SNAPSHOTS", "0.01")
    lab, told = started(PLAIN)
    with lab:
        assert "no snapshot is kept of this machine: " in told and "all may take 10 ($XENCRASH_SNAPSHOTS)" in told
        assert lab.dom0.run("echo alive") == "alive"
    assert Snapshots(cache / "snapshots", 0).kept() == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_it_while_it_is_made_leaves_nothing(sign: signal.Signals, cache: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from xencrash.lab import saved; from xencrash.cli import main; "
        "saved.copy_packed = lambda *_: (print('saving', file=sys.stderr, flush=True), time.sleep(60)); "
        f"sys.exit(main(['lab', 'up', '--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    words = ["env", "--default-signal=INT,TERM", sys.executable, "-c", script]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        for line in command.stderr:
            if line == "saving\n":
                break
        pid = attach(tmp_path / "run").qemu_pid
        assert [path.name for path in (cache / "snapshots").glob(".*")] != []
        command.send_signal(sign)
        command.communicate(timeout=30)
    assert command.returncode == 128 + sign
    assert start_time(pid) is None
    assert {path.suffix for path in (cache / "snapshots").iterdir()} == {".lock"}


def test_two_at_once_boot_it_once(cache: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "xencrash", "lab", "up", "--cpus", "2", "--run-dir"]
    runs = [tmp_path / name for name in ("one", "two")]
    commands = [subprocess.Popen([*words, run], stderr=subprocess.PIPE, text=True) for run in runs]
    try:
        said = [command.communicate(timeout=550)[1] for command in commands]
        assert [command.returncode for command in commands] == [0, 0], said
        assert sorted("dom0 is up" in text for text in said) == [False, True]
        assert sorted("from a snapshot" in text for text in said) == [False, True]
        assert [attach(run).dom0.run("nproc") for run in runs] == ["1\n", "1\n"]
    finally:
        for run in runs:
            attach(run).down()


def test_what_is_asked_to_be_fresh_or_is_about_booting_boots(tmp_path: Path) -> None:
    kept()
    lab, told = started(PLAIN, fresh=True)
    with lab:
        assert "dom0 is up" in told and "snapshot" not in told
    for fields in ({"paused": True}, {"wait": "xen"}):
        lab, told = started(Specification(dom0_vcpus=4, **fields))
        with lab:
            assert "from a snapshot" not in told
            assert "Xen version" not in lab.serial_log.read_text(errors="replace") or "wait" in fields
