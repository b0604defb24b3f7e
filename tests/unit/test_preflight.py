"""Would a crash work? Asked of a recorded Xen 4.17 that runs, and of it with one thing changed."""

from __future__ import annotations

import bisect
import json
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.machines.changed import Machine, no_area
from tests.machines.recorded import load, parsed, write_files
from tests.schema import SCHEMA
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath import preflight as module
from xen_symbols.crashpath.follow import Follower
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.crashpath.identification import Identification
from xen_symbols.crashpath.preflight import BUILT_IN, PROMISES, preflight
from xen_symbols.report.blocks import report_blocks
from xen_symbols.report.console import plain
from xen_symbols.report.model import Finding, Report, Verdict
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.xen.locate import locate
from xencrash.cli import main

NAME = "4.17-normal"
START, SIZE = 0x2A076000, 256 << 20
AREA = struct.pack("<QQ", SIZE, START)
FAULTY = Identification(BY_ID["4.21.0"], ("said by the test",))


class Healthy(Machine):
    """The recorded machine, with variables whose content its recording lacks; None leaves out a name."""

    def __init__(self, **variables: bytes | None) -> None:
        super().__init__(NAME)
        given: dict[str, bytes | None] = {"kexec_crash_area": AREA, "opt_nmi": b"dom0".ljust(10, b"\0"), **variables}
        rows = list(parsed(NAME)["symbols"])
        self.at: dict[str, int] = {}
        for name, data in given.items():
            named = [row for row in rows if row[2].rpartition("#")[2] == name]
            if data is None:
                rows = [row for row in rows if row not in named]
            elif named:
                self.at[name] = int(named[0][0], 16)
                self.put(self.memory.physical(self.at[name]), data)
            else:
                self.at[name] = self.place(data)
                rows.append([hex(self.at[name]), "b", name])
        rows.sort(key=lambda row: int(row[0], 16))
        listed = ListedRows([int(row[0], 16) for row in rows], [row[1] for row in rows], [row[2] for row in rows])
        old = self.symbols
        self.symbols = SymbolTable(old.path, old.source, listed, [], old.build_id)
        self.symbols.note_address, self.symbols.ranges = old.note_address, old.ranges
        self.memory = locate(self.example, self.symbols)

    def place(self, data: bytes) -> int:
        """Where bytes are put: beside a variable of Xen's, where the recording has none."""
        page = self.symbols.address("kexec_flags", "dDbB") & -4096
        start = self.memory.physical(page)
        held = [(at, at + len(content)) for at, content in self.example._memory.items()]
        offset = next(
            offset for offset in range(0, 4096 - len(data), 64)
            if all(end <= start + offset or at >= start + offset + len(data) for at, end in held)
        )  # fmt: skip
        self.put(start + offset, data)
        return page + offset

    def put(self, physical: int, data: bytes) -> None:
        assert physical not in self.example._memory
        self.example._memory[physical] = bytearray(data)
        bisect.insort(self.example._starts, physical)

    def preflight(self, identification: Identification | None = None) -> Report:
        self.memory.forget()
        return preflight(self.memory, identification)


def asked(report: Report) -> dict[str, Finding]:
    return {finding.check: finding for finding in report.findings if finding.stage == "preflight"}


def verdicts(report: Report) -> dict[str, str]:
    return {check: str(finding.verdict) for check, finding in asked(report).items()}


def wrong(report: Report) -> dict[str, str]:
    return {check: verdict for check, verdict in verdicts(report).items() if verdict != "pass"}


def test_a_healthy_machine_passes() -> None:
    report = Healthy().preflight()
    assert report.verdict is Verdict.PASS
    assert list(verdicts(report)) == [BUILT_IN.id, *(promise.id for promise in PROMISES)]
    observed = {check: finding.observed for check, finding in asked(report).items()}
    assert observed["crash-area"] == {"start": hex(START), "size": SIZE}
    assert observed["crash-cpus"] == {"online": [0, 1, 2, 3], "parked": [], "absent": []}
    assert observed["crash-lapic"] == {"now": ["xapic"], "after": "xapic"}
    assert observed["nmi-policy"] == "dom0"
    assert [stage.stage for stage in report.stages] == ["normal"]
    gates = [finding for finding in report.findings if "-gate-" in finding.check]
    assert len(gates) > 40 and {finding.verdict for finding in gates} == {Verdict.PASS}
    jsonschema.validate(report.to_json(), SCHEMA)


