"""Stacks, exception frames and calls of one CPU, on stacks written word by word here."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tests.machines.stacks import (
    BASE,
    FUNCTION,
    GUEST,
    GUEST_CS,
    IDLE,
    POISON,
    RFLAGS,
    TEXT,
    TOP,
    TSS_PAGE,
    XEN_CS,
    Stacks,
    in_nmi_crash,
    inside,
)
from xen_symbols.absence import Absent
from xen_symbols.x86 import tss
from xen_symbols.x86.call import follows_indirect_call, follows_relative_call

BEFORE = "what was before it is not known: "

def calls(step: dict[str, Any]) -> list[str]:
    return [call["symbol"].partition("+")[0] for call in step["calls"]]


@pytest.fixture(params=[False, True], ids=["ist-4.2", "ist-4.14"])
def machine(request: pytest.FixtureRequest) -> Stacks:
    return Stacks(new=request.param)


# -- the call chain ---------------------------------------------------------------------------


def test_a_cpu_that_was_shot_down(machine: Stacks) -> None:
    in_nmi_crash(machine)
    trace = machine.trace()
    here, before = trace["steps"]
    assert (here["at"]["symbol"], here["stack"]) == ("do_nmi_crash+0x20", "NMI")
    assert calls(here) == ["do_nmi", "handle_ist_exception"]
    assert here["calls"][0]["symbol"] == "do_nmi+0x20/0x100"
    assert (before["interrupted_by"], before["at"]["symbol"]) == ("NMI", "default_idle+0x20")
    assert (before["stack"], calls(before)) == ("primary", ["idle_loop"])
    assert [(f["stack"], f["state"]) for f in trace["frames"]] == [("NMI", "current")]
    assert not trace["lost"] and trace["stacks"]["processor_id"] == 1


@pytest.mark.parametrize(
    ("new", "order"),
    [(False, ["#DF", "NMI", "#MC", "primary"]), (True, ["#MC", "NMI", "#DB", "#DF", "primary"])],
)
def test_each_stack_has_its_name_by_the_numbers_of_its_xen(new: bool, order: list[str]) -> None:
    machine = Stacks(new)
    machine.at("idle_loop", TOP - 0x400)
    stacks = machine.trace()["stacks"]
    assert [stack["name"] for stack in stacks["list"]] == order
    pages = [(int(stack["start"], 16) - BASE) >> 12 for stack in stacks["list"]]
    assert pages == ([1, 2, 3, 4, 6] if new else [0, 1, 2, 6])
    assert ("6001660473" in stacks["names_by"]) == new


@pytest.mark.parametrize(("name", "vector"), [("#MC", 18), ("NMI", 2), ("#DF", 8)])
def test_the_frame_on_each_stack_is_called_by_its_own_name(machine: Stacks, name: str, vector: int) -> None:
    machine.frame(machine.tops[name], vector, inside("default_idle"), TOP - 0x400)
    machine.at("do_nmi", machine.tops[name] - 0x200)
    trace = machine.trace()
    assert [step["interrupted_by"] for step in trace["steps"]] == [None, name]
    assert [(f["stack"], f["vector"], f["event"], f["state"]) for f in trace["frames"]] == [
        (name, vector, name, "current")
    ]


def test_from_stack_to_stack(machine: Stacks) -> None:
    """A machine check in an NMI handler, and a double fault in its handler."""
    machine.frame(machine.tops["NMI"], 2, inside("default_idle"), TOP - 0x400)
    machine.frame(machine.tops["#MC"], 18, inside("do_nmi"), machine.tops["NMI"] - 0x200)
    machine.frame(machine.tops["#DF"], 8, inside("handle_ist_exception"), machine.tops["#MC"] - 0x100)
    machine.at("last", machine.tops["#DF"] - 0x300)
    trace = machine.trace()
    assert [step["interrupted_by"] for step in trace["steps"]] == [None, "#DF", "#MC", "NMI"]
    assert [step["stack"] for step in trace["steps"]] == ["#DF", "#MC", "NMI", "primary"]
    assert {frame["state"] for frame in trace["frames"]} == {"current"}


def test_an_nmi_without_ist_is_on_the_primary_stack(machine: Stacks) -> None:
    end = TOP - 0x600
    machine.frame(end, 2, inside("default_idle"), end + 8)  # the CPU aligns rsp to 16
    machine.memory[end + 8] = inside("idle_loop")
    machine.memory[end - 176] = inside("handle_ist_exception")
    machine.at("do_nmi_crash", end - 0x200)
    trace = machine.trace()
    assert [(step["interrupted_by"], step["stack"]) for step in trace["steps"]] == [
        (None, "primary"), ("NMI", "primary"),
    ]  # fmt: skip
    assert [calls(step) for step in trace["steps"]] == [["handle_ist_exception"], ["idle_loop"]]


@pytest.mark.parametrize("change", [{"rsp": TOP - 0x5F0}, {"cs": 0x10}, {"rflags": 0}, {"rip": GUEST}, {"vector": 256}])
def test_words_that_only_look_like_a_frame_are_not_taken_for_one(machine: Stacks, change: dict[str, int]) -> None:
    end = TOP - 0x600
    values = {"vector": 14, "rip": inside("default_idle"), "rsp": end, "cs": XEN_CS, "rflags": RFLAGS}
    machine.at("last", end - 0x200)
    machine.frame(end, **values)
    assert len(machine.trace()["steps"]) == 2
    machine.frame(end, **(values | change))
    assert len(machine.trace()["steps"]) == 1


def test_an_interrupted_guest(machine: Stacks) -> None:
    """Xen's entry code moves a guest's frame to the primary stack; what stays behind is not an earlier NMI's frame."""
    for end in (machine.tops["NMI"], machine.guest_regs + 168):
        machine.frame(end, 2, GUEST, 0xFFFFC90000001000, GUEST_CS)
    machine.at("do_nmi_crash", machine.guest_regs - 0x100)
    trace = machine.trace()
    assert trace["end"] == "a guest was running, and entered Xen by NMI"
    assert (trace["guest"]["rip"], trace["guest"]["cs"]) == (hex(GUEST), "0xe033")
    assert [(f["stack"], f["state"]) for f in trace["frames"]] == [("NMI", "moved")]


