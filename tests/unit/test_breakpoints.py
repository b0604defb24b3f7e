"""Which hardware breakpoints are set when: never more than there are, and which stages are given up with fewer."""

from __future__ import annotations

from typing import Any

import pytest

from xen_symbols.crashpath.breakpoints import Anchors
from xen_symbols.crashpath.stages import STAGES, CrashStep

NAMES = dict.fromkeys(["__start_xen", *(stage.anchors[0] for stage in STAGES)])
THE_THREE = {"do_nmi_crash", "kexec_crash_save_cpu", "__stop_this_cpu"}


class Symbols:
    """Each existing name's address is its index in the list."""

    def __init__(self, lacking: frozenset[str] = frozenset()) -> None:
        self.names = [name for name in NAMES if name not in lacking]

    def get(self, name: str, kinds: str) -> int | None:
        return self.names.index(name) if name in self.names else None


def anchors(
    slots: int = 4, lacking: frozenset[str] = frozenset(), unblocked: int | None = None
) -> tuple[Anchors, Any]:
    symbols = Symbols(lacking)
    found = Anchors(symbols, slots, unblocked)  # type: ignore[arg-type]

    def wanted(step: CrashStep, entered: bool = True, owned: bool = True) -> list[str]:
        return [
            "the IRET" if address == unblocked else symbols.names[address]
            for address in found.wanted(step, entered=entered, owned=owned)
        ]

    return found, wanted


def test_four_follow_the_stages() -> None:
    found, wanted = anchors()
    assert found.unseen() == []
    assert wanted(CrashStep.NOTHING, False, False) == ["kexec_crash", "machine_crash_shutdown", "__start_xen"]
    # Another CPU may be at kexec_crash(), too.
    assert wanted(CrashStep.NOTHING, True, False) == ["machine_crash_shutdown", "kexec_crash", "__start_xen"]
    after = {step: wanted(step) for step in CrashStep if CrashStep.SAVED <= step < CrashStep.MC_SWAPPED}
    assert [names[0] for names in after.values()] == [
        "smp_send_nmi_allbutself", "__stop_this_cpu", "kexec_crash_save_info", "machine_kexec", "kexec_reloc",
    ]  # fmt: skip
    for step, names in after.items():
        assert len(names) == len(set(names)) == 4 and set(names) > THE_THREE, step
    assert wanted(CrashStep.MC_SWAPPED) == wanted(CrashStep.INFO_SAVED)
    assert after[CrashStep.ARMED][-1] == "kexec_crash_save_info"  # the end of the wait is one of the three


def test_free_slots_are_used_for_later_stages() -> None:
    """For the stages after the next one, where other CPUs have no anchor."""
    _, wanted = anchors(lacking=frozenset({"do_nmi_crash", "kexec_crash_save_cpu"}))
    assert wanted(CrashStep.SAVED) == ["smp_send_nmi_allbutself", "__stop_this_cpu", "kexec_crash_save_info",
                                      "machine_kexec"]  # fmt: skip
    assert wanted(CrashStep.INFO_SAVED) == ["kexec_reloc", "__stop_this_cpu", "__start_xen"]


@pytest.mark.parametrize(
    ("slots", "unseen"),
    [(4, []), (3, ["cpu-save"]), (2, ["nmi-taken", "cpu-save"]), (1, ["nmi-taken", "cpu-save", "cpu-stop"]),
     (0, [stage.id for stage in STAGES])],
)  # fmt: skip
def test_fewer_give_up_stages_of_other_cpus(slots: int, unseen: list[str]) -> None:
    found, wanted = anchors(slots)
    assert [stage.id for stage in found.unseen()] == unseen
    for entered, owned in ((False, False), (True, False), (True, True)):
        for step in CrashStep if owned else [CrashStep.NOTHING]:
            assert len(wanted(step, entered, owned)) <= slots
    ahead = [wanted(step)[:1] for step in CrashStep if CrashStep.SAVED <= step < CrashStep.MC_SWAPPED]
    path = "smp_send_nmi_allbutself __stop_this_cpu kexec_crash_save_info machine_kexec kexec_reloc".split()
    assert ahead == [[name][:slots] for name in path]
    assert wanted(CrashStep.NOTHING, False, False)[:1] == ["kexec_crash"][:slots]
    assert wanted(CrashStep.NOTHING, True, False)[:1] == ["machine_crash_shutdown"][:slots]


@pytest.mark.parametrize(
    ("slots", "leaving"),
    [
        (4, ["the IRET", "kexec_reloc", "do_nmi_crash", "__stop_this_cpu"]),
        (3, ["the IRET", "kexec_reloc", "do_nmi_crash"]),  # the entries go on being counted
        (2, ["the IRET", "kexec_reloc"]),
        (1, ["kexec_reloc"]),
    ],
)
def test_the_iret_and_the_handover_are_waited_for_together(slots: int, leaving: list[str]) -> None:
    """It may be left out."""
    found, wanted = anchors(slots, unblocked=1000)
    assert wanted(CrashStep.INFO_SAVED) == leaving
    others = [step for step in CrashStep if step >= CrashStep.SAVED and step is not CrashStep.INFO_SAVED]
    assert [wanted(step) for step in others] == [anchors(slots)[1](step) for step in others]  # as without it
    assert found.last == "handover"
    assert ("nmis-unblocked" in [stage.id for stage in found.unseen()]) is (slots == 1)


def test_the_crashing_cpu_is_no_further_than_where_it_stops_next() -> None:
    steps = CrashStep.ARMED, CrashStep.WAITED, CrashStep.STOPPED, CrashStep.INFO_SAVED, CrashStep.MC_SWAPPED
    after = [CrashStep.WAITED, CrashStep.STOPPED, CrashStep.INFO_SAVED, CrashStep.NEUTRALISED, CrashStep.NEUTRALISED]
    assert [anchors(unblocked=1000)[0].step_after(step) for step in steps] == after  # it may leave the IRET out
    few = anchors(lacking=frozenset({"kexec_crash_save_info", "kexec_reloc"}))[0]
    assert [few.step_after(step) for step in (CrashStep.WAITED, CrashStep.INFO_SAVED)] == [
        CrashStep.INFO_SAVED, CrashStep.NEUTRALISED,
    ]  # fmt: skip


def test_the_last_stage_is_the_last_with_an_anchor() -> None:
    assert anchors()[0].last == "handover"
    assert anchors(lacking=frozenset({"kexec_reloc"}))[0].last == "exec-entry"