def test_what_people_see() -> None:
    lines = plain(report_blocks(Healthy().preflight().to_json())).splitlines()
    table = lines[lines.index("Would a crash work?") + 3 :]
    rows = [line.split(maxsplit=2) for line in table[: table.index("")]]
    assert rows[0] == ["pass", "kexec-built-in", "yes"]
    assert rows[2] == ["pass", "crash-area", "256 MiB at 0x2a076000"]
    assert rows[3] == ["pass", "crash-cpus", "online 0-3; parked none; absent none"]
    assert rows[-1][:2] == ["pass", "gates"]
    assert lines[-1].startswith("PASS")


def test_the_image_and_its_place() -> None:
    """Two segments in the reserved area; the first megabyte, which purgatory saves, does not count."""
    machine = Healthy(kexec_image=bytes(32), an_image=bytes(32), its_segments=bytes(96))
    segments = [(0, 1 << 20), (START, 0x1000), (START + 0x100000, 3 << 20)]
    machine.variable("its_segments", b"".join(struct.pack("<QQQQ", 0, 0, *segment) for segment in segments))
    machine.variable("an_image", struct.pack("<BxHxxxxQIxxxxQ", 1, 62, START, 3, machine.at["its_segments"]))
    flags = machine.memory.read_uint(machine.symbols.address("kexec_flags"))
    machine.variable("kexec_image", bytes(16 + 8 * (flags >> 5 & 1)) + machine.at["an_image"].to_bytes(8, "little"))
    found = asked(machine.preflight())["crash-area"].observed
    assert found == {"start": hex(START), "size": SIZE, "image": 0x1000 + (3 << 20)}
    machine.variable("its_segments", struct.pack("<QQQQ", 0, 0, 64 << 20, 4096))  # no such image is in the area
    assert asked(machine.preflight())["crash-area"].observed == {"start": hex(START), "size": SIZE}


def test_no_image_is_loaded() -> None:
    machine = Healthy()
    machine.variable("kexec_flags", bytes(8))
    report = machine.preflight()
    assert wrong(report) == {"crash-image": "fail"}
    assert "load one with kexec -p" in (asked(report)["crash-image"].reason or "")


def test_nothing_is_reserved() -> None:
    report = Healthy(kexec_crash_area=bytes(16)).preflight()
    assert wrong(report) == {"crash-area": "fail"}
    assert asked(report)["crash-area"].observed == "nothing"


@pytest.mark.parametrize(
    ("said", "policy"), [(b"fatal", "fatal"), (b"ignore", "ignore"), (b"dom0", "dom0"), (b"x", "fatal"), (b"", "fatal")]
)
def test_what_an_nmi_does(said: bytes, policy: str) -> None:
    assert asked(Healthy(opt_nmi=said.ljust(10, b"\0")).preflight())["nmi-policy"].observed == policy


def test_something_else_takes_the_nmis() -> None:
    machine = Healthy()
    machine.variable("traps.c#nmi_callback", machine.text("do_nmi_crash"))
    report = machine.preflight()
    assert wrong(report) == {"nmi-callback": "fail"}
    assert asked(report)["nmi-callback"].observed["symbol"] == "do_nmi_crash"


def test_a_parked_cpu_is_not_an_absent_one() -> None:
    machine = Healthy()
    machine.variable("cpu_online_map", b"\x07")
    found = asked(machine.preflight())["crash-cpus"]
    assert (found.verdict, found.observed["parked"], found.observed["absent"]) == (Verdict.PASS, [3], [])


@pytest.mark.parametrize(("identification", "verdict"), [(None, "pass"), (FAULTY, "fail")])
def test_a_cpu_that_is_not_present_breaks_4_21_0(identification: Identification | None, verdict: str) -> None:
    machine = Healthy()
    no_area(machine, 3)
    machine.variable("cpu_online_map", b"\x07")
    found = asked(machine.preflight(identification))["crash-cpus"]
    assert (str(found.verdict), found.observed["absent"]) == (verdict, [3])
    assert ("2c9829a261" in found.source, "#GP" in (found.reason or "")) == (True, verdict == "fail")


