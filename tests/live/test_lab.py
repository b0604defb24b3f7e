"""The lab itself, with real machines: boot, crash, vmcore; and nothing remains of a machine whose owner is gone."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import booted, ready
from xen_symbols import evaluate, open_dump
from xen_symbols.describe.summary import summarise
from xen_symbols.report.summary import headline
from xencrash.lab import boot
from xencrash.lab.errors import LabError
from xencrash.lab.images import xen_images
from xencrash.lab.machine import attach
from xencrash.lab.packages import Cache, default_root, sha256_of
from xencrash.lab.qemu import start_time
from xencrash.lab.rows import DEFAULT_QEMU, DEFAULT_XEN, KERNEL_SUITE, QEMUS, XENS
from xencrash.lab.runs import runs_folder

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("default_row")]

COMMAND = [sys.executable, "-m", "xencrash"]


def segments(vmcore: Path) -> Iterator[tuple[int, int, int, int]]:
    """(type, offset, physical address, size) of each program header of an ELF64 core."""
    with vmcore.open("rb") as stream:
        header = stream.read(64)
        count = struct.unpack_from("<H", header, 56)[0]
        for _ in range(count):
            kind, _, offset, _, address, size, _, _ = struct.unpack("<IIQQQQQQ", stream.read(56))
            yield kind, offset, address, size


def assert_same_memory(vmcore: Path, ram: Path) -> int:
    """Every segment above the first MiB (which a crash kernel uses) holds the machine's RAM; bytes compared."""
    compared = 0
    with vmcore.open("rb") as left, ram.open("rb") as right:
        core = mmap.mmap(left.fileno(), 0, access=mmap.ACCESS_READ)
        machine = mmap.mmap(right.fileno(), 0, access=mmap.ACCESS_READ)
        for kind, offset, address, size in segments(vmcore):
            for start in range(0, size if kind == 1 and address >= 1 << 20 else 0, 1 << 24):
                stop = min(start + (1 << 24), size)
                assert core[offset + start : offset + stop] == machine[address + start : address + stop]
                compared += stop - start
    return compared


def test_the_crash_key_leads_to_the_exact_vmcore(tmp_path: Path) -> None:
    with booted() as lab:
        assert lab.status()["phase"] == "crash kernel loaded"
        assert "console=hvc0" in lab.dom0.run("cat /proc/cmdline")
        assert lab.dom0.status("echo a; echo b >&2; exit 3") == (3, "a\nb\n")
        since = lab.serial.size()
        lab.crash()
        vmcore = lab.dumps.vmcore(tmp_path / "vmcore")
        assert re.search(rb"Executing kexec image on cpu\d", lab.serial_log.read_bytes()[since:])
        assert [kind for kind, *_ in segments(vmcore)] == [4, 1, 1, 1]
        assert assert_same_memory(vmcore, lab.ram_file) > 500 << 20
        assert lab.status()["phase"] == "vmcore copied"
        run_dir, pid = lab.run_dir, lab.qemu_pid
    assert not run_dir.exists()
    assert start_time(pid) is None


def test_a_boot_without_console_output_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "_STALLED", 0.0)
    messages: list[str] = []
    with pytest.raises(LabError, match=r"^booting Xen: the console said nothing for 0 s: the console's last line"):
        booted(progress=messages.append)
    done = [text.split()[0] for text in messages if not text.startswith("waiting for another run")]
    assert done == ["starting", "booting", "starting"]


