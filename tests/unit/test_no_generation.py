"""A crash path that no generation fits: what depends on none is judged, the nearest are named, nothing is green."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.machines.changed import CHANGES, MC, NMI, Machine, bad
from tests.machines.recorded import names
from tests.machines.syntheticxen import PHYS_START, VIRT_START, CrashedXen
from tests.schema import SCHEMA
from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import NOT_IDENTIFIED, ByGeneration
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.crashpath.identification import identify, statements
from xen_symbols.crashpath.preflight import preflight
from xen_symbols.report.blocks import problems
from xen_symbols.report.model import ExitStatus, Verdict
from xen_symbols.symbols.load import load_symbols
from xencrash.cli import main
from xencrash.guests import build, generations

RENAMED = {"do_nmi_crash": "my_nmi_crash"}
ALWAYS_SAME = {check.id for check in CHECKS if check.by_generation is ByGeneration.NEVER}
BEFORE_IT, DECIDED = (
    {check.id for check in CHECKS if check.by_generation is each}
    for each in (ByGeneration.ONCE_BEGUN, ByGeneration.ALWAYS)
)
# Whose values on an unknown path are other ones: which stack and what flags the registers have, when notes are filled.
BY_ITSELF = {"crash-notes", "crash-info-note", "cpu-stack"}


@pytest.mark.parametrize("name", names())
def test_what_depends_on_no_generation_is_judged_all_the_same(name: str) -> None:
    known, unknown = Machine(name).report(), Machine(name, **RENAMED).report()
    assert unknown.generation is None and unknown.verdict is Verdict.UNKNOWN
    assert unknown.exit_status is ExitStatus.UNDECIDED
    assert [f for f in unknown.findings if f.verdict is Verdict.FAIL] == []
    same = [[f for f in report.findings if f.check in ALWAYS_SAME - BY_ITSELF] for report in (known, unknown)]
    assert [(f.check, f.cpu, f.verdict, f.observed) for f in same[0]] == [
        (f.check, f.cpu, f.verdict, f.observed) for f in same[1]
    ]
    assert {f.check for f in same[1] if f.verdict is Verdict.PASS} >= {"cpus-found", "nmi-gate-type", "mc-gate-dpl"}
    before, now = ([f for f in report.findings if f.check in BY_ITSELF] for report in (known, unknown))
    for one, other in zip(before, now, strict=True):
        undecided = one.observed in ("empty", "half written") and "normal" not in name
        assert (other.check, other.cpu) == (one.check, one.cpu)
        assert other.verdict is (Verdict.UNKNOWN if undecided else one.verdict)
    # Before the crash no path has written: a gate is as in any Xen that runs.
    made = {f.check for f in unknown.findings if f.reason != NOT_IDENTIFIED}
    before_it = {f.check for f in known.findings} & BEFORE_IT
    assert made & (BEFORE_IT | DECIDED) == (before_it if "normal" in name else set())
    jsonschema.validate(unknown.to_json(), SCHEMA)


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_machine_is_found_or_not_judged_but_never_passes(change: str) -> None:
    make, check, cpu = CHANGES[change]
    machine = Machine(**RENAMED)
    make(machine)
    report = machine.report()
    found = {(f.check, f.cpu) for f in report.findings if f.verdict is Verdict.FAIL}
    if check in ALWAYS_SAME and change != "crash info empty" and change != "notes of one CPU empty":
        assert (check, cpu) in found and report.exit_status is ExitStatus.FAILED
    else:
        verdicts = {f.verdict for f in report.findings if (f.check, f.cpu) == (check, cpu)}
        assert verdicts == {Verdict.UNKNOWN} and report.exit_status is not ExitStatus.PASSED


def test_gates_of_a_running_xen_are_judged() -> None:
    machine = Machine("4.17-normal", **RENAMED)
    for vector, offset, data in ((NMI, 4, b"\0"), (MC, 0, b"\0")):
        machine.gate(1, vector, offset, data)
    assert {found for found in bad(machine.report()) if found[2] == "fail"} == {
        ("nmi-gate-ist", 1, "fail"), ("mc-gate-handler", 1, "fail"),
    }  # fmt: skip


def test_a_path_without_one_of_its_functions() -> None:
    """A compiler, or a patch, that leaves no trap_nop and no kexec_crash_save_cpu."""
    report = Machine("4.17-crashed-vmcore", trap_nop="", do_nmi_crash="", kexec_crash_save_cpu="").report()
    assert report.verdict is Verdict.UNKNOWN
    notes = [f for f in report.findings if f.check == "crash-notes"]
    assert [(f.verdict, f.reason) for f in notes] == 4 * [
        (Verdict.UNKNOWN, "rip: the symbols name no kexec_crash_save_cpu")
    ]
    assert all(f.observed["rsp"] and f.observed["cr3"] for f in notes)


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("(XEN) Failed to shoot down CPUs {2}", Verdict.FAIL),
        ("(XEN) [2026-11-30 06:40:01] Failed to shoot down CPUs {1-3}", Verdict.FAIL),
        ("(XEN) Shot down all CPUs", Verdict.UNKNOWN),  # what else such a path should have done is not known
        ("(d0) Failed to shoot down CPUs {2}", Verdict.UNKNOWN),
    ],
)
def test_that_xen_itself_says_it_failed_is_enough(line: str, verdict: Verdict) -> None:
    machine = Machine("4.17-crashed-vmcore", do_nmi_crash="")
    text = f"\n{line}\n".encode()
    ring, producer = machine.memory.variable("conring"), machine.memory.variable("conringp", 4)
    machine.poke(ring + producer - len(text), text)
    report = machine.report()
    (found,) = [f for f in report.findings if f.check == "shootdown-report"]
    assert (found.verdict, report.verdict) == (verdict, verdict)
    assert found.observed == (line if verdict is Verdict.FAIL else None)


def test_a_preflight_judges_the_gates() -> None:
    report = preflight(Machine("4.17-normal", **RENAMED).memory)
    gates = {f.verdict for f in report.findings if "-gate-" in f.check and f.check != "gate-change"}
    assert gates == {Verdict.PASS} and report.generation is None and report.verdict is Verdict.UNKNOWN
    assert {f.check: f.verdict for f in report.findings if f.stage == "preflight"}["crash-cpus"] is Verdict.PASS


def test_the_text_names_once_what_was_not_judged() -> None:
    report = Machine("4.17-crashed-vmcore", **RENAMED).report()
    lines = problems(report.to_json())
    assert lines is not None
    words = ["".join(cell.text for cell in line) for line in lines.lines]
    assert len(words) == 2 and words[0].startswith("UNKNOWN nmi-gate-handler, nmi-gate-ist, mc-gate-handler")
    assert words[1].strip() == NOT_IDENTIFIED


# -- The nearest ------------------------------------------------------------------------------


def _symbols_of(machine: Machine) -> list[str]:
    """What the statements about its generation name, and it has."""
    generation = identify(machine.memory).generation
    assert generation is not None
    words = " ".join(item.says for item in statements(generation))
    return [name for name in dict.fromkeys(re.findall(r"[\w#]{6,}", words)) if machine.symbols.has(name)]


@pytest.mark.parametrize("name", ["4.14-handover", "4.17-handover", "4.20-handover"])
def test_the_true_generation_is_the_nearest_whatever_was_renamed(name: str) -> None:
    true = identify(Machine(name).memory).generation
    assert true is not None
    tried = []
    for symbol in _symbols_of(Machine(name)):
        if symbol in ("idt_tables", "exception_table"):  # without the first nothing is judged
            continue
        found = identify(Machine(name, **{symbol: f"my_{symbol}"}).memory)
        tried.append(symbol)
        if found.generation is None:
            assert found.nearest[0].generation is true, symbol
            if len(found.nearest) > 1:
                assert len(found.nearest[0].differs) < len(found.nearest[1].differs), symbol
        else:
            assert found.generation is true, symbol
    assert len(tried) >= 4


class Built:
    """The reference guest's image as memory: enough to see which generation it is."""

    given_generation = None

    def __init__(self, generation: str) -> None:
        path = build(generation).symbols
        self.symbols, raw = load_symbols(str(path)), path.read_bytes()
        (table,), (size, count) = struct.unpack_from("<Q", raw, 40), struct.unpack_from("<HH", raw, 58)
        sections = [struct.unpack_from("<IIQQQQ", raw, table + number * size) for number in range(count)]
        self.content = [(at, raw[offset : offset + length]) for _, kind, _, at, offset, length in sections if kind == 1]

    def hide(self, name: str) -> None:
        for known in [known for known in self.symbols._by_name if known.rpartition("#")[2] == name]:
            del self.symbols._by_name[known]

    def read(self, address: int, size: int) -> bytes:
        for start, data in self.content:
            if start <= address and address + size <= start + len(data):
                return bytes(data[address - start : address - start + size])
        raise Unreadable(f"{address:#x}")


