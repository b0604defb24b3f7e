"""Dumps of one real crash by every producer: Linux, makedumpfile and QEMU, and the machine itself.

More than 400 lines: every test needs the dumps of one crash, which are made once for a module.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.contract.promises import QEMUS_NOTES, XENS_NOTES, Subject, broken, ram
from tests.live.machines import booted, build_id, ready
from tests.machines.changed import needing
from xen_symbols import evaluate
from xen_symbols import open_dump as open_xen
from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.checks import CHECKS, model
from xen_symbols.crashpath.checks.model import Need
from xen_symbols.crashpath.complete import COMPLETE
from xen_symbols.describe.summary import summarise
from xen_symbols.formats.content import File
from xen_symbols.report.model import Verdict
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import CARRIED
from xen_symbols.targets import PhysicalCpu, hmp
from xen_symbols.targets.dump import Dump, open_dump
from xen_symbols.targets.kdump import KdumpMemory
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import read_state
from xencrash.cli import main
from xencrash.gdbprogram import plugin_script
from xencrash.lab.images import xen_images
from xencrash.lab.machine import Machine
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot
from xencrash.lab.rows import QEMUS, SUITES, XENS
from xencrash.serve import GDB_SETTINGS, served, serving
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]

MACHINES = [("4.14", "7.2", False), ("4.17", "7.2", False), ("4.20", "10.0", True)]  # Xen, QEMU, has kdump-raw-*
# name → what Dump.format says
AT_HANDOVER = {
    "qemu-elf": "ELF core",
    "qemu-elf-paging": "ELF core",
    "qemu-kdump-zlib": "flattened kdump",
    "qemu-kdump-raw-zlib": "kdump",
}
AFTER = {
    "vmcore": "ELF core",
    "makedumpfile-elf": "ELF core",
    "makedumpfile-zlib": "kdump",
    "makedumpfile-lzo": "kdump",
    "makedumpfile-flattened": "flattened kdump",
    "makedumpfile-flattened-elf": "flattened ELF core",
}
_MAKEDUMPFILE = {
    "makedumpfile-elf": ("-E",),
    "makedumpfile-zlib": ("-c",),
    "makedumpfile-lzo": ("-l",),
    "makedumpfile-flattened": ("-c", "-F"),
    "makedumpfile-flattened-elf": ("-E", "-F"),
}

_DEVICE_STATE = "it is not in memory, and the target holds no device state"
_AS_SAVED = "Xen's notes, in a file or in memory, say where the CPU was when it saved its registers, not where it is"
# What a dump may show of a CPU otherwise than the machine did at the handover, by the field and by who wrote the dump:
# null for this reason, or with Xen's notes where the CPU was earlier. Every other field is the same, value for value.
MAY_DIFFER: dict[str, dict[str, str]] = {
    **{
        name: dict.fromkeys(("QEMU", "Linux", "nobody"), _DEVICE_STATE)
        for name in ("halted", "nmi_blocked", "nmi_pending", "guest_mode", "lapic")
    },
    "at": {"Linux": _AS_SAVED, "nobody": _AS_SAVED},
}

# Checks of what a crash did from stop to stop.
OF_A_TRACE = {COMPLETE.id, *(check.id for check in CHECKS if check.subject is model.Subject.FOLLOWED)}
# What passes at the handover and is skipped in a dump, by who wrote it: for want of the device state, of what a trace
# counts, and, where nobody wrote registers or Xen did, of where a CPU is and of its IDTR.
_NO_DEVICE_STATE = needing(Need.LAPIC, Need.DEVICE_STATE, Need.TRACE) - OF_A_TRACE
_NO_CPU = needing(Need.REGISTERS)
SKIPPED = {"QEMU": _NO_DEVICE_STATE, "Linux": _NO_DEVICE_STATE | _NO_CPU, "nobody": _NO_DEVICE_STATE | _NO_CPU}


@dataclass
class Crash:
    """One crash: the files taken at the handover and after it, and what the live machine showed at the handover."""

    folder: Path
    symbols: str = ""
    report: Json = field(default_factory=dict)
    cpus: list[PhysicalCpu] = field(default_factory=list)  # at the handover, as QEMU's monitor prints them
    ram: dict[int, bytes] = field(default_factory=dict)  # at the handover, a page of each MiB
    console: str = ""  # all that was printed

    def memory(self, name: str) -> XenMemory:
        return open_xen(self.folder / name, self.symbols)

    def dump(self, name: str) -> Dump:
        return open_dump(str(self.folder / name))


@pytest.fixture(scope="module", params=MACHINES, ids=lambda row: f"xen-{row[0]}-qemu-{row[1]}")
def crash(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crash]:
    """Boot, crash, dump at the handover in each of QEMU's formats, and take the vmcore that the crash kernel writes."""
    xen, qemu, raw_kdump = request.param
    taken = Crash(tmp_path_factory.mktemp("dumps"))
    with ready(xen=xen, qemu=qemu, dom0_vcpus=4, shared_ram=True) as lab:
        taken.symbols = str(lab.symbols)

        lab.dumps.qemu(taken.folder / "running", format="kdump-zlib")

        def at_stage(stage: Json, findings: object) -> None:
            if stage["stage"] == "handover":
                take_at_handover(lab, taken, raw_kdump)

        taken.report = trace(
            f"gdb:{lab.gdb_socket}",
            taken.symbols,
            str(lab.qmp_socket),
            timeout=30,
            progress=at_stage,
            trigger=lab.crash,
            leave_stopped=True,
        )
        assert taken.report.get("undecided") is None
        lab.qmp("cont")
        lab.dumps.vmcore(taken.folder / "vmcore")
        taken.console = lab.serial_log.read_text(errors="replace")
    for name, options in _MAKEDUMPFILE.items():
        makedumpfile(taken.folder / "vmcore", taken.folder / name, options)
    yield taken
    for file in taken.folder.iterdir():  # several GB, which pytest would keep
        file.unlink()


