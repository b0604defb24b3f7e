"""The reference guest's tables agree with its sources and with the tool, and every generation builds."""
from __future__ import annotations

import re
import subprocess
from types import SimpleNamespace

import pytest

from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.complete import COMPLETE
from xen_symbols.crashpath.generations import BY_ID as GENERATIONS_BY_ID
from xen_symbols.crashpath.generations import GENERATIONS
from xen_symbols.crashpath.stages import BY_ID as STAGES
from xen_symbols.crashpath.stages import STAGES as ANCHORED
from xen_symbols.crashpath.unblocking import unblocking
from xen_symbols.formats.content import File
from xen_symbols.symbols.elf import read_symbols
from xencrash.cli import main
from xencrash.guests import BY_ID, FAULTS, build, command_line, generations, listing
from xencrash.guests.faults import clean
from xencrash.guests.generations import SOURCES, feature, features
from xencrash.lab import commands
from xencrash.lab.errors import LabError
from xencrash.lab.options import specification
from xencrash.lab.specification import Specification
from xencrash.subcommands import find

SOURCE_NAMES = set(re.findall(r"^ +F\(\w+, +\"([a-z0-9-]+)\"\)", (SOURCES / "fault.h").read_text(), re.MULTILINE))


def symbols_of(generation):
    path = str(build(generation).symbols)
    return read_symbols(path, File(path))


def test_the_generations_are_those_of_the_tool():
    assert generations() == tuple(generation.id for generation in GENERATIONS)


def test_every_fault_of_the_sources_has_a_row_and_every_row_a_fault():
    named = {fault.id for fault in FAULTS if fault.words.startswith("fault=")}
    assert named == SOURCE_NAMES
    assert {fault.id for fault in FAULTS} - named == {"absent-cpus", "firmware-x2apic"}


def test_every_fault_does_something_at_a_step_that_is_reached():
    header, table = ((SOURCES / name).read_text() for name in ("fault.h", "fault.c"))
    faults = re.findall(r"^ +F\((\w+),", header, re.MULTILINE)
    steps = re.findall(r"^    ([A-Z0-9_]+),", header[header.index("enum step {") :], re.MULTILINE)
    rows = re.findall(r"^    (?:ONE\((\w+)|EACH\((\w+), +(\w+)), +(\w+),", table, re.MULTILINE)
    doing = {"OWNER_WRONG"}  # owner_recorded()
    for one, first, last, _ in rows:
        doing |= {one} if one else {*faults[faults.index(first) : faults.index(last) + 1]}
    assert doing == set(faults)
    path = "".join(file.read_text() for file in SOURCES.glob("*.c") if file.name != "fault.c")
    reached = re.findall(r"(?:step \( |reached\()(\w+), ", path)
    assert set(reached) == {row[3] for row in rows} == set(steps)
    assert re.findall(r"\bfault == \w+", path) == ["fault == NMIS_LATCHED"]  # which needs a crash in an NMI handler


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_applies_somewhere_and_its_findings_are_the_tools(fault):
    assert fault.generations
    assert fault.visible is bool(fault.findings)
    checks = {check.id for check in CHECKS} | {COMPLETE.id}
    for generation in fault.generations:
        for finding in fault.expected(generation):
            assert finding.check in checks
            assert finding.stage in STAGES
            assert finding.cpu in ("C", "F", "O", None)


def test_a_generations_own_defect_is_not_expected_twice():
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


@pytest.mark.parametrize("generation", generations())
def test_where_a_build_unblocks_nmis_is_found(generation):
    """In a function of its own, or inline in machine_kexec(); 4.2.0 does not."""
    table = symbols_of(generation)
    found = unblocking(SimpleNamespace(symbols=table, read=table.image.read), GENERATIONS_BY_ID[generation])
    if not feature(generation, "HARDENED"):
        assert found == (None, None)
        return
    function = table.lookup(found.address)[0].name
    assert function == ("enable_nmis" if feature(generation, "HAS_ENABLE_NMIS") else "machine_kexec")
    assert table.image.read(found.address - 2, 2) == b"\x48\xcf"


def test_the_two_rfcs_differ_in_one_feature_and_its_instruction():
    posted, fixed = "rfc-v1", "rfc-v1-fixed"
    assert {name for name in features() if feature(posted, name) != feature(fixed, name)} == {"SIGNS_OFF"}
    sources = [path for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".S") and path.name != "generation.h"]
    assert [path.name for path in sources if re.search(r"\bGENERATION\b", path.read_text())] == []  # by features alone
    decrement = "lock decl <waiting_for_crash_ipi>"
    assert decrement not in instructions(posted, "do_nmi_crash")
    assert decrement in instructions(fixed, "do_nmi_crash")


def instructions(generation, function):
    """A function's instructions by name and operands, with symbols for addresses."""
    words = ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={function}", str(build(generation).symbols)]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^ *[0-9a-f]+:\t(.*)$", listed, re.MULTILINE)
    assert found, listed
    return [re.sub(r"\S+ +# [0-9a-f]+ (<\w+>)", r"\1", text) for text in found]


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
    in_a_storm = {fault.id for fault in FAULTS if fault.storm}
    assert hidden == {"mc-rewritten"} | in_a_storm
    assert len(in_a_storm) == 6
    assert all(row["generations"] and row["does"] for row in listed["faults"])