# The symbol is all that distinguishes them: both are named first.
TIES = {
    ("rfc-v1", "do_nmi_crash"), ("rfc-v1-fixed", "do_nmi_crash"), ("rfc-v1", "waiting_for_crash_ipi"),
    ("rfc-v1-fixed", "waiting_for_crash_ipi"), ("4.3.2", "waiting_to_crash"),
    ("4.17.0", "idt_tables"), ("4.21.0", "per_cpu__idt"),
    *((each, name) for each in ("4.21.0", "4.21.2") for name in ("machine_crash_shutdown", "trap_nop")),
}  # fmt: skip
AS_ANOTHER = {("4.3.2", "nmi_crash")}  # but for its code


@pytest.mark.parametrize("generation", [each for each in generations() if each in BY_ID])
def test_the_true_generation_is_the_nearest_in_the_reference_guest(generation: str) -> None:
    true, words = BY_ID[generation], " ".join(item.says for item in statements(BY_ID[generation]))
    for symbol in dict.fromkeys(re.findall(r"[\w#]{6,}", words)):
        guest = Built(generation)
        if not guest.symbols.has(symbol):
            continue
        guest.hide(symbol.rpartition("#")[2])
        found = identify(guest)  # type: ignore[arg-type]
        if found.generation is None:
            first = [near for near in found.nearest if len(near.differs) == len(found.nearest[0].differs)]
            assert true in [near.generation for near in first], symbol
            assert (len(first) == 1 or found.nearest[0].holds > found.nearest[1].holds) or (generation, symbol) in TIES
        else:
            assert (generation, symbol) in AS_ANOTHER or found.generation is true, symbol