def take_at_handover(lab: Machine, taken: Crash, raw_kdump: bool) -> None:
    registers = lab.qmp("human-monitor-command", **{"command-line": "info registers -a"})
    taken.cpus = hmp.parse_registers(hmp.plain(registers))
    lab.dumps.qemu(taken.folder / "qemu-elf")
    lab.dumps.qemu(taken.folder / "qemu-elf-paging", paging=True)
    lab.dumps.qemu(taken.folder / "qemu-kdump-zlib", format="kdump-zlib")
    if raw_kdump:
        lab.dumps.qemu(taken.folder / "qemu-kdump-raw-zlib", format="kdump-raw-zlib")
    else:  # QEMU 7.2 does not know the format; makedumpfile makes it of the flattened one
        with (taken.folder / "qemu-kdump-zlib").open("rb") as flattened:
            command = ["makedumpfile", "-R", taken.folder / "qemu-kdump-raw-zlib"]
            subprocess.run(command, stdin=flattened, capture_output=True, check=True)
    size = lab.ram_file.stat().st_size
    with lab.ram_file.open("rb") as ram, (taken.folder / "raw").open("wb") as raw:
        os.truncate(raw.fileno(), size)
        for address in range(0, size, 1 << 20):
            piece = ram.read(1 << 20)
            if piece.strip(b"\0"):
                raw.seek(address)
                raw.write(piece)
            taken.ram[address] = piece[:4096]


def makedumpfile(vmcore: Path, output: Path, options: tuple[str, ...]) -> None:
    if "-F" in options:
        with output.open("wb") as file:
            subprocess.run(
                ["makedumpfile", *options, "-d", "0", vmcore], stdout=file, stderr=subprocess.PIPE, check=True
            )
    else:
        subprocess.run(["makedumpfile", *options, "-d", "0", vmcore, output], capture_output=True, check=True)


