"""The lab's files and command lines, without a machine.

More than 400 lines: a command line is made of all options together.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.machines import realxen
from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.generations import BY_ID
from xencrash.lab import boot, crash, domu, images, initramfs, machine, options, planted, specification
from xencrash.lab.crash import Crash
from xencrash.lab.dumps import elf_size
from xencrash.lab.errors import BadSpecification, LabError
from xencrash.lab.packages import Cache, Package
from xencrash.lab.qemu import Boot, Paths, Program, Ram, command_line
from xencrash.lab.rows import DEFAULT_QEMU, DEFAULT_XEN, GDBS, KERNEL_SUITE, QEMUS, SUITES, XENS
from xencrash.lab.runs import State, new_run
from xencrash.lab.sparse import copy_packed, copy_sparse
from xencrash.lab.specification import Specification


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """A newc archive's members, read independently: fields of eight hex digits, name and data padded to four."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 109 + name_size].decode()
        assert archive[at + 109 + name_size] == 0
        start = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size])
        at = (start + size + 3) & ~3


def test_each_folder_comes_before_what_is_in_it() -> None:
    """Linux does not unpack an entry whose folder it has not seen, and says nothing."""
    archive = initramfs.cpio([initramfs.folder("tmp"), initramfs.file("tmp/a/b/tool", b"1")])
    places = [archive.index(name + b"\0") for name in (b"tmp", b"tmp/a", b"tmp/a/b", b"tmp/a/b/tool")]
    assert places == sorted(places)
    assert archive.count(b"tmp\0") == 1


def test_the_archive_holds_the_files_and_the_folders_they_imply() -> None:
    archive = initramfs.cpio([initramfs.file("a/b/tool", b"12345"), initramfs.file("init", "#!", 0o644)])
    assert entries(archive) == {
        "a": (0o040755, b""),
        "a/b": (0o040755, b""),
        "a/b/tool": (0o100755, b"12345"),
        "init": (0o100644, b"#!"),
    }


def test_an_initramfs_inserts_each_module_it_holds_in_order() -> None:
    modules = dict.fromkeys(initramfs.CRASH_MODULES, b"ko")
    held = entries(gzip.decompress(initramfs.initramfs(initramfs.CRASH_INIT, b"busybox", modules)))
    inserted = [line.split("/")[-1] for line in held["init"][1].decode().splitlines() if line.startswith("insmod")]
    assert tuple(inserted) == initramfs.CRASH_MODULES
    assert {f"lib/modules/{name}" for name in inserted} < held.keys()


def core(tmp_path: Path, *segments: tuple[int, int]) -> Path:
    """An ELF64 core's headers, with segments of (file offset, size)."""
    path = tmp_path / "core"
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    rows = b"".join(struct.pack("<IIQQQQQQ", 1, 0, offset, 0, 0, size, size, 0) for offset, size in segments)
    path.write_bytes(header + rows)
    return path


def test_the_size_of_a_core_is_where_its_last_segment_ends(tmp_path: Path) -> None:
    assert elf_size(core(tmp_path, (0x1000, 0x234), (0x2000, 0x5000), (0x1800, 8))) == 0x7000
    empty = tmp_path / "empty"
    empty.touch()
    assert elf_size(empty) == 0


def test_a_sparse_copy_is_exact_and_keeps_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "disk", tmp_path / "copy"
    with source.open("wb") as stream:
        stream.truncate(64 << 20)
        stream.seek(20 << 20)
        stream.write(b"x" * 5000)
    size = (20 << 20) + 4000
    copy_sparse(source, target, size)
    assert target.stat().st_size == size
    assert target.read_bytes() == bytes(20 << 20) + b"x" * 4000
    assert target.stat().st_blocks * 512 < 1 << 20