def test_a_guest_that_was_entered_again_since(machine: Stacks) -> None:
    machine.frame(machine.tops["NMI"], 2, GUEST, 0xFFFFC90000001000, GUEST_CS)
    machine.frame(machine.guest_regs + 168, 0x100, GUEST + 7, 0xFFFFC90000001000, GUEST_CS)
    machine.at("last", machine.guest_regs - 0x100)
    trace = machine.trace()
    assert trace["end"] == "a guest was running, and entered Xen by a system call or hypercall"
    assert [(f["stack"], f["state"], f["says"]) for f in trace["frames"]] == [
        ("NMI", "stale", "left from an earlier NMI")
    ]


def test_what_a_guest_left_behind_is_not_taken_for_the_idle_vcpus(machine: Stacks) -> None:
    machine.frame(machine.guest_regs + 168, 0x100, GUEST, 0xFFFFC90000001000, GUEST_CS)
    machine.memory[TOP - (56 if machine.new else 24)] = IDLE
    machine.at("idle_loop", machine.guest_regs - 0x100)
    trace = machine.trace()
    assert trace["guest"] is None and trace["end"] == "the idle vCPU was running: no guest was interrupted"


def test_which_vcpu_ran_may_not_be_known(machine: Stacks) -> None:
    machine.frame(machine.guest_regs + 168, 0x100, GUEST, 0xFFFFC90000001000, GUEST_CS)
    del machine.memory[TEXT + 0x304000 + 8]
    machine.at("idle_loop", machine.guest_regs - 0x100)
    trace = machine.trace()
    assert trace["guest"] is None and trace["lost"] and "it is not known which vCPU ran" in trace["end"]


# -- frames that mislead ----------------------------------------------------------------------


def test_a_stale_frame_is_not_taken_for_the_current_one(machine: Stacks) -> None:
    in_nmi_crash(machine)
    machine.at("idle_loop", TOP - 0x400)
    machine.frame(machine.tops["#MC"], 18, inside("last"), TOP - 0x500)
    trace = machine.trace()
    assert [step["interrupted_by"] for step in trace["steps"]] == [None]
    assert {(f["stack"], f["state"], f["says"]) for f in trace["frames"]} == {
        ("NMI", "stale", "left from an earlier NMI"), ("#MC", "stale", "left from an earlier #MC"),
    }  # fmt: skip


def test_the_frame_of_another_exception_is_not_relabelled(machine: Stacks) -> None:
    """The frame on the NMI's page says #MC, as if the labels were one page off."""
    machine.frame(machine.tops["NMI"], 18, inside("default_idle"), TOP - 0x400)
    machine.at("do_nmi", machine.tops["NMI"] - 0x200)
    trace = machine.trace()
    assert len(trace["steps"]) == 1 and trace["lost"] and trace["frames"] == []
    assert trace["end"] == f"{BEFORE}no frame is at the top of the NMI stack: the vector there is 18, not 2"