@pytest.fixture(params=[*AT_HANDOVER, *AFTER])
def name(request: pytest.FixtureRequest) -> str:
    taken: str = request.param
    return taken


def compare(live: Json, dump: Json, writer: str) -> None:
    """Every field of every CPU, and every finding at the handover, on the machine and in a dump by `writer`."""
    for ours, theirs in zip(live["cpus"], dump["cpus"], strict=True):
        assert ours.keys() == theirs.keys() - {"absent"}
        for name, value in ours.items():
            why = MAY_DIFFER.get(name, {}).get(writer)
            if why is None:
                assert theirs[name] == value, f"{name} of CPU {ours['cpu']}"
            elif why is not _AS_SAVED:
                assert (theirs[name], theirs["absent"][name]) == (None, why)
    found = verdicts(dump, 0)
    last = verdicts(live, len(live["stages"]) - 1)
    last = {check: verdict for check, verdict in last.items() if check[0] not in OF_A_TRACE}
    assert found.keys() == last.keys()
    # What Linux's vmcore alone has to be judged: the notes that Xen saved.
    notes = [check for check in last if check[0] in ("dump-notes", "dump-crash-info", "dump-vmcoreinfo")]
    assert {last.pop(check) for check in notes} == {"skip"}
    assert {found.pop(check) for check in notes} == {"pass" if writer == "Linux" else "skip"}
    passed = {check for check, verdict in last.items() if verdict == "pass" and check[0] in SKIPPED[writer]}
    assert {check[0] for check in passed} == SKIPPED[writer]  # each of them was judged
    assert found == last | dict.fromkeys(passed, "skip")


def verdicts(report: Json, stop: int) -> dict[tuple[str, int | None], str]:
    return {(f["check"], f["cpu"]): f["verdict"] for f in report["findings"] if f["stop"] == stop}


def test_every_xen_and_every_qemu_of_the_lab_is_here() -> None:
    rows = [row for row in (*XENS.values(), *QEMUS.values()) if not SUITES[row.suite].moving]
    assert {name for machine in MACHINES for name in machine[:2]} == {row.name for row in rows}


def test_the_live_machine_passed(crash: Crash) -> None:
    assert crash.report.get("undecided") is None
    assert crash.report["stages"][-1]["stage"] == "handover"
    assert [cpu["cpu"] for cpu in crash.report["cpus"]] == [0, 1, 2, 3]
    assert not any("absent" in cpu or "absent" in cpu["lapic"] for cpu in crash.report["cpus"])


def test_every_dump_has_the_live_machines_verdict_and_facts(crash: Crash, name: str) -> None:
    report = evaluate(crash.memory(name)).to_json()
    assert report["target"]["format"] == (AT_HANDOVER | AFTER)[name]
    assert report["symbols"]["match"] is True
    assert report["verdict"] == crash.report["verdict"] == "pass"
    assert report["generation"]["id"] == crash.report["generation"]["id"]
    assert report["crashing_cpu"] == crash.report["crashing_cpu"]
    compare(crash.report, report, "QEMU" if name in AT_HANDOVER else "Linux")


def test_notes_of_a_vmcore_that_lost_a_cpu_fail(crash: Crash) -> None:
    """The registers of CPU 2 zeroed in the file's own notes, not in Xen's memory: what gdb and crash(8) would show."""
    path = crash.folder / "vmcore"
    status = [note.desc for note in open_dump(str(path)).notes() if note.name == "CORE"][2]
    with path.open("r+b") as file:
        at = file.read(1 << 20).index(status)
        file.seek(at)
        file.write(bytes(len(status)))
    try:
        report = evaluate(crash.memory("vmcore")).to_json()
    finally:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(status)
    bad = {(f["check"], f["cpu"], f["verdict"]) for f in report["findings"] if f["verdict"] in ("fail", "unknown")}
    assert bad == {("dump-notes", 2, "fail")}