def test_a_packed_copy_is_exact_and_makes_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "ram", tmp_path / "copy"
    source.write_bytes(bytes(3 << 16) + b"x" * 100 + bytes(8 << 20) + b"y")
    copy_packed(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= 4 << 16


def test_the_command_line(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "a,b")
    boot = Boot(Path("/xen"), Path("/syms"), "xen noreboot", "/vmlinux quiet,/cpio")
    command = command_line(
        Program(("qemu",), "max,-smap"), boot, paths, Ram(Path("/r,am")), cpus=4, max_cpus=8, memory_mib=512,
        paused=True, extra=("-X",),
    )  # fmt: skip
    options = dict(itertools.pairwise(command))
    assert options["-smp"] == "4,maxcpus=8"
    assert options["-kernel"] == "/xen"
    assert options["-initrd"] == "/vmlinux quiet,/cpio"
    assert options["-append"] == "xen noreboot"
    assert options["-gdb"] == f"unix:{tmp_path}/a,,b/gdb.sock,server=on,wait=off"
    assert command[-2:] == ["-S", "-X"]
    assert command.count("-qmp") == 2
    assert options["-object"] == "memory-backend-file,id=ram,size=512M,mem-path=/r,,am,share=on"
    guest = command_line(
        Program(("qemu",), "max"), Boot(Path("/g"), Path("/s")), paths, Ram(Path("/ram")), cpus=1, memory_mib=64
    )
    assert "-initrd" not in guest and "-S" not in guest and "-incoming" not in guest


def test_a_machine_that_is_loaded_waits_and_has_ram_of_its_own(tmp_path: Path) -> None:
    command = command_line(
        Program(("qemu",), "max"), Boot(Path("/g"), Path("/s")), Paths(tmp_path), Ram(Path("/ram"), shared=False),
        cpus=1, memory_mib=64, incoming=True,
    )  # fmt: skip
    options = dict(itertools.pairwise(command))
    assert options["-incoming"] == "defer" and "-S" in command
    assert options["-object"].endswith(",share=off")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"xen": "4.99"}, f"--xen is one of {', '.join(XENS)}, not '4.99'"),
        ({"wait": "dom1"}, "--wait is one of dom0, xen, shell, none, not 'dom1'"),
        ({"lapic": "x2apic"}, "--lapic x2apic needs x2APIC, which QEMU 7.2 does not emulate: give --qemu 10.0 or sid"),
        ({"domu_vcpus": 5}, "--domu-vcpus 5: each needs its own CPU, and the machine has 4"),
        ({"max_cpus": 3}, "--max-cpus 3: the machine has 4 CPUs: give as many or more"),
        ({"domu_vcpus": 1, "paused": True}, "--domu-vcpus is for a machine that boots, and --paused stops it"),
        ({"domu_vcpus": 1, "wait": "xen"}, "--domu-vcpus needs dom0, which wait='xen' does not wait for"),
        ({"guest": "rfc-v1", "dom0_vcpus": 1}, "--dom0-vcpus is for real Xen, and --guest boots the reference guest"),
        ({"guest": "rfc-v1", "crash": Crash("key")}, "--how is for real Xen"),
        ({"guest": "rfc-v1", "crash_kernel": False}, "--no-crash-kernel is for real Xen"),
        ({"guest": "rfc-v1", "kernel": Boot(Path("/k"), Path("/s"))}, "kernel and guest are two things to boot"),
        ({"crash": Crash("panic", 2)}, "boot the machine with --dom0-vcpus 4"),
        ({"accel": "kvm-in-tcg", "boot": "efi"}, "--accel kvm-in-tcg has no OVMF"),
        ({"crash": Crash("panic", 4), "dom0_vcpus": 4}, "--cpu 4: the machine's CPUs are 0 to 3"),
    ],
)
def test_the_impossible_is_refused_before_anything_is_done(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(BadSpecification) as refused:
        Specification(**fields)
    assert why in str(refused.value)


def test_possible_cpus_are_asked_for_by_an_option() -> None:
    parser = argparse.ArgumentParser()
    options.add_machine(parser)
    assert options.specification(parser.parse_args(["--max-cpus", "8"])).max_cpus == 8


def test_kvm_is_refused_where_the_processor_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cpuinfo := tmp_path / "cpuinfo").write_text("flags\t\t: fpu vme svml\nbugs\t\t: svm vmx\n")
    monkeypatch.setattr(specification, "CPUINFO", cpuinfo)
    with pytest.raises(BadSpecification) as refused:
        Specification(accel="kvm")
    assert str(refused.value) == (
        "--accel kvm needs a processor with SVM or VMX, and /proc/cpuinfo names neither: leave it out"
    )
    assert Specification().accel == "tcg"