def test_a_nested_nmi_has_overwritten_the_first(machine: Stacks) -> None:
    in_nmi_crash(machine)
    end = machine.tops["NMI"]
    machine.frame(end, 2, inside("do_nmi"), end - 0x200)
    trace = machine.trace()
    assert [step["stack"] for step in trace["steps"]] == ["NMI", "NMI"]
    assert trace["lost"]
    assert trace["end"] == "another NMI came while the first was handled, and overwrote its frame"


def test_a_frame_that_is_only_half_there(machine: Stacks) -> None:
    """At the first instruction of the entry code, five words are the NMI's; the vector is still an earlier frame's."""
    in_nmi_crash(machine)
    end = machine.tops["NMI"]
    machine.memory[end - 48] = 18 << 32
    machine.at("handle_ist_exception", end - 40)
    trace = machine.trace()
    assert [(step["interrupted_by"], step["stack"]) for step in trace["steps"]] == [
        (None, "NMI"), ("an event", "primary"),
    ]  # fmt: skip
    assert trace["frames"][0]["vector"] is None
    machine.at("handle_ist_exception", end)
    assert machine.trace()["end"] == f"{BEFORE}nothing has been pushed on the NMI stack yet"


def test_an_overflowed_stack_pointer_is_on_no_stack(machine: Stacks) -> None:
    machine.at("last", TOP - 0x2100)
    trace = machine.trace()
    assert trace["steps"][0]["stack"] is None and trace["lost"]
    below = "no stack: below the primary one, which has overflowed, or not a stack pointer"
    assert trace["end"] == f"{BEFORE}rsp {TOP - 0x2100:#x} is on {below}"
    machine.at("last", TOP + 0x8000)
    assert machine.trace()["end"] == f"{BEFORE}rsp {TOP + 0x8000:#x} is on none of this CPU's stacks"


# -- CPUs that are elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cs", "more", "end"),
    [
        (XEN_CS, {"guest_mode": True}, "it runs an HVM guest"),
        (GUEST_CS, {}, "it runs a guest: Xen's stack is empty"),
        (0x10, {}, "what runs there is not Xen"),
    ],
)
def test_a_cpu_that_does_not_run_xen(machine: Stacks, cs: int, more: dict[str, Any], end: str) -> None:
    in_nmi_crash(machine)
    machine.at("guest", machine.tops["NMI"] - 0x200, cs, **more)
    trace = machine.trace()
    assert trace["end"].startswith(end) and not any(step["calls"] for step in trace["steps"])
    assert [frame["state"] for frame in trace["frames"]] == ["stale"]
    assert trace["stacks"]["list"][-1]["name"] == "primary"


def test_without_registers_nothing_is_current_or_stale(machine: Stacks) -> None:
    in_nmi_crash(machine)
    machine.registers = Absent("no physical CPU could be matched to it")
    trace = machine.trace()
    assert (trace["steps"], trace["absent"]) == ([], "no physical CPU could be matched to it")
    assert [frame["state"] for frame in trace["frames"]] == ["unknown"]
    machine.registers = {"rip": TEXT}
    assert machine.trace()["absent"] == "no rsp, cs among its registers (a test)"


# -- unknown stacks ---------------------------------------------------------------------------


def test_the_tss_is_not_believed_blindly(machine: Stacks) -> None:
    in_nmi_crash(machine)
    machine.put_tss(TSS_PAGE + 64 * machine.new, machine.guest_regs + 168, [POISON] * 7)
    trace = machine.trace()
    why = f"what lies at {TSS_PAGE:#x} is not Xen's TSS: its stack pointers are not in one CPU's stacks"
    assert (trace["stacks"], trace["stacks_absent"]) == (None, why)
    assert trace["lost"] and trace["frames"] == [] and trace["steps"][0]["calls"] == []
    for at in range(TSS_PAGE, TSS_PAGE + 0x200, 8):
        machine.memory.pop(at, None)
    unread = f"its TSS could not be read: {TSS_PAGE + 0x40:#x} is not mapped"
    assert machine.trace()["stacks_absent"] == unread


def test_numbers_that_contradict_each_other_name_nothing(machine: Stacks) -> None:
    in_nmi_crash(machine)
    machine.df_ist = 1 if machine.new else 4
    trace = machine.trace()
    assert trace["stacks"]["names_by"].startswith("contradictory")
    assert trace["steps"][0]["stack"] == "IST 2"


