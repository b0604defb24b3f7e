"""The table of writes: each gate at the path's boundaries, in every generation, and the rules for rows.

The expected gates are written down independently, as nmi_shootdown_cpus(), do_nmi_crash() and machine_kexec() of each
revision leave them.
"""

from __future__ import annotations

import itertools

import pytest

from xen_symbols.crashpath.generations import BY_ID, GENERATIONS, Generation
from xen_symbols.crashpath.stages import ANYWHERE, CrashStep, OtherStep, Span
from xen_symbols.crashpath.timeline import (
    BESIDE,
    BY_FIELD,
    LAPIC_ENABLED,
    MC_HANDLER,
    MC_IST,
    NMI_HANDLER,
    NMI_IST,
    PATH,
    WAITING_MASK,
    Object,
    Value,
    Whose,
    Window,
    at_stops,
    exists_in,
    values,
)
from xen_symbols.xen.state import SYSTEM

GATES = (NMI_HANDLER, NMI_IST, MC_HANDLER, MC_IST)
Gates = tuple[str | int, str | int, str | int, str | int]
NORMAL: Gates = ("normal", "normal", "normal", "normal")
SILENT = Span(OtherStep.NOTHING, OtherStep.NOTHING)
DONE = Span(OtherStep.PARKED, OtherStep.PARKED)

HARDENED = (
    ("trap_nop", 0, "normal", 0), ("normal", "normal", "normal", "normal"), ("normal", "normal", "normal", 0),
    ("trap_nop", 0, "trap_nop", 0), ("normal", "normal", "trap_nop", 0), ("normal", "normal", "trap_nop", "normal"),
)  # fmt: skip
RFC = (
    ("trap_nop", 0, "normal", 0), ("nmi_crash", 0, "normal", 0), ("nmi_crash", 0, "normal", 0),
    ("trap_nop", 0, "trap_nop", 0), ("nmi_crash", 0, "trap_nop", 0), ("nmi_crash", 0, "trap_nop", 0),
)  # fmt: skip
HOOKED = (
    ("trap_nop", 0, "normal", 0), ("nmi_crash", "normal", "normal", "normal"), ("nmi_crash", "normal", "normal", 0),
    ("trap_nop", 0, "trap_nop", 0), ("nmi_crash", "normal", "trap_nop", 0),
    ("nmi_crash", "normal", "trap_nop", "normal"),
)  # fmt: skip
# NMI handler and IST, #MC handler and IST: of the crashing CPU when it sends the NMI, of another before and after it
# answered; and at the handover of the crashing one, of one that answered, and of one that did not.
EXPECTED: dict[str, tuple[Gates, ...]] = {
    "4.2.0": (NORMAL,) * 6,
    "rfc-v1": RFC,
    "rfc-v1-fixed": RFC,
    "4.3.0": HOOKED,
    "4.3.2": HOOKED,
    "4.3.4": HARDENED,
    "4.17.0": HARDENED,
    "4.21.0": HARDENED,
    "4.21.2": (
        ("normal", "normal", "normal", 0), *HARDENED[1:3], ("normal", "normal", "trap_nop", 0), *HARDENED[4:],
    ),
}  # fmt: skip


def may_be(written: Object, generation: str, role: Whose, crash: Span, other: Span) -> tuple[object, ...]:
    known = values(written, at_stops(written, BY_ID[generation], role), role, crash, other)
    return tuple(value.value if isinstance(value, Value) else value for value in known)


def gates(generation: str, role: Whose, crash: CrashStep, other: Span) -> tuple[object, ...]:
    found = [may_be(gate, generation, role, Span(crash, crash), other) for gate in GATES]
    assert all(len(each) == 1 for each in found)
    return tuple(each[0] for each in found)


def test_every_generation_is_expected() -> None:
    assert EXPECTED.keys() == BY_ID.keys()


@pytest.mark.parametrize("generation", EXPECTED)
def test_the_gates_at_the_boundaries(generation: str) -> None:
    armed, handed_over = CrashStep.ARMED, CrashStep.NEUTRALISED
    assert (
        gates(generation, Whose.CRASHING, armed, SILENT),
        gates(generation, Whose.OTHER, armed, SILENT),
        gates(generation, Whose.OTHER, armed, DONE),
        gates(generation, Whose.CRASHING, handed_over, DONE),
        gates(generation, Whose.OTHER, handed_over, DONE),
        gates(generation, Whose.OTHER, handed_over, SILENT),
    ) == EXPECTED[generation]
    for role in (Whose.CRASHING, Whose.OTHER):
        assert gates(generation, role, CrashStep.SAVED, SILENT) == NORMAL