@pytest.mark.parametrize("flag", ["svm", "vmx"])
def test_kvm_where_the_processor_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    (cpuinfo := tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flag} vme\n")
    monkeypatch.setattr(specification, "CPUINFO", cpuinfo)
    monkeypatch.setattr(images, "qemu_words", lambda cache, row: ("qemu",))
    kernel = Boot(Path("/k"), Path("/s"))
    commands = [
        boot.recipe_of(Specification(kernel=kernel, accel=accel, lapic=lapic), Cache(tmp_path)).command(
            Paths(tmp_path), Ram(Path("/ram"))
        )
        for accel, lapic in (("tcg", None), ("kvm", None), ("kvm", "xapic"))
    ]
    options = [dict(itertools.pairwise(command)) for command in commands]
    assert [(words["-accel"], words["-cpu"]) for words in options] == [
        ("tcg", "max,-smap"), ("kvm", "host,-smap"), ("kvm", "host,-smap,-x2apic")
    ]  # fmt: skip
    assert [Specification(accel=accel).keeps_snapshot for accel in ("tcg", "kvm")] == [True, False]


def test_a_crash_on_a_chosen_cpu_is_dom0s_panic() -> None:
    assert [made.way.name for made in (Crash(), Crash(cpu=1), Crash("panic"))] == ["key", "panic", "panic"]
    with pytest.raises(BadSpecification, match="--how key crashes the CPU that takes the serial interrupt"):
        Crash("key", 0)
    with pytest.raises(BadSpecification, match="--how is key or panic or nmi or watchdog or mce or .*, not 'smi'"):
        Crash("smi")
    with pytest.raises(BadSpecification, match="--how nmi crashes CPU 0, the only one whose LINT1 Xen unmasks"):
        Crash("nmi", 1)
    for way in ("watchdog", "bug", "page-fault", "double-fault"):
        with pytest.raises(BadSpecification, match="boot the machine with --dom0-vcpus 4"):
            Crash(way, 2).require_vcpus(4, 1)
    Crash("mce", 2).require_vcpus(4, 1)
    with pytest.raises(BadSpecification, match="--cpu 4: the machine's CPUs are 0 to 3"):
        Crash("mce", 4).require_vcpus(4, 4)


def test_each_way_of_crashing_on_each_cpu() -> None:
    every = [(made.how, made.cpu) for made in crash.crashes(2)]
    assert every == [
        ("key", None), ("panic", 0), ("panic", 1), ("nmi", 0), ("watchdog", 0), ("watchdog", 1), ("mce", 0), ("mce", 1),
        ("bug", 0), ("bug", 1), ("page-fault", 0), ("page-fault", 1), ("double-fault", 0), ("double-fault", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("way", "xen", "cpu"),
    [("nmi", "nmi=fatal", ""), ("watchdog", "watchdog=force", ""), ("mce", "", ",family=16"), ("bug", "", "")],
)
def test_what_a_machine_needs_for_a_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, xen: str, cpu: str
) -> None:
    monkeypatch.setattr(images, "qemu_words", lambda cache, row: ("qemu",))
    files = images.XenImages(Path("/xen"), Path("/syms"), Path("/vmlinux"), Path("/cpio"))
    monkeypatch.setattr(images, "xen_images", lambda cache, row: files)
    commands = [
        boot.recipe_of(Specification(crash=Crash(how)), Cache(tmp_path)).command(Paths(tmp_path), Ram(Path("/ram")))
        for how in ("key", way)
    ]
    plain, machine = (dict(itertools.pairwise(command)) for command in commands)
    assert machine["-append"].split() == [*plain["-append"].split(), *xen.split()]
    assert machine["-cpu"] == f"{plain['-cpu']}{cpu}" == f"max,-smap{cpu}"