# -- The command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> CrashedXen:
    made = CrashedXen(tmp_path_factory.mktemp("machine"))
    made.symbols.write_text(made.symbols.read_text().replace(" do_nmi_crash\n", " my_nmi_crash\n"))
    return made


@pytest.mark.parametrize("form", ["table", "json", "junit", "html"])
def test_every_format_shows_it(machine: CrashedXen, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(machine.elf()), "--symbols", str(machine.symbols), "--format", form]) == 3
    said = capsys.readouterr()
    assert said.err.startswith("xencrash: no generation of the crash path fits ")
    assert "4.17" in said.out and "do_nmi_crash" in said.out


def test_the_nearest_stand_in_the_report(machine: CrashedXen, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--symbols", str(machine.symbols), "--format", "json"]
    assert main(["check", str(machine.elf()), *command]) == 3
    report: Any = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, SCHEMA)
    first = report["nearest"][0]
    assert (first["id"], first["holds"]) == ("4.17.0", 11)
    assert first["differs"] == ["symbol do_nmi_crash", "machine_crash_shutdown names trap_nop"]
    assert main(["info", str(machine.elf()), *command]) == 3
    info = json.loads(capsys.readouterr().out)
    assert info["nearest"] == report["nearest"] and info["stage"] == "crashed" and "generation" not in info


def test_a_wrong_gate_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = CrashedXen(tmp_path)
    made.symbols.write_text(made.symbols.read_text().replace(" do_nmi_crash\n", " my_nmi_crash\n"))
    physical = made.xen.symbols["idt_table"][0] - VIRT_START + PHYS_START
    table = bytearray(made.xen.content[physical])
    table[16 * NMI + 5] = 0xEE  # DPL 3
    made.xen.content[physical] = bytes(table)
    assert main(["check", str(made.elf()), "--symbols", str(made.symbols)]) == 1
    assert re.search(r"^FAIL +nmi-gate-dpl CPU 0", capsys.readouterr().out, re.MULTILINE)