def test_without_a_df_gate_the_pages_decide(machine: Stacks) -> None:
    """An AMD CPU that holds an HVM guest's state has IST 0 in its #DF gate."""
    in_nmi_crash(machine)
    machine.df_ist = 0
    trace = machine.trace()
    assert trace["stacks"]["names_by"].startswith("the page of IST 1") and trace["steps"][0]["stack"] == "NMI"


def test_tr_is_evidence_for_the_tss(machine: Stacks) -> None:
    in_nmi_crash(machine)
    assert "TR" not in machine.trace()["stacks"]["by"]
    machine.more = {"tr_base": TSS_PAGE + 64 * machine.new}
    assert machine.trace()["stacks"]["by"].endswith("which TR points to")


def test_fred_is_not_decoded(machine: Stacks) -> None:
    in_nmi_crash(machine)
    trace = machine.trace(fred=1)
    why = "FRED delivers events: its stacks and frames are not decoded"
    assert (trace["stacks"], trace["stacks_absent"]) == (None, why)


def test_what_cannot_be_read_is_reported(machine: Stacks) -> None:
    machine.memory[TOP - 0x400] = inside("idle_loop")
    machine.at("last", TOP - 0x1100)
    del machine.memory[TOP - 0x1008]
    (step,) = machine.trace()["steps"]
    where = f"the stack from {TOP - 0x1100:#x} to {TOP - 0x1000:#x}"
    assert step["absent"] == f"{where} could not be read: {TOP - 0x1100:#x} is not mapped"
    assert calls(step) == ["idle_loop"]
    machine.at("last", TOP - 0x800)
    assert "absent" not in machine.trace()["steps"][0]
    machine.text_end = FUNCTION["idle_loop"]
    (step,) = machine.trace()["steps"]
    code = f"{inside('idle_loop') - 7:#x} is not mapped"
    assert step["absent"] == f"some code that it points to could not be read: {code}"
    assert calls(step) == []


# -- calls ------------------------------------------------------------------------------------


def test_a_pointer_to_a_function_is_not_a_call(machine: Stacks) -> None:
    machine.memory[TOP - 0x400] = FUNCTION["idle_loop"]
    machine.memory[TOP - 0x408] = FUNCTION["idle_loop"] + 0x40
    # Before it, a jump and padding that looks like an indirect call.
    machine.code_before(FUNCTION["idle_loop"], bytes.fromhex("e9a567fbff9090909090"))
    machine.at("last", TOP - 0x800)
    assert calls(machine.trace()["steps"][0]) == []


def test_a_call_that_ends_its_function_is_the_callers(machine: Stacks) -> None:
    machine.memory[TOP - 0x400] = FUNCTION["idle_loop"]
    machine.call_before(FUNCTION["idle_loop"])
    machine.at("last", TOP - 0x800)
    assert [call["symbol"] for call in machine.trace()["steps"][0]["calls"]] == ["default_idle+0x100/0x100"]


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("ff d0", True), ("41 ff d3", True), ("ff 15 00 10 00 00", True), ("ff 14 25 00 10 00 00", True),
        ("ff 10", True), ("ff 50 08", True), ("ff 90 00 01 00 00", True), ("ff 14 c3", True), ("ff 54 24 08", True),
        ("ff 94 c3 00 01 00 00", True), ("ff e0", False), ("ff 25 00 10 00 00", False), ("ff d0 90", False),
        ("90 90 90 90", False), ("ff 14", False), ("ff 15", False),
    ],
)  # fmt: skip
def test_indirect_calls(code: str, call: bool) -> None:
    assert follows_indirect_call(bytes.fromhex(code).rjust(7, b"\0")) is call


def test_a_relative_call_leads_to_code() -> None:
    before = b"\0\0\xe8" + struct.pack("<i", -0x30)
    assert follows_relative_call(0x1000, before, lambda target: target == 0xFD0)
    assert not follows_relative_call(0x1000, before, lambda target: False)
    assert not follows_relative_call(0x1000, before.replace(b"\xe8", b"\xe9"), lambda target: True)


def test_the_tss() -> None:
    raw = struct.pack("<4x3Q8x7Q12x", *range(1, 11))
    assert len(raw) == tss.SIZE and tss.decode(raw) == tss.Tss((1, 2, 3), (4, 5, 6, 7, 8, 9, 10))