def test_what_follows_from_a_specification() -> None:
    assert Specification().lapic_row.mode == "xapic"
    assert Specification(qemu="10.0").lapic_row.mode == "x2apic"
    assert Specification(guest="rfc-v1").memory_mib == 64
    assert (Specification().memory_mib, Specification(memory=2048).memory_mib) == (704, 2048)
    assert Specification(kernel=Boot(Path("/boot/linux"), Path("/syms"))).name == "linux"
    assert [Specification(**fields).boots_dom0 for fields in ({}, {"paused": True}, {"wait": "xen"})] == [
        True, False, False
    ]  # fmt: skip


def test_every_row_names_existing_suites_and_a_reason() -> None:
    assert {row.suite for row in XENS.values()} | {row.kexec_suite for row in XENS.values()} <= SUITES.keys()
    assert {row.suite for row in QEMUS.values()} | {KERNEL_SUITE} <= SUITES.keys()
    assert all(row.reason for row in (*XENS.values(), *QEMUS.values()))
    assert all(row.default_lapic in row.cpu for row in QEMUS.values())
    assert {row.generation for row in XENS.values()} <= BY_ID.keys()


def test_every_settled_xen_gets_the_memory_changes_of_the_main_job() -> None:
    settled = {row.name for row in XENS.values() if not SUITES[row.suite].moving}
    assert {row.xen for row in realxen.ROWS.values()} == settled
    assert {row.gdb for row in realxen.ROWS.values()} == GDBS.keys()
    modes = {(row.xen, row.qemu, row.lapic) for row in realxen.ROWS.values()}
    assert modes >= {(xen, "10.0", "x2apic") for xen in settled} | {(DEFAULT_XEN, DEFAULT_QEMU, "xapic")}


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"too long for the sockets in it .* give a shorter folder"):
        new_run(tmp_path / ("x" * 100))


def test_a_folder_without_a_lab(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="finding the lab: no machine in"):
        machine.attach(tmp_path)
    (tmp_path / "state.json").write_text('{"pid": 1')
    with pytest.raises(LabError, match=r"state\.json cannot be read"):
        machine.attach(tmp_path)


def test_a_dead_machine_is_seen_even_if_its_process_number_lives_on(tmp_path: Path) -> None:
    state = State(os.getpid(), 1, "/syms", 512, 1, 1, "Xen", "7.2", False)
    (tmp_path / "state.json").write_text(json.dumps(state.__dict__))
    lab = machine.attach(tmp_path)
    assert lab.status()["machine"] == "gone"
    with pytest.raises(LabError, match="QEMU is gone"):
        lab.qmp("query-status")
    lab.down()  # and no other process is ended


def test_what_was_made_is_made_again_when_it_is_broken(tmp_path: Path) -> None:
    said: list[str] = []
    cache = Cache(tmp_path, said.append)

    def build(folder: Path, files: images.Files) -> None:
        assert list(files.values()) == [tmp_path / "packages" / files["in"].name]
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("content")

    def make(version: int) -> Path:
        def choose(cache: Cache) -> list[Package]:
            digest = hashlib.sha256(b"").hexdigest()
            return [Package("in", str(version), f"in_{version}.deb", 0, digest, ())]

        return images.make_once(cache, "thing", [images.Wanted("bookworm", choose)], build)

    (tmp_path / "packages").mkdir()
    for version in (1, 2):
        (tmp_path / f"packages/in_{version}.deb").touch()
    made = make(1)
    assert (made / "sub/file").read_text() == "content"
    assert make(1) == made
    assert make(2) != made
    said.clear()
    for damage in ("CONTENT", None):
        path = made / "sub/file"
        path.write_text(damage) if damage else path.unlink()
        assert make(1) == made
        assert path.read_text() == "content"
    for path in (tmp_path / "packages").iterdir():
        path.unlink()
    assert make(1) == made  # what it was made of is not needed any more
    assert [text for text in said if "broken" in text] == [f"{made.name} in the cache is broken: making it again"] * 2


