"""Dumps of one real crash by every producer: Linux, makedumpfile and QEMU, and the machine itself."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.contract.promises import QEMUS_NOTES, XENS_NOTES, Subject, broken, ram
from tests.live.machines import build_id
from xen_symbols import evaluate
from xen_symbols import open_dump as open_xen
from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.symbols.table import load_symbols
from xen_symbols.target import PhysicalCpu, hmp
from xen_symbols.target.dump import Dump, open_dump
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import read_state
from xencrash.lab.machine import Lab
from xencrash.lab.rows import QEMUS, SUITES, XENS
from xencrash.serve import GDB_SETTINGS, served, serving
from xencrash.session import plugin_script
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]

MACHINES = [("4.14", "7.2"), ("4.17", "7.2"), ("4.20", "10.0")]  # Xen, QEMU
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
_NO_REGISTERS = "the dump holds no registers of any CPU"
_AS_SAVED = "Xen's notes say where the CPU was when it saved its registers, and the machine where it is"
# What a dump may show of a CPU otherwise than the machine did at the handover, by the field and by who wrote the dump:
# null for this reason, or with Xen's notes where the CPU was earlier. Every other field is the same, value for value.
MAY_DIFFER: dict[str, dict[str, str]] = {
    **{
        name: {"QEMU": _DEVICE_STATE, "Linux": _DEVICE_STATE, "nobody": _NO_REGISTERS}
        for name in ("halted", "nmi_blocked", "nmi_pending", "guest_mode", "lapic")
    },
    "at": {"Linux": _AS_SAVED, "nobody": _NO_REGISTERS},
}

OF_A_TRACE = ("trace-complete", "gate-change")  # checks of what a crash did from stop to stop


@dataclass
class Crash:
    """One crash: the files taken at the handover and after it, and what the live machine showed at the handover."""

    folder: Path
    symbols: str = ""
    report: Json = field(default_factory=dict)
    cpus: list[PhysicalCpu] = field(default_factory=list)  # at the handover, as QEMU's monitor prints them
    ram: dict[int, bytes] = field(default_factory=dict)  # at the handover, a page of each MiB

    def memory(self, name: str) -> XenMemory:
        return open_xen(self.folder / name, self.symbols)

    def dump(self, name: str) -> Dump:
        return open_dump(str(self.folder / name))


@pytest.fixture(scope="module", params=MACHINES, ids=lambda pair: f"xen-{pair[0]}-qemu-{pair[1]}")
def crash(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crash]:
    """Boot, crash, dump at the handover in each of QEMU's formats, and take the vmcore that the crash kernel writes."""
    xen, qemu = request.param
    taken = Crash(tmp_path_factory.mktemp("dumps"))
    with Lab.up(xen=xen, qemu=qemu) as lab:
        taken.symbols = str(lab.symbols)

        def at_stage(stage: Json, findings: object) -> None:
            if stage["stage"] == "handover":
                take_at_handover(lab, taken, raw_kdump=qemu != "7.2")

        taken.report = trace(
            f"gdb:{lab.gdb_socket}",
            taken.symbols,
            str(lab.qmp_socket),
            timeout=30,
            progress=at_stage,
            trigger=lab.crash,
        )
        assert taken.report.get("undecided") is None
        lab.wait_vmcore(taken.folder / "vmcore")
    for name, options in _MAKEDUMPFILE.items():
        makedumpfile(taken.folder / "vmcore", taken.folder / name, options)
    yield taken
    for file in taken.folder.iterdir():  # several GB, which pytest would keep
        file.unlink()


def take_at_handover(lab: Lab, taken: Crash, raw_kdump: bool) -> None:
    registers = lab.qmp("human-monitor-command", **{"command-line": "info registers -a"})
    taken.cpus = hmp.parse_registers(hmp.plain(registers))
    lab.dump_guest_memory(taken.folder / "qemu-elf")
    lab.dump_guest_memory(taken.folder / "qemu-elf-paging", paging=True)
    lab.dump_guest_memory(taken.folder / "qemu-kdump-zlib", format="kdump-zlib")
    if raw_kdump:
        lab.dump_guest_memory(taken.folder / "qemu-kdump-raw-zlib", format="kdump-raw-zlib")
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
    changed = {check: (last[check], found[check]) for check in found if found[check] != last[check]}
    assert set(changed.values()) <= {("pass", "skip")}, changed


def verdicts(report: Json, stop: int) -> dict[tuple[str, int | None], str]:
    return {(f["check"], f["cpu"]): f["verdict"] for f in report["findings"] if f["stop"] == stop}


def test_every_xen_and_every_qemu_of_the_lab_is_here() -> None:
    rows = [row for row in (*XENS.values(), *QEMUS.values()) if not SUITES[row.suite].moving]
    assert {name for machine in MACHINES for name in machine} == {row.name for row in rows}


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


def test_a_raw_image_has_the_live_machines_verdict_and_facts(crash: Crash) -> None:
    report = evaluate(open_xen(crash.folder / "raw", crash.symbols, base=0)).to_json()
    compare(crash.report, report, "nobody")
    assert (report["verdict"], report.get("undecided")) == ("pass", None)
    assert (report["stages"][-1]["stage"], report["crashing_cpu"]) == ("handover", crash.report["crashing_cpu"])


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