def test_where_a_cpu_may_be_on_either_side_of_a_step_both_values_are_allowed() -> None:
    armed, nothing = Span(CrashStep.ARMED, CrashStep.ARMED), Span(CrashStep.NOTHING, CrashStep.NOTHING)
    assert may_be(MC_IST, "4.17.0", Whose.OTHER, armed, ANYWHERE) == ("normal", 0)
    assert may_be(WAITING_MASK, "4.17.0", Whose.OTHER, nothing, SILENT) == (False,)
    assert may_be(WAITING_MASK, "4.17.0", Whose.OTHER, armed, SILENT) == (True,)
    assert may_be(WAITING_MASK, "4.17.0", Whose.OTHER, armed, ANYWHERE) == (True, False)
    assert may_be(WAITING_MASK, "4.17.0", Whose.OTHER, armed, DONE) == (False,)
    # Meanwhile the bit may still be clear, or clear again.
    arming = Span(CrashStep.SAVED, CrashStep.ARMED)
    assert may_be(WAITING_MASK, "4.17.0", Whose.OTHER, arming, ANYWHERE) == (False, True)


@pytest.mark.parametrize("generation", BY_ID)
def test_the_crashing_cpus_lapic_is_off_on_its_way_to_virtual_wire_mode(generation: str) -> None:
    """Between disable_local_APIC() and disable_IO_APIC(), where a CPU that is late may stop; at no stage of its own."""

    def enabled(low: CrashStep, high: CrashStep) -> tuple[object, ...]:
        return may_be(LAPIC_ENABLED, generation, Whose.CRASHING, Span(low, high), ANYWHERE)

    assert enabled(CrashStep.WAITED, CrashStep.WAITED) == enabled(CrashStep.ARMED, CrashStep.WAITED) == (True,)
    assert enabled(CrashStep.WAITED, CrashStep.STOPPED) == (True, False)
    assert enabled(CrashStep.STOPPED, CrashStep.STOPPED) == enabled(CrashStep.STOPPED, CrashStep.LEFT) == (True,)


def test_only_a_cpu_that_is_not_online_may_have_what_play_dead_leaves() -> None:
    anywhere = Span(CrashStep.NOTHING, CrashStep.NEUTRALISED)
    assert may_be(NMI_HANDLER, "4.17.0", Whose.OFFLINE, anywhere, ANYWHERE) == ("normal", "trap_nop")
    assert may_be(NMI_HANDLER, "4.17.0", Whose.OTHER, anywhere, ANYWHERE) == ("normal",)
    assert may_be(NMI_HANDLER, "4.3.0", Whose.OFFLINE, anywhere, ANYWHERE) == ("normal", "nmi_crash")


def test_the_path_is_in_order() -> None:
    """Each CPU takes its steps in the table's order; every row of the path has a step."""
    assert not [write for write in PATH if isinstance(write.when, Window)]
    for step in (CrashStep, OtherStep):
        steps = [write.when for write in PATH if isinstance(write.when, step)]
        assert all(earlier <= later for earlier, later in itertools.pairwise(steps))
    assert {type(write.when) for write in BESIDE} == {Window}


def test_every_row_names_existing_features_and_some_generation_has_them() -> None:
    for write in (*PATH, *BESIDE):
        assert any(write.made_in(generation) for generation in GENERATIONS)
        assert write.where.keys() <= {*Generation._fields}


def test_each_variable_of_the_path_is_in_the_state() -> None:
    assert BY_FIELD.keys() == {row.field for row in SYSTEM} - {"apic_boot_mode", "fred"}


@pytest.mark.parametrize(
    ("field", "generations"),
    [
        ("kexecing", set(BY_ID)), ("nmi_callback", set(BY_ID)),
        ("waiting_count", {"4.2.0", "rfc-v1", "rfc-v1-fixed", "4.3.0"}),
        ("crash_owner", {"4.3.2", "4.3.4", "4.17.0", "4.21.0", "4.21.2"}),
        ("exception_table_nmi", {"4.3.4"}),
    ],
)  # fmt: skip
def test_which_generations_are_sure_to_have_a_variable(field: str, generations: set[str]) -> None:
    assert {each.id for each in GENERATIONS if exists_in(BY_FIELD[field], each)} == generations