def test_a_crash_waits_for_a_machine_that_gdb_has_just_let_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not wait for one that stays stopped."""
    statuses = iter(["paused", "paused", "running"])
    told: list[str] = []
    stub = "disconnected:unix:/run/gdb.sock,server=on"
    lab = lab_of("Xen 4.17", told.append)

    def qmp(command: str) -> Any:
        return {"status": next(statuses)} if command == "query-status" else [{"label": "gdb", "filename": stub}]

    monkeypatch.setattr(lab, "qmp", qmp)
    crash._require_running(lab)
    assert list(statuses) == []
    assert told == ["the machine is stopped (paused): waiting up to 5 s for it to run"]

    stub, statuses = "unix:/run/gdb.sock,server=on", itertools.repeat("paused")
    monkeypatch.setattr(crash, "_RESUMES_IN", 0.05)
    with pytest.raises(LabError, match=r"a debugger is attached to the machine \(paused\): let it run first"):
        crash._require_running(lab)


def lab_of(
    guest: str, progress: Callable[[str], None] = lambda text: None, folder: Path = Path("/run")
) -> machine.Machine:
    return machine.Machine(Paths(folder), State(0, 0, "", 1, 4, 4, guest, "7.2", True), False, progress)


def test_the_reference_guest_crashes_by_a_bare_key(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = lab_of("4.17.0")
    typed: list[bytes] = []
    monkeypatch.setattr(lab, "qmp", lambda command: {"status": "running"})
    monkeypatch.setattr(lab.serial, "send", typed.append)
    lab.crash()
    assert typed == [b"C"]
    with pytest.raises(BadSpecification, match="--how and --cpu are for real Xen"):
        lab.crash("panic")
    assert typed == [b"C"]


def running_lab(monkeypatch: pytest.MonkeyPatch, folder: Path, said: str = "") -> tuple[machine.Machine, list[Any]]:
    """A machine, and the commands that QEMU and dom0 are given; QEMU's monitor answers as `said`."""
    lab, given = lab_of("Xen 4.17", folder=folder), list[Any]()

    def qmp(command: str, **arguments: Any) -> Any:
        given.extend([(command, *arguments.values())] if not command.startswith("query") else [])
        stub = [{"label": "gdb", "filename": "disconnected:unix:gdb"}]
        return {"query-status": {"status": "running"}, "query-chardev": stub}.get(command, said)

    monkeypatch.setattr(lab, "qmp", qmp)
    monkeypatch.setattr(lab.dom0, "begin_last", lambda command, gone: given.append(command))
    return lab, given


def test_an_nmi_is_for_a_xen_to_which_it_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, given = running_lab(monkeypatch, tmp_path)
    lab.paths.serial_log.write_bytes(b"(XEN) Command line: com1=115200 noreboot\n")
    for way, words in (("nmi", "nmi=fatal"), ("watchdog", "watchdog=force")):
        for step in (lab.prepare, lab.crash):
            with pytest.raises(LabError, match=f"--how {way} does not .* as it was booted: .* --xen-args {words}"):
                step(way)
    lab.paths.serial_log.write_bytes(b"(XEN) Command line: com1=115200 nmi=fatal\n")
    lab.crash("nmi")
    assert given == [("inject-nmi",)]


def test_a_machine_check_is_given_to_one_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, given = running_lab(monkeypatch, tmp_path)
    lab.crash("mce", 2)
    assert given == [("human-monitor-command", f"mce 2 {crash.FATAL_MCE}")]
    refused, _ = running_lab(monkeypatch, tmp_path, "Uncorrected error reporting disabled\r\n")
    with pytest.raises(LabError, match="QEMU made no machine check: Uncorrected error reporting disabled$"):
        refused.crash("mce")


def test_a_fault_is_planted_before_and_made_by_dom0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, given = running_lab(monkeypatch, tmp_path)
    planting: list[Any] = []
    told: list[str] = []
    monkeypatch.setattr(lab, "progress", told.append)
    monkeypatch.setattr(crash, "plant", lambda *words: planting.append(words) or "what was done")
    lab.prepare("panic")
    assert (planting, given, told) == ([], [], [])
    lab.prepare("bug", 1)
    assert planting == [("bug", tmp_path / "gdb.sock", Path(), 4)] and given == [("cont",)]
    assert told == ["what was done"]
    lab.crash("bug", 1)
    assert given[-1] == "taskset -p 2 $$ >/dev/null && { kexec -p -u; }"
    monkeypatch.setattr(crash, "held_by_debugger", lambda _: True)
    with pytest.raises(LabError, match="--how bug needs QEMU's gdbstub, and a debugger is attached: detach it"):
        lab.prepare("bug", 1)
    assert len(planting) == 1