def test_the_listing_says_what_a_fault_needs():
    needs = {row["id"]: (row["cpus"], row["lapic"]) for row in listing()["faults"]}
    assert needs["own-nmi-gate-ist"] == (1, None)
    assert needs["stuck"] == (2, None)
    assert needs["mc-gate-ist-twice"] == (3, None)
    assert needs["own-lapic-mode-kept"] == (1, "x2apic")
    assert needs["firmware-x2apic"] == (2, "x2apic")
    assert [row["id"] for row in listing()["faults"] if row["gates"]] == ["mc-gate-ist-remote"]
    by_itself = {row["id"]: (row["finds"], row["cpus"]) for row in listing()["generations"] if "finds" in row}
    assert by_itself == {"rfc-v1": (["waiting-cpus"], 2)}


def test_the_listing_in_words(capsys):
    assert main(["lab", "guests"]) == 0
    said = capsys.readouterr().out
    assert "rfc-v1 by itself, with 2 CPUs or more, fails: waiting-cpus\n" in said
    assert f"lapic-mode-kept: {BY_ID['lapic-mode-kept'].does}\n  in {' '.join(generations())}; " in said
    assert "; needs 2 CPUs, x2APIC\n" in said and "; needs 2 CPUs, trace --gates\n" in said
    assert "mc-rewritten: " in said and "leaves no trace in any readable state: the IST is already 0" in said


@pytest.mark.parametrize(
    "words, why",
    [
        ("--guest 9.9", "--guest 9.9: the generations are 4.2.0, rfc-v1"),
        ("--guest 4.3.0 --fault none", "--fault none: xencrash lab guests lists the faults"),
        ("--guest 4.2.0 --fault no-self-nmi", "--fault no-self-nmi applies to rfc-v1, "),
        ("--guest 4.3.0 --fault stuck --cpus 1", "with 1 CPU: give --cpus 2 or more"),
        ("--guest 4.3.0 --fault mc-gate-ist-twice --cpus 2", "give --cpus 3 or more"),
        ("--guest 4.3.0 --fault lapic-mode-kept", "which QEMU 7.2 does not emulate: give --qemu 10.0"),
        ("--guest 4.3.0 --fault firmware-x2apic --qemu 10.0 --lapic xapic", "needs x2APIC mode"),
        ("--guest 4.3.0 --lapic x2apic", "--lapic x2apic needs x2APIC, which QEMU 7.2 does not emulate"),
        ("--guest 4.3.0 --cpu 4", "--cpu 4: the machine's CPUs are 0 to 3"),
        ("--guest 4.3.0 --cpu -1", "--cpu -1: the machine's CPUs are 0 to 3"),
        ("--fault stuck", "give --guest too"),
        *(
            (f"--guest 4.17.0 {option}", f"{option.split()[0]} is for real Xen, and --guest boots the reference guest")
            for option in ("--xen 4.20", "--memory 2048", "--dom0-vcpus 4", "--domu-vcpus 2", "--xen-args foo",
                           "--dom0-args foo", "--how key")
        ),
        ("--lapic x2apic", "--lapic x2apic needs x2APIC, which QEMU 7.2 does not emulate: give --qemu 10.0"),
        ("--lapic x2apic-firmware", "--lapic x2apic-firmware needs x2APIC, which QEMU 7.2 does not emulate"),
        ("--domu-vcpus 5", "--domu-vcpus 5: each needs its own CPU, and the machine has 4"),
        ("--cpu 2", "--cpu 2 needs a vCPU of dom0 on every CPU: boot the machine with --dom0-vcpus 4"),
        ("--cpu 2 --dom0-vcpus 3", "boot the machine with --dom0-vcpus 4"),
        ("--cpu 4 --dom0-vcpus 4", "--cpu 4: the machine's CPUs are 0 to 3"),
        ("--how key --cpu 2 --dom0-vcpus 4", "--how key crashes the CPU that takes the serial interrupt"),
    ],
)  # fmt: skip
def test_a_run_that_could_not_show_what_is_asked_is_bad_usage(words, why, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xencrash.lab.judged.up", None)  # nothing boots
    assert main(["lab", "run", *words.split(), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, why",
    [
        ("up --guest 4.17.0 --no-crash-kernel", "--no-crash-kernel is for real Xen"),
        ("up --paused --domu-vcpus 4", "--domu-vcpus is for a machine that boots"),
        ("crash --how key --cpu 1", "--how key crashes the CPU that takes the serial interrupt"),
        ("dump --output x --format elf --timeout 5", "--timeout is for --format vmcore"),
        ("down --all --run-dir x", "--all is every machine"),
        ("fetch --all --xen 4.17", "--all is every Xen and every QEMU"),
    ],
)
def test_options_of_the_other_steps_that_would_have_no_effect(words, why, capsys):
    assert main(["lab", *words.split()]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1


def test_the_options_of_a_machine_are_what_it_is_made_of():
    words = "run --xen 4.20 --memory 2048 --xen-args foo --cpus 2".split()
    parser, left = find(commands, "xencrash lab", words)
    args = parser.parse_args(left)
    assert specification(args) == Specification(xen="4.20", memory=2048, xen_args="foo", cpus=2)


def test_a_fault_of_the_crashing_cpu_alone_needs_no_other():
    assert command_line("own-nmi-gate-ist", crash_cpu=2) == "fault=own-nmi-gate-ist fault_cpu=2 crash_cpu=2"
    assert command_line("absent-cpus") == "nr_cpu_ids=17"
