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

from xencrash.lab.boot import recipe_of, up
from xencrash.lab.errors import LabError
from xencrash.lab.judged import check_vmcore
from xencrash.lab.machine import Machine, attach
from xencrash.lab.packages import Cache, default_root
from xencrash.lab.qemu import start_time
from xencrash.lab.snapshots import Snapshots
from xencrash.lab.specification import Specification
from xencrash.trace import trace

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("default_row")]

Json = dict[str, Any]
ROWS = [{}, {"qemu": "10.0"}, {"qemu": "10.0", "lapic": "x2apic-firmware"}, {"domu_vcpus": 2}]
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
    said: list[str] = []
    return up(spec, progress=said.append, **options), "\n".join(said)


def kept() -> None:
    """Make sure that there is a snapshot of the plain machine."""
    up(PLAIN).down()


def followed(lab: Machine) -> Json:
    lab.require_busy()
    report = trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=300,
                   trigger=lambda: lab.crash("panic", 2))  # fmt: skip
    assert "undecided" not in report, report["undecided"]  # before a vmcore is waited for that nothing makes
    return report


def judged(report: Json) -> list[tuple[Any, ...]]:
    """What a report judges. What does not apply differs from one crash of the same machine to the next: it depends on
    how far each CPU is at a stop of another, and on which are in a guest."""
    return sorted((f["stage"], f["check"], f["cpu"] or 0) for f in report["findings"])


@pytest.mark.parametrize("fields", ROWS, ids=lambda fields: "-".join(map(str, fields.values())) or "plain")
def test_one_from_a_snapshot_is_judged_as_the_one_that_was_saved(fields: Json, cache: Path, tmp_path: Path) -> None:
    spec = Specification(**fields, dom0_vcpus=4)
    reports = []
    for phrase, other in (("dom0 is up", "from a snapshot"), ("from a snapshot", "dom0 is up")):
        lab, said = started(spec)
        with lab:
            assert phrase in said and other not in said
            assert lab.status()["phase"] == "crash kernel loaded"
            # What was printed before is there, and what is printed now comes behind it.
            console = lab.serial_log.read_text(errors="replace")
            assert console.count("Xen version 4.17") == 1 and "Brought up 4 CPUs" in console
            assert abs(int(lab.dom0.run("date +%s", 300)) - time.time()) < 60
            reports += [followed(lab), check_vmcore(lab, tmp_path)]
            assert lab.serial_log.read_text(errors="replace").count("Executing kexec image on cpu2") == 1
    assert [report["verdict"] for report in reports] == ["pass"] * 4
    assert {report["crashing_cpu"] for report in reports} == {2}
    assert len({report["generation"]["id"] for report in reports}) == 1
    for one, other_one in ((reports[0], reports[2]), (reports[1], reports[3])):
        assert judged(one) == judged(other_one)


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
        assert three.ram_file.stat().st_size == three.state.memory_mib << 20
    four, said = started(PLAIN)
    with four:
        assert "from a snapshot" in said
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
    spec = Specification(cpus=1)
    key = recipe_of(spec, Cache()).key()
    kept = Snapshots(cache / "snapshots", 1 << 30)

    def save(folder: Path) -> Json:
        for name in ("ram", "state", "disk.raw", "serial.log", "line.log"):
            (folder / name).write_bytes(b"\0")
        return {"domus": []}

    with kept.reserved(key) as snapshot:
        kept.make(snapshot, save)
    lab, said = started(spec)
    with lab:
        assert f"the snapshot {snapshot.folder} does not start, and is deleted: " in said and "QEMU ended" in said
        assert "dom0 is up" in said
        assert lab.serial_log.read_text(errors="replace").count("Xen version 4.17") == 1
    assert snapshot.problem() is None and (snapshot.folder / "state").stat().st_size > 100_000


def test_ending_it_while_it_is_made_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from xencrash.lab import saved; from xencrash.cli import main; "
        "saved.copy_packed = lambda *_: (print('saving', file=sys.stderr, flush=True), time.sleep(60)); "
        f"sys.exit(main(['lab', 'up', '--cpus', '1', '--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    words = ["env", "--default-signal=INT", sys.executable, "-c", script]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        assert "saving\n" in iter(command.stderr.readline, "")
        pid = attach(tmp_path / "run").qemu_pid
        assert [path.name for path in (cache / "snapshots").glob(".*")] != []
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=60)
    assert command.returncode == 130
    assert start_time(pid) is None
    assert {path.suffix for path in (cache / "snapshots").iterdir()} == {".lock"}


def test_two_at_once_boot_it_once(cache: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "xencrash", "lab", "up", "--cpus", "1", "--run-dir"]
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