class Stub:
    """A gdbstub whose CPUs are in guests, but for one: that maps Xen's memory, in which `words` are."""

    def __init__(self, words: dict[int, int] | None = None, able: int = 2) -> None:
        self.words, self.able, self.written = words or {}, able, list[tuple[int, int, bytes]]()

    def __call__(self, _: Path) -> Stub:
        return self

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write_virtual(self, cpu: int, address: int, data: bytes) -> None:
        if cpu != self.able:
            raise Unreadable("in a guest")
        self.written.append((cpu, address, data))

    def read_virtual(self, cpu: int, address: int, size: int) -> bytes:
        return self.words[address].to_bytes(size, "little") if cpu == self.able else b""


MAP = """ffff82d040200000 T _start
ffff82d040200100 T do_kexec_op
ffff82d040200200 t do_nmi_trigger
ffff82d040600000 B mca_allbanks
"""


@pytest.fixture
def symbols(tmp_path: Path) -> Path:
    (tmp_path / "xen-syms.map").write_text(MAP)
    return tmp_path / "xen-syms.map"


def test_where_a_fault_is_planted(symbols: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first CPU that maps Xen, at the entry of the hypercall."""
    monkeypatch.setattr(planted, "Rsp", stub := Stub())
    assert planted.plant("bug", Path("/stub"), symbols, 4) is None
    assert stub.written == [(2, 0xFFFF82D040200100, b"\x0f\x0b")]
    with pytest.raises(LabError, match="all CPUs are in guests now, and none maps Xen: try again"):
        planted.plant("page-fault", Path("/stub"), symbols, 2)
    assert planted.ways_it_lacks(symbols) == {}


def test_the_watchdogs_nmis_are_sent_by_the_stuck_cpu(symbols: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "Rsp", stub := Stub())
    planted.plant("watchdog", Path("/stub"), symbols, 4)
    ((_, address, code),) = stub.written
    assert address == 0xFFFF82D040200100
    assert code.hex(" ") == "48 b8 00 02 20 40 d0 82 ff ff ff d0 eb f2" and len(code) == 0x100 - 0xF2


@pytest.mark.parametrize(("count", "before", "after"), [(10, 0, "ff03000000000000"), (64, 0, 8 * "ff"), (10, 1, "")])
def test_banks_are_looked_at_where_none_was(
    symbols: Path, monkeypatch: pytest.MonkeyPatch, count: int, before: int, after: str
) -> None:
    words = {0xFFFF82D040600000: 0x8000, 0x8000: count, 0x8008: 0x9000, 0x9000: before}
    monkeypatch.setattr(planted, "Rsp", stub := Stub(words))
    note = planted.plant("mce", Path("/stub"), symbols, 4)
    assert [(address, data.hex()) for _, address, data in stub.written] == [(0x9000, after)] * bool(after)
    assert (note is None) == bool(before)
    assert before or (note or "").startswith("this Xen ignores every machine check, since mca_allbanks")


@pytest.mark.parametrize(
    ("name", "ways"),
    [("do_kexec_op", {"watchdog", "bug", "page-fault", "double-fault"}), ("do_nmi_trigger", {"watchdog"}),
     ("mca_allbanks", {"mce"})],
)  # fmt: skip
def test_what_a_xen_lacks_is_not_planted(symbols: Path, name: str, ways: set[str]) -> None:
    symbols.write_text("".join(line for line in MAP.splitlines(True) if name not in line))
    assert planted.ways_it_lacks(symbols).keys() == ways
    for way in ways:
        with pytest.raises(LabError, match=rf"--how {way} needs {name}, which its symbols do not have: .*\.map"):
            planted.plant(way, Path("/stub"), symbols, 4)


_XEN = b"(XEN) Brought up 4 CPUs\r\n[ 0.0] Kernel command line: panic=5\r\n"
_GUEST = b"4 CPUs ready, CPU 0 crashes on 'C'\r\n"
_LOADED = b"@shell ready\r\n@crash-kernel-loaded 0\r\n"


@pytest.mark.parametrize(
    ("serial", "line", "phase"),
    [
        (b"", b"", "started"),
        (_XEN, b"", "Xen runs"),
        (_XEN, _LOADED, "crash kernel loaded"),
        (_XEN + b"(XEN) 'C' pressed -> triggering crashdump\r\n", _LOADED, "crashed"),
        (_XEN + b"(XEN) Hardware Dom0 crashed: Executing kexec image on cpu2\r\n", _LOADED, "crashed"),
        (_XEN + b"(XEN) Panic on CPU 1:\r\n(XEN) FATAL PAGE FAULT\r\n", b"", "crashed"),
        (_XEN + b"(XEN) Panic on CPU 1:\r\n" + _XEN, b"@shell ready\r\n", "dom0 runs"),  # and a reset
        (_XEN + b"(XEN) Executing kexec image on cpu0\r\n", _LOADED + b"@crash kernel\r\n", "crash kernel runs"),
        (_XEN + b"(XEN) Executing kexec image on cpu0\r\n", _LOADED + b"@vmcore copied 9\r\n", "vmcore copied"),
        (_GUEST, b"", "guest runs"),
        (_GUEST + b"'C' pressed -> triggering crashdump\r\n", b"", "crashed"),
        (_GUEST + b"Panic on CPU 1:\r\ncrash image: alive, local APIC in xAPIC mode\r\n", b"", "crash kernel runs"),
    ],
)
def test_how_far_a_machine_came(serial: bytes, line: bytes, phase: str, tmp_path: Path) -> None:
    lab = lab_of("Xen 4.17", folder=tmp_path)
    lab.paths.serial_log.write_bytes(serial)
    lab.paths.line_log.write_bytes(line)
    assert lab.status()["phase"] == phase


def busy_lab(monkeypatch: pytest.MonkeyPatch, said: dict[str, list[str]]) -> machine.Machine:
    """A machine whose dom0 gives these answers in turn, by the first two words of the command."""
    state = State(0, 0, "", 1, 4, 4, "Xen", "7.2", True)
    lab = machine.Machine(Paths(Path("/run")), state, False, lambda text: None)
    monkeypatch.setattr(lab, "alive", lambda: True)
    monkeypatch.setattr(lab.dom0, "run", lambda command, timeout=30: said[" ".join(command.split()[:2])].pop(0))
    return lab


def test_a_domu_runs_when_each_of_its_vcpus_has_gone_on(monkeypatch: pytest.MonkeyPatch) -> None:
    died = "Segmentation fault\n"  # a process of dom0, on a QEMU or a host that makes them
    said = {"domu create": [died], "domu rounds": []}
    with pytest.raises(LabError, match="'domu create' said 'Segmentation fault', no domain ID"):
        busy_lab(monkeypatch, said).domus.create(2)
    said = {"domu create": ["7\n"], "domu rounds": ["0\n3\n", "1\n0\n", died, "9\n4\n"]}
    lab = busy_lab(monkeypatch, said)
    assert lab.domus.create(2) == 7
    assert said["domu rounds"] == []
    said["domu rounds"] += ["9\n5\n", "10\n5\n"]
    lab.require_busy()
    assert said["domu rounds"] == []
    monkeypatch.setattr(domu, "BUSY_ANSWERS", 0.0)
    said["domu rounds"] += ["11\n5\n", "12\n5\n", "13\n5\n", "14\n5\n"]
    with pytest.raises(LabError, match=r"^running domain 7: a vCPU makes no progress: nothing after 0 s"):
        lab.require_busy()


def test_a_core_that_loses_a_byte_on_the_line_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(bytes(range(256)) * 40)
    text = base64.encodebytes(packed).decode()
    digest, lost, other = f"{hashlib.sha256(packed).hexdigest()}  /tmp/core.gz\n", text[:70] + text[71:], "AAAA\n"
    said = {"domu dump": [""], "sha256sum /tmp/core.gz": [digest], "base64 /tmp/core.gz": [lost, other, text]}
    lab = busy_lab(monkeypatch, said)
    assert lab.domus.dump_core(1, tmp_path / "core").read_bytes() == bytes(range(256)) * 40
    said |= {"domu dump": [""], "sha256sum /tmp/core.gz": [digest], "base64 /tmp/core.gz": [lost] * 5 + [text]}
    with pytest.raises(LabError, match="its digest was wrong each time"):
        lab.domus.dump_core(1, tmp_path / "core")


def test_each_loop_of_dom0_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = busy_lab(monkeypatch, {})
    lab.require_busy()  # which runs nothing in dom0
    said = {"while :;": ["81\n", "82\n"], "cat /proc/81/stat": ["81 (sh) R 1 0 0\n82 (sh) R 1 0 0\n"]}
    lab = busy_lab(monkeypatch, said)
    lab.dom0.load(2)
    lab.require_busy()
    for second in ("82 (sh) Z 1 0 0\n", "cat: can't open '/proc/82/stat': No such file or directory\n"):
        said["cat /proc/81/stat"] = [f"81 (sh) R 1 0 0\n{second}"]
        with pytest.raises(LabError, match="in dom0: 2 busy loops were started, and 1 run"):
            lab.require_busy()


@pytest.mark.parametrize(("stalls", "boots"), [(0, 1), (1, 2), (2, 2)])
def test_a_boot_that_comes_to_a_standstill_is_tried_once_more(
    stalls: int, boots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    said: list[str] = []
    paths = Paths(tmp_path)

    def boots_or_stalls(run: boot.Run, then: object) -> str:
        for log in paths.logs:
            assert not log.exists()
            log.write_text(f"boot {len(started)}")
        started.append(f"machine {len(started)}")
        if len(started) <= stalls:
            raise boot.Stalled("booting dom0: silence")
        return started[-1]

    monkeypatch.setattr(boot.Run, "_boot", boots_or_stalls)
    recipe = boot.Recipe(Specification(), Program((), ""), Boot(Path("/xen"), Path("/syms")))
    run = boot.Run(recipe, paths, temporary=False, owned=True, progress=said.append)
    if stalls < 2:
        assert run.booted() == started[-1]
    else:
        with pytest.raises(LabError, match="booting dom0: silence"):
            run.booted()
    assert len(started) == boots
    assert said == ["booting dom0: silence (now *.stalled.log); starting again"] * min(stalls, 1)
    if stalls:  # what the first one said can still be read
        kept = {path.name: path.read_text() for path in tmp_path.glob("*.stalled.log")}
        assert kept == dict.fromkeys(("serial.stalled.log", "line.stalled.log", "qemu.stalled.log"), "boot 0")


LOCKED_UP = b"[   52.072231] watchdog: BUG: soft lockup - CPU#1 stuck for %ds! [swapper/0:1]\r\n"


@pytest.mark.parametrize(
    ("console", "seconds"),
    [
        (b"", 0),
        (b"(XEN) Xen version 4.17.7\r\n[    3.1] watchdog: hard lockup\r\n", 0),
        (LOCKED_UP % 22, 22),
        (LOCKED_UP % 45 + b"[   52.1] RIP: e030:key_set_index_key+0x95\r\n" + LOCKED_UP % 131 + LOCKED_UP % 23, 131),
    ],
)
def test_how_long_dom0_says_it_is_stuck(console: bytes, seconds: int) -> None:
    assert boot.stuck_for(console) == seconds


@pytest.mark.parametrize(("seconds", "stalls"), [(45, False), (71, True)])
def test_a_boot_in_which_dom0_is_stuck_is_tried_again(seconds: int, stalls: bool, tmp_path: Path) -> None:
    """It would never be silent: Linux says so again every half minute."""
    log = tmp_path / "serial.log"
    log.write_bytes(LOCKED_UP % seconds)
    machine = SimpleNamespace(
        accel_row=SimpleNamespace(slower=1.0), serial=SimpleNamespace(size=lambda: log.stat().st_size),
        serial_log=log, read_log=lambda path: path.read_bytes(), until=lambda step, timeout, ready: ready(),
    )  # fmt: skip
    if stalls:
        with pytest.raises(boot.Stalled, match=f"^booting dom0: a CPU of dom0 has been stuck for {seconds} s: see "):
            boot._boots(cast(Any, machine), "booting dom0", log, b"@never")
    else:
        boot._boots(cast(Any, machine), "booting dom0", log, b"@never")