def test_gates_that_are_not_those_of_a_running_xen() -> None:
    machine = Healthy()
    machine.gate(2, 2, 4, b"\0")
    report = machine.preflight()
    assert (report.verdict, wrong(report)) == (Verdict.FAIL, {})
    assert [(f.check, f.cpu) for f in report.findings if f.verdict is Verdict.FAIL] == [("nmi-gate-ist", 2)]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda machine: machine.variable("apic_boot_mode", b"\0\0\0\0"), "crash-lapic"),
        (lambda machine: machine.lapic(2, apic_base=0xFEE00C00), "crash-lapic"),
    ],
)
def test_a_mode_that_is_not_known_or_not_the_same_is_undecided(change: Any, check: str) -> None:
    machine = Healthy()
    change(machine)
    assert wrong(machine.preflight()) == {check: "unknown"}


def test_x2apic_of_the_firmware_in_old_releases_is_undecided() -> None:
    machine = Healthy()
    machine.variable("apic_boot_mode", b"\3\0\0\0")
    assert verdicts(machine.preflight())["crash-lapic"] == "pass"
    assert verdicts(machine.preflight(Identification(BY_ID["4.3.4"], ())))["crash-lapic"] == "unknown"


@pytest.mark.parametrize(
    ("variable", "check"), [("kexec_crash_area", "crash-area"), ("opt_nmi", "nmi-policy")]
)
def test_what_cannot_be_read_is_undecided(variable: str, check: str) -> None:
    """Neither where the symbols do not name it nor where its memory is not there."""
    assert wrong(Healthy(**{variable: None}).preflight()) == {check: "unknown"}
    machine = Healthy()
    physical = machine.memory.physical(machine.at[variable])
    del machine.example._memory[physical]
    machine.example._starts.remove(physical)
    assert wrong(machine.preflight()) == {check: "unknown"}


def test_a_xen_without_kexec(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Healthy().memory
    monkeypatch.setattr(memory.symbols, "has", lambda name, kinds=None: "kexec" not in name)
    report = preflight(memory)
    (finding,) = report.findings
    assert (finding.check, finding.verdict, report.verdict) == ("kexec-built-in", Verdict.FAIL, Verdict.FAIL)
    assert "built without kexec" in (finding.reason or "")
    jsonschema.validate(report.to_json(), SCHEMA)


def test_a_crash_path_that_is_not_known_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    def unidentified(_: object) -> Identification:
        raise Undecidable("no generation of the crash path fits")

    monkeypatch.setattr(module, "identify", unidentified)
    report = preflight(Healthy().memory)
    assert (report.verdict, report.undecided) == (Verdict.UNKNOWN, "no generation of the crash path fits")
    assert verdicts(report) == {"kexec-built-in": "pass"}


# -- The command ------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dump of a healthy machine: what the recording lacks is undecided, and everything else passes."""
    dump, symbols = write_files(tmp_path, *load(NAME))
    assert main(["preflight", str(dump), "--symbols", str(symbols), "--format", "json"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    jsonschema.validate(report, SCHEMA)
    found = {finding["check"]: finding["verdict"] for finding in report["findings"] if finding["stage"] == "preflight"}
    assert (found["kexec-built-in"], found["crash-image"], found["crash-cpus"]) == ("pass", "pass", "pass")
    assert err.startswith("xencrash: unknown: crash-area at preflight: ")


def test_a_machine_that_has_crashed_is_for_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump, symbols = write_files(tmp_path, *load("4.17-crashed-vmcore"))
    assert main(["preflight", str(dump), "--symbols", str(symbols)]) == 3
    why = "Xen has begun to crash (stage crashed): preflight is for one that runs; judge this one with check"
    assert capsys.readouterr().err == f"xencrash: {dump}: {why}\n"


# -- What a trace says when it begins ---------------------------------------------------------


def test_a_trace_says_what_will_end_it() -> None:
    machine = Healthy()
    assert Follower(machine.memory).early == []
    machine.variable("kexec_flags", bytes(8))
    machine.memory.forget()
    (early,) = Follower(machine.memory).early
    assert early.startswith("this trace will end early: no crash kernel is loaded: kexec_crash() returns at once")
    no_area(machine, 3)
    machine.variable("cpu_online_map", b"\x07")
    machine.memory.forget()
    assert [text.partition(": ")[2][:20] for text in Follower(machine.memory, FAULTY).early] == [
        "no crash kernel is l", "machine_kexec() read",
    ]  # fmt: skip
    assert Follower(machine.memory, FAULTY).early[1].endswith("no crash kernel starts (absent: 3)")