@pytest.mark.parametrize("given", [True, False], ids=["symbols", "no-symbols"])
def test_a_raw_image_has_the_live_machines_verdict_and_facts(crash: Crash, given: bool) -> None:
    """Without symbols Xen is found in it by the table that it carries."""
    report = evaluate(open_xen(crash.folder / "raw", crash.symbols if given else None, base=0)).to_json()
    assert (report["symbols"]["source"] == CARRIED) != given
    assert report["symbols"]["match"] is True
    compare(crash.report, report, "nobody")
    assert (report["verdict"], report.get("undecided")) == ("pass", None)
    assert (report["stages"][-1]["stage"], report["crashing_cpu"]) == ("handover", crash.report["crashing_cpu"])


def test_the_symbols_of_another_build_are_refused_and_both_named(crash: Crash, name: str) -> None:
    other = next(path for path in map(symbols_of, ("4.20", "4.17")) if path != crash.symbols)
    ours, theirs = build_id(crash.symbols).hex(), build_id(other).hex()
    for path, base in ((crash.folder / name, None), (crash.folder / "raw", 0)):
        said = f"another build: .* has build-id {theirs}, the Xen in {path} has {ours}; give its own"
        with pytest.raises(Undecidable, match=said):
            open_xen(path, other, base=base)


def symbols_of(xen: str) -> str:
    return str(xen_images(Cache(), XENS[xen]).symbols)


@pytest.mark.parametrize("given", [True, False], ids=["symbols", "no-symbols"])
def test_a_dump_of_a_xen_that_did_not_crash(crash: Crash, given: bool) -> None:
    report = evaluate(open_xen(crash.folder / "running", crash.symbols if given else None)).to_json()
    assert (report["verdict"], report["crashing_cpu"]) == ("pass", None)
    assert [stage["stage"] for stage in report["stages"]] == ["normal"]
    judged = {finding["check"] for finding in report["findings"] if finding["verdict"] == "pass"}
    assert {"nmi-gate-handler", "nmi-gate-ist", "mc-gate-handler", "mc-gate-ist", "nmi-dispatch"} <= judged
    assert [(cpu["role"], cpu["crash_save_done"]) for cpu in report["cpus"]] == [("other", False)] * 4