def test_a_dom0_that_dies_ends_the_boot_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FSRM and without ERMS it crashes, and says nothing."""
    monkeypatch.setitem(QEMUS["10.0"].cpu, "x2apic", "max,-smap,-erms")
    begun = time.monotonic()
    with pytest.raises(LabError, match=r"^booting dom0: Xen or dom0 died: Hardware Dom0 crashed: 'noreboot' set"):
        booted(qemu="10.0")
    assert time.monotonic() - begun < boot._STALLED


def test_dom0s_panic_crashes_the_chosen_cpu(tmp_path: Path) -> None:
    with ready(dom0_vcpus=4) as lab:
        lab.crash("panic", cpu=2)
        memory = open_dump(lab.dumps.vmcore(tmp_path / "vmcore"), lab.symbols)
        assert b"Executing kexec image on cpu2" in lab.serial_log.read_bytes()
    summary = summarise(memory, evaluate(memory).to_json())
    crashed = summary["crashing_cpu"]
    assert headline(summary).endswith(" crashed on CPU 2: the hardware domain crashed")
    assert (crashed["vcpu"]["name"], crashed["vcpu"]["hardware_domain"]) == ("d0v2", True)
    assert crashed["doing"]["at"].startswith("hwdom_shutdown+") and "Hardware Dom0 crashed: " in _reason(summary)
    assert summary["verdict"]["verdict"] == "pass"


def _reason(summary: dict[str, Any]) -> str:
    """The line of the console that says why."""
    return str(summary["console"]["lines"][summary["console"]["at"]])


@pytest.mark.parametrize(
    ("xen", "qemu", "lapic", "driver"),
    [
        ("4.14", "10.0", "xapic", b"default"),
        ("4.20", "10.0", "x2apic", b"x2apic_mixed|x2apic_phys|x2apic_cluster|mixed"),
    ],
)
def test_other_rows(xen: str, qemu: str, lapic: str, driver: bytes, tmp_path: Path) -> None:
    with booted(xen=xen, qemu=qemu, lapic=lapic) as lab:
        console = lab.serial_log.read_bytes()
        assert re.search(rb"Xen version " + xen.encode(), console)
        drivers = re.findall(rb"(?:Using|Switched to) APIC driver (\S+)", console)
        assert re.fullmatch(driver, drivers[-1])
        assert lab.qmp("query-version")["qemu"]["major"] == int(qemu.split(".")[0])
        lab.crash()
        assert assert_same_memory(lab.dumps.vmcore(tmp_path / "vmcore"), lab.ram_file) > 500 << 20


# On QEMU 10 the PVH dom0 of Xen 4.14 and 4.17 halts before it prints anything, whatever the LAPIC mode.
@pytest.mark.parametrize(("xen", "qemu"), [("4.17", "7.2"), ("4.20", "10.0")])
def test_a_pvh_dom0_runs(xen: str, qemu: str) -> None:
    with booted(xen=xen, qemu=qemu, pvh=True) as lab:
        console = lab.serial_log.read_bytes()
        assert b"*** Building a PVH Dom0 ***" in console
        assert b"ACPI: Core revision" in console


def test_several_at_once_and_dumps_of_qemu(tmp_path: Path) -> None:
    with booted(paused=True) as one, booted(paused=True, cpus=2) as two:
        assert one.run_dir != two.run_dir
        assert len(one.qmp("query-cpus-fast")) == 4
        assert len(two.qmp("query-cpus-fast")) == 2
        dump = one.dumps.qemu(tmp_path / "qemu.elf")
        assert dump.stat().st_size > one.state.memory_mib << 20
        with pytest.raises(LabError, match=r"the machine is stopped \(prelaunch\)"):
            one.crash()
        one.down()
        assert two.alive()


def test_a_machine_that_dies_is_reported_with_its_logs(tmp_path: Path) -> None:
    with booted(tmp_path / "run", paused=True) as lab:
        os.kill(lab.qemu_pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(LabError, match=r"waiting for the console: QEMU ended: .*serial\.log"):
            lab.serial.wait("never", 60)
        assert time.monotonic() - begun < 5
    assert (tmp_path / "run/qemu.log").exists()
    assert not (tmp_path / "run/disk.raw").exists()


def test_a_qemu_that_will_not_start_is_quoted() -> None:
    with pytest.raises(LabError, match=r"starting QEMU: QEMU ended: QEMU said '.*nosuch.*'"):
        booted(qemu_args=("-nosuch",))


def test_a_boot_that_fails_leaves_logs_and_no_machine(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=rf"loading the crash kernel: .*{tmp_path}/run/serial\.log"):
        booted(tmp_path / "run", xen_args="crashkernel=0")
    assert b"Xen version" in (tmp_path / "run/serial.log").read_bytes()
    assert not list((tmp_path / "run").glob("*.sock"))


OWNER = """
from xencrash.lab.boot import up
from xencrash.lab.specification import Specification
with up(Specification(paused=True), {run_dir!r}) as lab:
    print(lab.qemu_pid, flush=True)
    input()
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_machine_outlives_its_owner(sign: signal.Signals, tmp_path: Path) -> None:
    script = OWNER.format(run_dir=str(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        started = start_time(pid)
        assert started is not None
        owner.send_signal(sign)
        owner.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while start_time(pid) == started and time.monotonic() < deadline:
        time.sleep(0.05)
    assert start_time(pid) != started
    if sign == signal.SIGINT:
        assert not (tmp_path / "run/disk.raw").exists()


def children(pid: int) -> dict[int, tuple[int, str]]:
    """When each process started that comes of this one, and its name."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, fields = stat.read_text().partition("(")[2].rsplit(")", 1)
            parents[int(stat.parent.name)] = int(fields.split()[1]), name
    found: dict[int, tuple[int, str]] = {}
    todo = [pid]
    while todo:
        one = todo.pop()
        for child, (parent, name) in parents.items():
            if parent == one and (started := start_time(child)) is not None:
                found[child] = started, name
                todo.append(child)
    return found


@pytest.mark.parametrize(
    ("words", "machines", "sign", "status"),
    [
        (("matrix", "--fresh", "--jobs", "2", "--xen", DEFAULT_XEN, "--qemu", DEFAULT_QEMU), 2, signal.SIGINT, 130),
        (("run", "--fresh"), 1, signal.SIGTERM, 143),
    ],
)
def test_ending_the_command_leaves_nothing_behind(
    words: tuple[str, ...], machines: int, sign: signal.Signals, status: int, tmp_path: Path
) -> None:
    """A terminal sends Ctrl-C to all of a session's processes but QEMU, kill(1) SIGTERM to one."""
    command = ["env", "--default-signal=INT,TERM", *COMMAND, "lab", *words, "--output", tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as ran:
        deadline = time.monotonic() + 240
        folders: set[Path] = set()
        while len(folders) < machines and time.monotonic() < deadline:
            time.sleep(0.1)
            came = children(ran.pid)
            for pid in came:
                with contextlib.suppress(OSError):
                    cwd = Path(f"/proc/{pid}/cwd").readlink()
                    if cwd.parent == runs_folder() and (cwd / "state.json").exists():
                        folders.add(cwd)
        assert len(folders) == machines
        (os.killpg if sign == signal.SIGINT else os.kill)(ran.pid, sign)
        _, said = ran.communicate(timeout=60)
    assert ran.returncode == status
    assert "Traceback" not in said
    assert not any(folder.exists() for folder in folders)
    deadline = time.monotonic() + 10  # multiprocessing's own helper ends when it sees that its parent has
    while (left := {name for pid, (started, name) in came.items() if start_time(pid) == started}):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_ctrl_c_while_booting_in_the_background_leaves_no_machine(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # A shell that runs the tests in the background may have them ignore SIGINT, and what they start would inherit that.
    words = ["env", "--default-signal=INT", *COMMAND, "lab", "up", "--fresh", "--run-dir", run_dir]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as command:
        deadline = time.monotonic() + 60
        while not (run_dir / "state.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = attach(run_dir).qemu_pid
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=30)
    assert command.returncode == 130
    assert "Traceback" not in said
    assert start_time(pid) is None


def test_the_steps_from_a_shell(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def lab(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, "lab", *words], capture_output=True, text=True, check=False, timeout=300)

    up = lab("up", "--run-dir", run_dir, "--cpus", "2")
    assert up.returncode == 0, up.stderr
    machine = attach(run_dir)
    try:
        again = lab("up", "--run-dir", run_dir)
        assert again.returncode == 3
        assert "one already runs" in again.stderr
        assert lab("crash", "--run-dir", run_dir).returncode == 0
        dump = lab("dump", "--run-dir", run_dir, "--output", tmp_path / "vmcore")
        assert dump.returncode == 0, dump.stderr
        assert [kind for kind, *_ in segments(tmp_path / "vmcore")] == [4, 1, 1, 1]
        status = lab("status", "--run-dir", run_dir, "--format", "json")
        assert '"phase": "vmcore copied"' in status.stdout
        down = lab("down", "--run-dir", run_dir)
        assert down.returncode == 0
        assert not machine.alive()
    finally:
        machine.down()
    gone = lab("status", "--run-dir", run_dir)
    assert gone.returncode == 3
    assert len(gone.stderr.splitlines()) == 1
    assert lab("crash", "--nosuch").returncode == 2


def of_the_machines_apt() -> dict[str, tuple[int, str]]:
    """When each file that apt has by itself was written, and its SHA-256."""
    folders = (Path("/etc/apt"), Path("/var/lib/apt"), Path("/var/cache/apt"))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert Path("/etc/apt") in {parent for path in files for parent in path.parents}
    return {str(path): (path.stat().st_mtime_ns, sha256_of(path)) for path in files}


def test_a_broken_package_is_fetched_again_by_apt_whose_own_files_stay_as_they_are(tmp_path: Path) -> None:
    before = of_the_machines_apt()
    xen_images(Cache(), XENS[DEFAULT_XEN])
    shutil.copytree(default_root() / "suites", tmp_path / "suites")
    (tmp_path / "suites" / KERNEL_SUITE / "updated").unlink()  # the index is fetched, too
    shutil.copytree(default_root() / "packages", tmp_path / "packages", copy_function=os.link)
    (broken,) = (tmp_path / "packages").glob("busybox-static_*.deb")
    whole = broken.read_bytes()
    broken.unlink()  # a link to the cache's own
    broken.write_bytes(whole[:-1])
    messages: list[str] = []
    made = xen_images(Cache(tmp_path, messages.append), XENS[DEFAULT_XEN])
    assert f"{broken.name} in the cache is broken (its SHA-256 is wrong): fetching it again" in messages
    assert f"fetching the package index of {KERNEL_SUITE}" in messages
    assert broken.read_bytes() == whole
    assert made.xen.exists()
    assert of_the_machines_apt() == before
