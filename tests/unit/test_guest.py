"""The reference guest's tables agree with its sources and with the tool, and every generation builds."""

import re

import pytest

from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.generations import GENERATIONS
from xen_symbols.crashpath.stages import BY_ID as STAGES
from xen_symbols.crashpath.stages import STAGES as ANCHORED
from xen_symbols.symbols.elf import load_elf
from xen_symbols.symbols.files import open_bytes
from xencrash.guests import BY_ID, FAULTS, build, command_line, generations, listing
from xencrash.guests.faults import clean
from xencrash.guests.generations import SOURCES, feature
from xencrash.lab.errors import LabError

SOURCE_NAMES = set(re.findall(r"^ +F\(\w+, +\"([a-z0-9-]+)\"\)", (SOURCES / "fault.h").read_text(), re.MULTILINE))


def symbols_of(generation):
    path = str(build(generation).symbols)
    return load_elf(path, open_bytes(path))


def test_the_generations_are_the_tools():
    assert generations() == tuple(generation.id for generation in GENERATIONS)


def test_every_fault_of_the_sources_has_a_row_and_every_row_a_fault():
    named = {fault.id for fault in FAULTS if fault.words.startswith("fault=")}
    assert named == SOURCE_NAMES
    assert {fault.id for fault in FAULTS} - named == {"absent-cpus", "firmware-x2apic"}


def test_every_fault_is_named_where_it_is_made():
    code = "".join(path.read_text() for path in SOURCES.glob("*.c") if path.name != "fault.c")
    gates = re.compile(r"^(?:(?:OWN_)?NMI|MC)_GATE_(?:PRESENT|HANDLER|SELECTOR|TYPE|DPL|IST|RESERVED|IST_RESTORED)$")
    constants = re.findall(r"^ +F\((\w+),", (SOURCES / "fault.h").read_text(), re.MULTILINE)
    unused = [name for name in constants if not re.search(rf"faulty(_cpu)?\({name}\b", code) and not gates.match(name)]
    assert unused == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_makes_sense_somewhere_and_is_expected_in_the_tools_words(fault):
    assert fault.generations
    assert fault.visible is bool(fault.findings)
    checks = {check.id for check in CHECKS} | {"trace-complete"}
    for generation in fault.generations:
        for finding in fault.expected(generation):
            assert finding.check in checks
            assert finding.stage in STAGES
            assert finding.cpu in ("C", "F", "O", None)


def test_a_fault_that_the_generation_is_born_with_is_not_expected_twice():
    assert "rfc-v1" not in BY_ID["no-sign-off"].generations
    assert [finding.check for finding in clean("rfc-v1")] == ["waiting-cpus"]
    assert all(clean(generation) == () for generation in generations() if generation != "rfc-v1")


@pytest.mark.parametrize("generation", generations())
def test_a_build_has_every_anchor(generation):
    table = symbols_of(generation)
    for stage in ANCHORED:
        assert any(table.has(anchor, "tT") for anchor in stage.anchors), stage.id
    assert table.build_id
    assert table.address("idle_pg_table") & ~((1 << 30) - 1) == feature(generation, "XEN_VIRT_START")
    assert table.address("_start") == feature(generation, "XEN_VIRT_START") + feature(generation, "START_OFFSET")


def test_the_two_rfcs_differ_in_one_instruction():
    decrement = b"\xf0\xff\x0d"
    code = {name: build(name).kernel.read_bytes() for name in ("rfc-v1", "rfc-v1-fixed")}
    assert decrement not in code["rfc-v1"]
    assert decrement in code["rfc-v1-fixed"]


def test_a_build_is_made_once(tmp_path):
    first = build("4.3.0", tmp_path)
    made = first.kernel.stat().st_mtime_ns
    assert build("4.3.0", tmp_path) == first
    assert first.kernel.stat().st_mtime_ns == made


def test_a_generation_that_does_not_exist_is_refused():
    with pytest.raises(LabError, match=r"no generation 9\.9"):
        build("9.9")


def test_command_lines():
    assert command_line() == ""
    assert command_line("stuck", fault_cpu=2, crash_cpu=1, x2apic=True) == "fault=stuck fault_cpu=2 crash_cpu=1 x2apic"
    assert command_line("firmware-x2apic", by_itself=True) == "crash=auto x2apic=firmware"
    assert command_line("absent-cpus", exits=True, in_nmi=True) == "nr_cpu_ids=17 context=nmi exit"
    assert command_line("lapic-mode-kept") == "fault=lapic-mode-kept x2apic"


def test_the_listing_says_what_cannot_be_seen():
    listed = listing()
    assert [row["id"] for row in listed["generations"]] == list(generations())
    hidden = {row["id"] for row in listed["faults"] if not row["visible"]}
    assert hidden == {"mc-rewritten", "enable-nmis-skipped"}
    assert all(row["generations"] and row["does"] for row in listed["faults"])