class Damaged:
    """A dump whose page at a physical address has one byte changed, until the end of the with."""

    def __init__(self, path: Path, address: int) -> None:
        memory = KdumpMemory(File(str(path)))
        descriptor = memory._descriptors_at + 24 * memory._dumped_before(address // 4096)
        self._path = path
        with path.open("rb") as file:
            file.seek(descriptor)
            self._at, self.size, self.compression = struct.unpack("<QII", file.read(16))
            file.seek(self._at)
            self._was = file.read(self.size)

    def __enter__(self) -> None:
        self._put(self._was[: self.size // 2] + bytes(byte ^ 0xFF for byte in self._was[self.size // 2 :]))

    def __exit__(self, *_: object) -> None:
        self._put(self._was)

    def _put(self, data: bytes) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._at)
            file.write(data)


@pytest.mark.parametrize("kdump", ["makedumpfile-zlib", "qemu-kdump-raw-zlib"])
def test_a_bad_page_is_named_only_where_it_is_needed(
    crash: Crash, kdump: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = crash.folder / kdump
    path.chmod(0o600)  # QEMU's is read-only
    xen = crash.memory(kdump)
    page = xen.physical(idt_address(xen, 2)) & -4096
    damaged = Damaged(path, page)
    assert damaged.compression == 1 and damaged.size < 4096
    command = ["check", str(path), "--symbols", crash.symbols, "--format", "json"]
    with damaged:
        assert main(command) == 3
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["verdict"] == "unknown"
    unknown = [finding for finding in report["findings"] if finding["verdict"] == "unknown"]
    assert {("nmi-gate-handler", 2), ("mc-gate-handler", 2)} <= {(f["check"], f["cpu"]) for f in unknown}
    assert {f["cpu"] for f in unknown} == {2}
    assert all(f"physical {page:#x}: " in finding["reason"] for finding in unknown)
    assert said.err.startswith("xencrash: ") and said.err.count("\n") == 1 and f"physical {page:#x}: " in said.err
    assert main(command) == 0  # it is whole again
    unneeded = next(page for page in crash.ram if page > 32 << 20 and Damaged(path, page).compression == 1)
    with Damaged(path, unneeded):
        assert main(command) == 0
        with pytest.raises(Unreadable, match=f"^physical {unneeded:#x}: "):
            crash.dump(kdump).read_physical(unneeded, 4096)
    capsys.readouterr()


def test_a_bad_page_can_only_make_the_verdict_unknown(crash: Crash) -> None:
    """Every second page that is read for the verdict in turn: what is said without it is said, the rest is unknown."""
    kdump = "makedumpfile-zlib"
    path = crash.folder / kdump
    whole = verdicts(evaluate(crash.memory(kdump)).to_json(), 0)
    pages = read_for_the_verdict(crash, kdump)
    assert len(pages) > 10
    outcomes = []
    for page in sorted(pages)[::2]:
        with Damaged(path, page):
            try:
                found = verdicts(evaluate(crash.memory(kdump)).to_json(), 0)
            except Undecidable as error:
                assert "\n" not in str(error)
                outcomes.append("refused")
                continue
        assert found.keys() == whole.keys(), hex(page)
        changed = {check: verdict for check, verdict in found.items() if verdict != whole[check]}
        assert set(changed.values()) <= {"unknown"}, (hex(page), changed)
        outcomes.append("unknown" if changed else "pass")
    assert "unknown" in outcomes and len(outcomes) > 5


def read_for_the_verdict(crash: Crash, name: str) -> set[int]:
    xen = crash.memory(name)
    pages: set[int] = set()
    dump, read = crash.dump(name), crash.dump(name).read_physical

    def noted(address: int, size: int) -> bytes:
        pages.update(range(address & -4096, address + size, 4096))
        return read(address, size)

    dump.read_physical = noted  # type: ignore[method-assign, assignment]
    dump.read_physical_many = lambda requests: [noted(*request) for request in requests]  # type: ignore[method-assign]
    evaluate(locate(dump, xen.symbols))
    return pages


@pytest.mark.parametrize("name", ["vmcore", "makedumpfile-zlib", "qemu-kdump-zlib"])
def test_a_dump_truncated_anywhere_says_so_or_is_refused_in_a_line(crash: Crash, name: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copyfile(crash.folder / name, cut)
    size = cut.stat().st_size
    whole = evaluate(open_xen(cut, crash.symbols))
    chance = random.Random(0)
    places = {size - 1, size - 4096, 8192, 4096, 4095, 64, 63, 16, 1, *(chance.randrange(1, size) for _ in range(20))}
    for place in sorted(places, reverse=True):
        os.truncate(cut, place)
        try:
            report = evaluate(open_xen(cut, crash.symbols))
        except Undecidable as error:
            assert str(cut) in str(error) and "\n" not in str(error), place
        else:
            assert f"it ends at offset {place:#x}" in report.target["warnings"][0], place
            said = {(finding.check, finding.cpu): finding.verdict for finding in whole.findings}
            new = [f for f in report.findings if f.verdict not in (said[f.check, f.cpu], Verdict.UNKNOWN)]
            assert new == [], place
    cut.unlink()


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Dumps of the lab's dom0 kernel and initramfs on a machine of their own."""
    folder = tmp_path_factory.mktemp("linux")
    images = xen_images(Cache(), XENS["4.17"])
    boot = Boot(images.kernel, images.symbols, "console=ttyS0", str(images.dom0_initramfs))
    with booted(kernel=boot, cpus=2, memory=256) as lab:
        lab.serial.wait(rb"Run /init as init process", 120)
        lab.dumps.qemu(folder / "elf")
        lab.dumps.qemu(folder / "kdump", format="kdump-zlib")
        shutil.copyfile(lab.ram_file, folder / "raw")
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("given", [True, False], ids=["symbols", "no-symbols"])
@pytest.mark.parametrize("name, base", [("elf", []), ("kdump", []), ("raw", ["--base", "0"])])
def test_a_dump_of_linux_without_xen(
    linux: Path, name: str, base: list[str], given: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    symbols = ["--symbols", symbols_of("4.17")] if given else []
    assert main(["check", str(linux / name), *base, *symbols]) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "is it Xen" in said[0], said


def test_a_split_dump_is_put_together_first(crash: Crash) -> None:
    parts = [crash.folder / f"part-{number}" for number in (1, 2)]
    subprocess.run(["makedumpfile", "-c", "-d", "0", "--split", crash.folder / "vmcore", *parts],
                   capture_output=True, check=True)  # fmt: skip
    for part in parts:
        with pytest.raises(Undecidable, match="one file of a split dump; .* makedumpfile --reassemble"):
            open_xen(part, crash.symbols)
    whole = crash.folder / "reassembled"
    subprocess.run(["makedumpfile", "--reassemble", *parts, whole], capture_output=True, check=True)
    assert evaluate(open_xen(whole, crash.symbols)).to_json()["verdict"] == "pass"


def test_dumps_at_the_handover_hold_the_machines_memory(crash: Crash, name: str) -> None:
    dump = crash.dump(name)
    if name in AFTER:  # the crash kernel has used its own memory since: compare makedumpfile's with its input
        reference = crash.dump("vmcore")
        pages = {address: reference.read_physical_many([(address, 4096)])[0] for address in crash.ram}
        pages = {address: page for address, page in pages.items() if not isinstance(page, Absent)}
    else:
        pages = dict(crash.ram)
    held = 0
    for address, page in pages.items():
        try:
            assert dump.read_physical(address, 4096) == page, hex(address)
            held += 1
        except Unreadable:
            assert name == "qemu-elf-paging", f"{address:#x}: only with paging does QEMU leave memory out"
    assert held > len(crash.ram) // 2


def test_cpus_of_xens_notes_are_xens(crash: Crash) -> None:
    """A CPU's saved stack pointer is on the stack that Xen has for that CPU."""
    for name in AFTER:
        memory = crash.memory(name)
        cpus = memory.target.cpus()
        assert [cpu.xen_cpu for cpu in cpus] == [0, 1, 2, 3]
        for cpu in cpus:
            top = (cpu.registers["rsp"] | 0x7FFF) + 1
            assert memory.read_uint(top - 64, 4) == cpu.xen_cpu, "cpu_info.processor_id"


def test_the_same_summary_of_each_kind_of_dump(crash: Crash) -> None:
    """With the registers of the handover, with those that Xen saved, and with none but the notes in Xen's memory."""
    dumps = [(name, crash.memory(name)) for name in ("vmcore", "qemu-kdump-zlib", "makedumpfile-zlib")]
    dumps.append(("raw", open_xen(crash.folder / "raw", crash.symbols, base=0)))
    for name, memory in dumps:
        summary = summarise(memory, evaluate(memory).to_json())
        crashed = summary["crashing_cpu"]
        assert (crashed["cpu"], summary["why"]["id"]) == (crash.report["crashing_cpu"], "key"), name
        assert crashed["doing"]["at"].startswith("do_crashdump_trigger+"), name
        lines = summary["console"]["lines"]
        assert lines[summary["console"]["at"]] == "(XEN) 'C' pressed -> triggering crashdump", name
        assert {group["domain"] for group in summary["others"]} <= {"idle", 0}, name
        assert {group["doing"]["event"] for group in summary["others"]} == {"NMI"}, name
        assert sum(len(group["cpus"]) for group in summary["others"]) == 3, name
        assert re.match(r"xen com1=.*crashkernel=\d+M", summary["xen"]["command_line"]), name
        assert re.search(rf"Xen version {re.escape(summary['xen']['version'])} ", crash.console), name
        assert summary["verdict"]["verdict"] == "pass", name
        assert summary["crash_kernel"]["notes"] == [{"cpus": [0, 1, 2, 3], "state": "saved", "says": "complete"}], name


def test_registers_of_xens_notes_are_those_that_it_saved(crash: Crash) -> None:
    """What Xen's memory held of each CPU's notes at the handover, value for value, and so the place in the report."""
    saved = [cpu.notes.value for cpu in read_state(crash.memory("qemu-elf")).cpus.values()]
    for name in AFTER:
        cpus = crash.dump(name).cpus()
        assert [cpu.registers for cpu in cpus] == [notes.registers | notes.control for notes in saved], name
        shown = [cpu["at"]["pc"] for cpu in evaluate(crash.memory(name)).to_json()["cpus"]]
        assert shown == [hex(notes.registers["rip"]) for notes in saved], name


def test_registers_of_qemus_notes_are_those_of_the_stop(crash: Crash) -> None:
    """Each register that QEMU's monitor prints, but for EFER, which QEMU's note does not hold."""
    assert len(crash.cpus) == 4
    for name in AT_HANDOVER:
        for live, noted in zip(crash.cpus, crash.dump(name).cpus(), strict=True):
            printed = {register: value for register, value in live.registers.items() if register != "efer"}
            assert len(printed) == 24
            assert {register: noted.registers[register] for register in printed} == printed
            assert (noted.index, noted.idtr, noted.tr_base) == (live.index, live.idtr, live.tr_base)


def test_every_dump_keeps_the_promises_of_a_target(crash: Crash, name: str) -> None:
    """What the machine's RAM held at the handover is the truth after it, too: the crash kernel has its own memory."""
    of_qemu = name in AT_HANDOVER
    subject = Subject(
        crash.dump(name),
        load_symbols(crash.symbols),
        ram(str(crash.folder / "raw")),
        build_id(crash.symbols),
        4,
        QEMUS_NOTES if of_qemu else XENS_NOTES,
        frozenset({"CORE", "QEMU"} if of_qemu else {"CORE", "Xen", "VMCOREINFO_XEN"}),
    )
    assert broken(subject) == {}


def test_gdb_on_a_dump_sees_xen(crash: Crash, name: str) -> None:
    memory = crash.memory(name)
    expected = memory.variable("idt_tables")
    with serving(served(memory)) as path:
        arguments = ["gdb", "-q", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
        arguments += [part for setting in GDB_SETTINGS for part in ("-iex", setting)]
        commands = [f"source {plugin_script()}", f"set xen symbols {crash.symbols}", f"target remote {path}"]
        commands += ["info threads", "p/x *(unsigned long*)&idt_tables", "thread apply all bt"]
        commands += ["echo === xen\\n", "xen bt", "xen notes"]
        arguments += [crash.symbols, *(part for command in commands for part in ("-ex", command))]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    said = done.stdout + done.stderr
    assert f"$1 = {expected:#x}" in said
    for cpu in range(4):
        assert f"Thread {cpu + 1} (CPU {cpu}," in said
    said, _, ours = said.partition("=== xen\n")
    assert said.count("do_nmi_crash") >= 3, said
    assert ours.count("do_nmi_crash+") == 3 and "\x1b" not in ours and "Traceback" not in ours, ours
    # A CPU that was stopped in a guest has its frame moved to the primary stack; each other one is on the NMI's own.
    assert ours.count("\n  NMI interrupted ") + ours.count("NMI stack: NMI is being handled") == 3, ours
    assert "#MC interrupted" not in ours and "#DF interrupted" not in ours, ours
    saved = re.findall(r"saved  (?:kexec_crash_save_cpu\+|elf_core_save_regs )", ours)
    assert len(saved) == 4 and "NOT what Xen's memory holds" not in ours, ours
    assert ("4 x CORE 0x1, 336 bytes: NT_PRSTATUS" in ours) and (name in AT_HANDOVER) == ("4 x QEMU" in ours), ours
