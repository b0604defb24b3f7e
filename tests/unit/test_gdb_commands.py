"""The commands' declarations, and their answers on a recorded real Xen: no gdb is needed for either.

How the answers are printed is in test_texts.py.
"""

from __future__ import annotations

import re

import pytest

from gdbplugin.commands import COMMANDS
from gdbplugin.declare import Command
from gdbplugin.declare import usage as usage_of
from gdbplugin.settings import FUNCTIONS, SETTINGS
from tests.texts import BY_NAME, RecordedSession, answer, blocks
from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.report.blocks import report_blocks
from xen_symbols.targets import Lapic

# -- declarations -----------------------------------------------------------------------------


def test_these_are_the_commands() -> None:
    assert {command.usage for command in COMMANDS} == {
        "xen idt [CPU] [VECTOR]", "xen percpu NAME [CPU]", "xen lapic [CPU]", "xen cpus", "xen symbols", "xen log",
        "xen bt [CPU]", "xen notes", "xen vtop ADDRESS", "xen crash status", "xen crash check", "xen crash report",
        "xen crash trace [--timeout SECONDS]", "xen watch gates",
        "xen preflight", "xen summary",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_and_a_twin(command: Command) -> None:
    assert all(re.fullmatch(r"-xen(-[a-z]+)+", name) for name in command.mi)
    first, usage, *_ = command.help.splitlines()
    assert first.endswith(".") and usage == f"Usage: {command.usage}"
    assert all(usage_of(name, step.arguments if command.steps else ()) in command.help
               for name, step in command.mi.items())  # fmt: skip
    assert [step.answer for step in command.mi.values()] == [step.answer for step in command.steps or (command,)]
    assert all(argument.says in command.help for argument in command.arguments)
    assert all(len(line) <= 120 for line in command.help.splitlines())
    optional = [argument.optional for argument in command.arguments]
    assert optional == sorted(optional)  # what must be given comes first


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(COMMANDS) == len({command.words for command in COMMANDS})
    assert len({name for command in COMMANDS for name in command.mi}) == sum(len(command.mi) for command in COMMANDS)


def test_settings_and_functions_are_documented() -> None:
    names = {"symbols", "qmp-socket", "allow-build-id-mismatch", "generation", "aliases", "rdmsr"}
    assert {setting.name for setting in SETTINGS} == names
    assert all(setting.summary and setting.details for setting in SETTINGS)
    assert set(FUNCTIONS) == {"xen_per_cpu", "xen_gate"}
    assert all(f"${name}(" in doc for name, doc in FUNCTIONS.items())


# -- answers ----------------------------------------------------------------------------------


def test_idt_shows_the_gates_that_matter() -> None:
    gates = answer("xen idt")["gates"]
    assert [(gate["cpu"], gate["vector"]) for gate in gates] == [(cpu, v) for cpu in range(4) for v in (2, 8, 18)]
    crashing, parked = gates[0]["gate"], gates[3]["gate"]
    assert (crashing["handler"]["symbol"], crashing["ist"]) == ("trap_nop", 0)
    assert (parked["handler"]["symbol"], parked["ist"], parked["selector"]) == ("nmi", 2, "0xe008")


def test_one_gate() -> None:
    (gate,) = answer("xen idt", 1, 18)["gates"]
    assert gate["name"] == "#MC"
    assert (gate["gate"]["handler"]["symbol"], gate["gate"]["ist"]) == ("trap_nop", 0)


@pytest.mark.parametrize(("cpu", "vector"), [(0, 256), (0, -1), (99, 2), (-1, 2)])
def test_a_gate_that_does_not_exist(cpu: int, vector: int) -> None:
    with pytest.raises((Undecidable, Unreadable), match="does not exist"):
        answer("xen idt", cpu, vector)


def test_percpu() -> None:
    found = answer("xen percpu", "per_cpu__crash_save_done")
    assert (found["name"], found["size"]) == ("crash_save_done", 0)  # the example's symbols carry no sizes
    assert {cpu["absent"] for cpu in found["cpus"]} == {"the symbols do not say how large it is"}
    assert [cpu["cpu"] for cpu in found["cpus"]] == [0, 1, 2, 3]
    assert len({cpu["address"] for cpu in found["cpus"]}) == 4


def test_percpu_of_an_unknown_name() -> None:
    with pytest.raises(Unreadable, match="nonsense"):
        answer("xen percpu", "nonsense")


def test_lapic_by_the_device_state() -> None:
    cpus = answer("xen lapic")["cpus"]
    assert [cpu["mode"] for cpu in cpus] == ["xapic"] * 4
    assert {cpu["mode_source"] for cpu in cpus} == {"QEMU device state"}
    assert [cpu["enabled"] for cpu in cpus] == [True, False, False, False]


def test_a_lapic_mode_without_its_register_is_marked_as_inferred() -> None:
    session = RecordedSession()
    for index, cpu in enumerate(session.example.physical_cpus):
        assert isinstance(cpu.lapic, Lapic)
        session.example.physical_cpus[index] = cpu._replace(lapic=cpu.lapic._replace(apic_base=Absent("not given")))
    cpus = answer("xen lapic", session=session)["cpus"]
    assert [cpu["mode"] for cpu in cpus] == ["xapic"] * 4
    assert all(cpu["mode_source"].startswith("inferred from apic_boot_mode") for cpu in cpus)


def test_cpus_keeps_the_three_numberings_apart() -> None:
    session = RecordedSession()
    swapped = session.example.physical_cpus
    swapped[1], swapped[2] = swapped[1]._replace(apic_id=2), swapped[2]._replace(apic_id=1)
    cpus = answer("xen cpus", session=session)["cpus"]
    assert [(cpu["cpu"], cpu["thread"], cpu["apic_id"]) for cpu in cpus] == [(0, 1, 0), (1, 3, 1), (2, 2, 2), (3, 4, 3)]


def test_a_cpu_that_is_not_one_of_xens_is_shown_separately() -> None:
    session = RecordedSession()
    stray = session.example.physical_cpus
    stray[2], stray[3] = stray[2]._replace(apic_id=77), stray[3]._replace(apic_id=78)
    found = answer("xen cpus", session=session)
    assert [cpu["index"] for cpu in found["unmatched"]] == [2, 3]
    assert found["cpus"][3]["absent"] == "no physical CPU could be matched to it"


def test_symbols_name_the_generation_and_its_evidence() -> None:
    found = answer("xen symbols")
    assert found["symbols"]["match"] is True
    assert found["generation"]["id"] == "4.17.0"
    assert found["missing"] == []
    lacking = answer("xen symbols", session=RecordedSession("4.17-crashed-vmcore"))["missing"]
    assert {"names": ["machine_kexec"], "stage": "exec-entry"} in lacking  # the recording of a dump has no anchors
    assert "symbol do_nmi_crash" in found["generation"]["evidence"]


def test_notes_of_a_crash() -> None:
    found = answer("xen notes", session=RecordedSession("4.17-crashed-vmcore"))
    assert [(b["cpu"], b["state"], b["says"], b["in_crash_saved_cpus"]) for b in found["buffers"]] == [
        (cpu, "saved", "complete", True) for cpu in range(4)
    ]
    first = found["buffers"][0]
    assert first["at"]["symbol"].startswith("kexec_crash_save_cpu+") and first["registers"]["cs"] == "0xe008"
    assert set(first["control"]) == {"cr0", "cr2", "cr3", "cr4"}
    info = found["info"]
    assert (info["xen_major"], info["xen_minor"], info["tainted"]) == (4, 17, "0x0")
    assert info["extra_version"] is None and "was not recorded" in info["absent"]["extra_version"]
    of_cpus = [note for note in found["file"] if "cpu" in note]
    assert [(note["name"], note["cpu"]) for note in of_cpus] == [(n, c) for c in range(4) for n in ("CORE", "Xen")]
    assert {note["in_memory"] for note in of_cpus} == {True}


CORE_AT, CONTROL_AT = 20, 372  # offset of the contents in a CPU's buffer


@pytest.mark.parametrize(
    ("at", "content", "state", "says"),
    [
        (CORE_AT, bytes(336), "half written", "without NT_PRSTATUS: it was interrupted, or something overwrote it"),
        (CONTROL_AT, bytes(32), "half written", "without CRASH_REGS: it was interrupted, or something overwrote it"),
        (CORE_AT + 112 + 8 * 16, bytes(8), "half written", "without rip: it was interrupted, or something overwrote "
         "it"),
        (0, b"\xff" * 12, "damaged", "the buffer does not have Xen's note headers"),
        (CONTROL_AT + 16, b"\1", "saved", "complete"),
    ],
)  # fmt: skip
def test_a_buffer_that_is_not_what_it_should_be(at: int, content: bytes, state: str, says: str) -> None:
    session = RecordedSession("4.17-crashed-vmcore")
    buffer = int(answer("xen notes", session=session)["buffers"][1]["address"], 16)
    session.example.write(session.memory.physical(buffer) + at, content)
    found = answer("xen notes", session=session)
    assert [b["state"] for b in found["buffers"]] == ["saved", state, "saved", "saved"]
    assert found["buffers"][1]["says"] == says
    # The file's own notes were copied before: they are no longer what memory holds.
    other = [note["in_memory"] for note in found["file"] if note.get("cpu") == 1]
    assert other == [None, None] if state == "damaged" else False in other


def test_an_empty_buffer_differs_from_one_that_should_not_be_empty() -> None:
    session = RecordedSession("4.17-crashed-vmcore")
    buffer = int(answer("xen notes", session=session)["buffers"][2]["address"], 16)
    for at, size in ((CORE_AT, 336), (CONTROL_AT, 32)):
        session.example.write(session.memory.physical(buffer) + at, bytes(size))
    found = answer("xen notes", session=session)["buffers"][2]
    assert (found["state"], found["registers"], found["control"]) == ("empty", None, None)
    assert found["says"] == "this CPU saved nothing, although crash_saved_cpus has its bit"
    saved = session.symbols().address("crash_saved_cpus")
    session.example.write(session.memory.physical(saved), bytes([0b1011]))
    assert answer("xen notes", session=session)["buffers"][2]["says"] == "this CPU saved nothing"


def test_notes_of_a_live_machine_have_no_file() -> None:
    found = answer("xen notes")
    assert found["file"] == [] and [b["state"] for b in found["buffers"]] == ["saved"] * 4


def test_bt_of_a_recorded_machine() -> None:
    """The example holds no stacks: each CPU's location is known, and the rest is reported as missing."""
    cpus = answer("xen bt", session=RecordedSession("4.17-normal"))["cpus"]
    assert [cpu["cpu"] for cpu in cpus] == [0, 1, 2, 3]
    for cpu in cpus:
        assert cpu["stacks"] is None and "was not recorded" in cpu["stacks_absent"]
        assert cpu["lost"] and cpu["frames"] == [] and cpu["steps"][0]["calls"] == []
    assert cpus[1]["steps"][0]["at"]["symbol"].startswith("default_idle+")
    with pytest.raises(Undecidable, match="CPU 9 does not exist"):
        answer("xen bt", 9)


def test_vtop_ends_where_the_memory_reads() -> None:
    session = RecordedSession()
    table = session.symbols().address("idle_pg_table")
    found = answer("xen vtop", table, session=session)
    assert int(found["physical"], 16) == session.memory.root == int(found["root"], 16)
    assert [entry["level"] for entry in found["entries"]][:2] == ["PML4E", "PDPTE"]
    assert found["symbol"] == "idle_pg_table"


def test_status_says_where_it_is_and_why() -> None:
    found = answer("xen crash status")
    assert (found["stage"], found["crashing_cpu"], found["online_at_crash"]) == ("handover", 0, [0, 1, 2, 3])
    assert "kexec.c's crashing_cpu" in found["crashing_cpu_by"]
    assert (found["saved"], found["waiting_mask"], found["online"]) == ([0, 1, 2, 3], [], [])


def test_check_is_kept_for_the_report() -> None:
    session = RecordedSession()
    with pytest.raises(Undecidable, match="no report yet"):
        answer("xen crash report", session=session)
    checked = answer("xen crash check", session=session)
    assert checked["verdict"] == "pass"
    assert answer("xen crash report", session=session) == checked
    assert blocks("xen crash report", session=session) == report_blocks(checked)
    assert BY_NAME["xen crash check"].blocks is report_blocks
