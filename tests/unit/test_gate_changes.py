"""What changed each gate: the list that follows from reading every gate again."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines.changed import MC, NMI, Machine
from tests.schema import SCHEMA
from xen_symbols.crashpath import generations
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import Outcome
from xen_symbols.crashpath.context import Context, Followed
from xen_symbols.crashpath.engine import evaluate, judge
from xen_symbols.crashpath.gatechanges import CaughtWrite, GateChange, GateHistory, Moment, Writes, moment_of
from xen_symbols.crashpath.position import at_stage
from xen_symbols.crashpath.stages import BY_ID, NORMAL, OtherStep, Position, Span
from xen_symbols.describe.changes import describe_traced_change
from xen_symbols.report.blocks import report_blocks
from xen_symbols.report.console import plain
from xen_symbols.report.model import Verdict
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.x86.gate import SIZE, Gate, decode
from xen_symbols.xen.state import read_state

GATES = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from((NMI, MC))),
    st.binary(min_size=SIZE, max_size=SIZE).map(decode),
)


HERE = Position(NORMAL, None, None, Span(0, 0), {}, frozenset())


@given(st.lists(GATES, min_size=2, max_size=6))
def test_the_changes_lead_from_the_first_gates_to_the_last(readings: list[dict]) -> None:  # type: ignore[type-arg]
    """Applied in order they give every gate as last read, and each starts from the result of the one before."""
    history = GateHistory()
    now: dict[tuple[int, int], Gate] = {}
    for stop, gates in enumerate(readings):
        seen = history.see(Moment(gates, HERE, stop))
        assert seen.keys() == now.keys() & gates.keys()
        for key, change in seen.items():
            assert (change.cpu, change.vector) == key and change.before == now[key] and change.after == gates[key]
            assert bool(change.changed) is (change.before != change.after)
            assert change.now.stop == stop and change.since.stop is not None and change.since.stop < stop
        now |= gates
    assert not any(change.changed for change in history.see(Moment(now, HERE, len(readings))).values())


def test_each_property_has_its_name() -> None:
    before = decode(bytes.fromhex("b32008e0028e2040d082ffff00000000"))
    found = {}
    for byte, bit in itertools.product(range(SIZE), range(8)):
        raw = bytearray(before.raw)
        raw[byte] ^= 1 << bit
        then, now = (Moment({(0, NMI): gate}, HERE) for gate in (before, decode(bytes(raw))))
        found[byte, bit] = GateChange(0, NMI, then, now).changed
    assert all(len(names) == 1 for names in found.values())
    assert {names[0] for names in found.values()} == {
        "handler", "selector", "ist", "type", "dpl", "present", "reserved",
    }  # fmt: skip
    assert [found[4, bit][0] for bit in range(8)] == ["ist"] * 3 + ["reserved"] * 5


ALL = frozenset(range(4))


def at(stage: str, cpu: int = 0, online: frozenset[int] = ALL, **seen: int) -> Position:
    """A position with CPU 0 crashing; `seen` is the last step that each other CPU has surely completed, as cpu1=3."""
    if stage == "normal":
        return Position(NORMAL, None, None, Span(0, 0), dict.fromkeys(online, Span(0, 0)), online)
    spans = {int(name[3:]): Span(low, OtherStep.PARKED) for name, low in seen.items()}
    return at_stage(BY_ID[stage], cpu, None if stage == "crash-entry" else 0, online, spans)


@dataclass(frozen=True)
class Case:
    """One gate of a recorded machine, with another value at an earlier stop."""

    cpu: int
    vector: int
    was: dict[str, Any]
    since: Position
    now: Position
    generation: str = "4.17.0"
    guest: bool = False
    poke: bytes = b""  # its IST byte, if not 0
    by: tuple[int, str] | None = None  # the CPU and function that were seen to write it

    def outcome(self) -> Outcome:
        machine = Machine("4.17-handover")
        if self.poke:
            machine.gate(self.cpu, self.vector, 4, self.poke)
        state = read_state(machine.memory)
        guests = frozenset({self.cpu}) if self.guest else frozenset()
        now = moment_of(state, self.now, 1)
        symbols = machine.symbols
        was = {k: symbols.address(v) if isinstance(v, str) else v for k, v in self.was.items()}
        key = (self.cpu, self.vector)
        since = Moment({**now.gates, key: now.gates[key]._replace(**was)}, self.since, 0, guests)
        history = GateHistory()
        history.see(since)
        generation = generations.BY_ID[self.generation]
        writes = {key: [CaughtWrite(self.by[0], symbols.address("kexec_reloc") + 8, self.by[1])]} if self.by else {}
        context = Context(machine.memory, state, self.now, generation, Followed(gates_before=history.see(now, writes)))
        return next(check for check in CHECKS if check.id == "gate-change").judge(context, self.cpu)


ARMING = (at("shutdown-entry"), at("shootdown"))
LEAVING = (at("exec-entry"), at("handover"))
TAKEN = (at("nmi-taken", 1, cpu2=1), at("cpu-stop", 2, cpu1=1))
PARTED = (at("normal", online=frozenset({0, 1, 2})), at("crash-entry", online=frozenset({0, 1, 2})))
# The recorded gates: NMI trap_nop/0 on CPU 0, nmi/2 elsewhere; #MC trap_nop/0 on all. `was` is the earlier value.
ALLOWED = {
    "the crashing CPU's NMI gate": Case(0, NMI, {"handler": "nmi", "ist": 2}, *ARMING),
    "its #MC gate": Case(0, MC, {"ist": 1}, *ARMING),
    "another's #MC gate by itself": Case(1, MC, {"ist": 1}, at("nmi-taken", 1), at("cpu-save", 1)),
    "later, when it answers late": Case(1, MC, {"ist": 1}, at("crash-info"), at("handover")),
    "its IST by the crashing CPU of the RFC": Case(1, MC, {"ist": 1}, *ARMING, "rfc-v1"),
    "#MC handlers": Case(3, MC, {"handler": "machine_check"}, *LEAVING),
    "whole by the RFC": Case(3, MC, {"handler": "machine_check", "ist": 1}, *LEAVING, "rfc-v1"),
    "an IST that the handover brings back": Case(2, MC, {"ist": 0}, *LEAVING, poke=b"\x01"),
    "a guest's state loaded": Case(1, MC, {"ist": 1}, at("normal"), at("crash-entry"), guest=True),
    "and given up": Case(1, NMI, {"ist": 0}, at("normal"), at("shootdown"), guest=True),
    "a CPU that comes back": Case(3, MC, {"ist": 1}, *PARTED),
    "nothing": Case(1, NMI, {}, *ARMING),
}
FORBIDDEN = {
    "too early": (Case(0, MC, {"ist": 1}, at("crash-entry"), at("shutdown-entry")), ("mc-gate-ist",)),
    "too late": (Case(0, NMI, {"handler": "nmi", "ist": 2}, at("shootdown"), at("shootdown-done")),
                 ("nmi-gate-handler", "nmi-gate-ist")),
    "a gate that this generation leaves alone": (Case(0, NMI, {"handler": "nmi"}, *ARMING, "4.21.2"),
                                                 ("nmi-gate-handler",)),
    "by the crashing CPU, where each does it itself": (Case(1, MC, {"ist": 1}, *ARMING), ("mc-gate-ist",)),
    "IST back": (Case(1, MC, {"ist": 0}, *TAKEN, poke=b"\x01"), ("mc-gate-ist",)),
    "IST back on the crashing CPU": (Case(0, NMI, {"ist": 0}, *TAKEN, poke=b"\x02"), ("nmi-gate-ist",)),
    "no guest's state": (Case(1, MC, {"ist": 1}, at("normal"), at("crash-entry")), ("mc-gate-ist",)),
    "a guest's state on a CPU that is in the handler": (
        Case(1, MC, {"ist": 0}, *TAKEN, guest=True, poke=b"\x01"), ("mc-gate-ist",)),
    "the type": (Case(1, NMI, {"type": 15}, *ARMING), ("nmi-gate-type",)),
    "anything in 4.2": (Case(0, MC, {"handler": "machine_check"}, *LEAVING, "4.2.0"), ("mc-gate-handler",)),
    "what a CPU that comes back does, once the crash is on": (
        Case(3, NMI, {"ist": 0}, at("shootdown", online=PARTED[0].online),
             at("handover", online=PARTED[0].online)), ("nmi-gate-ist",)),
}  # fmt: skip

# What a finding says of each, and after it where the change was seen first.
OBSERVED = {
    "too early": ("#MC IST 1 -> 0",),
    "too late": ("NMI handler nmi -> trap_nop", "NMI IST 2 -> 0"),
    "a gate that this generation leaves alone": ("NMI handler nmi -> trap_nop",),
    "by the crashing CPU, where each does it itself": ("#MC IST 1 -> 0",),
    "IST back": ("#MC IST 0 -> 1",),
    "IST back on the crashing CPU": ("NMI IST 0 -> 2",),
    "no guest's state": ("#MC IST 1 -> 0",),
    "a guest's state on a CPU that is in the handler": ("#MC IST 0 -> 1",),
    "the type": ("NMI type 15 -> 14",),
    "anything in 4.2": ("#MC handler machine_check -> trap_nop",),
    "what a CPU that comes back does, once the crash is on": ("NMI IST 0 -> 2",),
}


def case(name: str, by: tuple[int, str], **other: Any) -> Case:
    return replace(ALLOWED[name], by=by, **other)


SEEN = {
    "the crashing CPU, in what the shootdown was made part of": case(
        "the crashing CPU's NMI gate", (0, "machine_crash_shutdown")
    ),
    "the shootdown itself": case("its #MC gate", (0, "nmi_shootdown_cpus")),
    "a helper": case("the crashing CPU's NMI gate", (0, "_set_gate_lower")),
    "the CPU itself": case("another's #MC gate by itself", (1, "do_nmi_crash")),
    "the crashing CPU of the RFC": case("its IST by the crashing CPU of the RFC", (0, "machine_crash_shutdown")),
    "the RFC's helper": case("whole by the RFC", (0, "_set_gate")),
    "machine_kexec": case("#MC handlers", (0, "machine_kexec")),
    "one that answers late, meanwhile": case("#MC handlers", (3, "do_nmi_crash")),
    "a guest's state loaded": case("a guest's state loaded", (1, "svm_ctxt_switch_to")),
    "a guest's state loaded and given up": Case(
        2, MC, {}, at("crash-entry"), at("shutdown-entry"), by=(2, "svm_ctxt_switch_from")
    ),
    "whatever comes before the crash": case("a guest's state loaded", (0, "vmx_vmexit_handler")),
    "whoever has the table's memory": Case(
        3,
        MC,
        {},
        at("crash-entry", online=PARTED[0].online),
        at("shutdown-entry", online=PARTED[0].online),
        by=(1, "clear_page"),
    ),
}
STRANGERS = {
    "another function": case("#MC handlers", (0, "memcpy")),
    "another CPU": case("another's #MC gate by itself", (0, "do_nmi_crash")),
    "the crashing CPU": case("another's #MC gate by itself", (0, "machine_crash_shutdown")),
    "a helper on another CPU": case("another's #MC gate by itself", (2, "set_ist")),
    "the right function too early": Case(0, MC, {}, at("crash-entry"), at("shutdown-entry"),
                                         by=(0, "machine_kexec")),
    "the right function of another generation": case("#MC handlers", (0, "_set_gate"), generation="4.2.0"),
    "nothing changed": Case(1, NMI, {}, *LEAVING, by=(0, "machine_kexec")),
    "a switch of guests after the NMI": Case(1, MC, {}, *TAKEN, by=(1, "svm_ctxt_switch_to")),
    "the same, with a guest's state": Case(1, MC, {}, *TAKEN, guest=True, by=(1, "svm_ctxt_switch_to")),
}  # fmt: skip


@pytest.mark.parametrize("what", SEEN)
def test_a_writer_that_is_allowed(what: str) -> None:
    outcome = SEEN[what].outcome()
    assert (outcome.verdict, outcome.reason) == (Verdict.PASS, None)
    assert not any("written" in text for text in outcome.observed)


@pytest.mark.parametrize("what", STRANGERS)
def test_a_writer_that_is_not_allowed(what: str) -> None:
    case = STRANGERS[what]
    outcome = case.outcome()
    assert outcome.verdict is Verdict.FAIL and not outcome.because_of and outcome.reason is not None
    assert case.by is not None
    name = "NMI" if case.vector == NMI else "#MC"
    assert outcome.observed[-1] == f"{name} written by CPU {case.by[0]} kexec_reloc+0x8, after {case.since.stage.id}"


def test_a_change_whose_writer_was_not_seen_says_so() -> None:
    assert "was not seen" in (ALLOWED["#MC handlers"].outcome().reason or "")
    assert ALLOWED["nothing"].outcome().reason is None


class Watched:
    """A recorded machine whose gate of CPU 1 a watchpoint watches."""

    key = (1, MC)

    def __init__(self) -> None:
        self.machine = Machine("4.17-handover")
        self.state = read_state(self.machine.memory)
        self.writes = Writes()
        self.writes.look(self.state)
        self.raw = moment_of(self.state, HERE).gates[self.key].raw

    def hit(self, symbol: str, offset: int, byte: int) -> None:
        """gdb says that CPU 1 wrote, when the gate's IST byte is `byte`."""
        contents = {self.key: self.raw[:4] + bytes([byte]) + self.raw[5:]}
        self.writes.caught(self.key, 1, self.machine.symbols.address(symbol) + offset, contents)

    def taken(self) -> list[tuple[int, str]]:
        return [(write.cpu, write.function) for write in self.writes.take(self.state).get(self.key, [])]


def test_a_new_hit_names_the_writer() -> None:
    watched = Watched()
    watched.hit("do_nmi_crash", 0x6A, 1)
    watched.hit("machine_kexec", 0x64, 0)
    assert watched.taken() == [(1, "do_nmi_crash"), (1, "machine_kexec")]
    assert watched.taken() == []


def test_a_hit_reported_late_names_no_writer() -> None:
    """The gate held this value when it was last read, at a stop or at another gate's hit."""
    watched = Watched()
    watched.hit("kexec_crash_save_cpu", 4, watched.raw[4])
    assert watched.taken() == []
    watched.writes.caught((2, MC), 2, watched.machine.symbols.address("do_nmi_crash") + 0x6A,
                          {(2, MC): b"new", watched.key: watched.raw[:4] + b"\x01" + watched.raw[5:]})  # fmt: skip
    watched.hit("kexec_crash_save_cpu", 4, 1)
    assert watched.taken() == []


def test_a_hit_at_a_breakpoint_names_no_writer() -> None:
    watched = Watched()
    watched.hit("kexec_crash_save_cpu", 0, 1)
    assert watched.taken() == []


def test_a_part_of_a_function_goes_by_its_name() -> None:
    names = ["do_nmi_crash", "do_nmi_crash.cold", "machine_kexec.part.0.constprop.1", "_etext"]
    addresses = [0x1000, 0x2000, 0x3000, 0x4000]
    watched = Watched()
    table = SymbolTable("", "test", ListedRows(addresses, "TttT", names), [(0x1000, 0x4000)])
    for number, pc in enumerate((0x1004, 0x2004, 0x3004, 0x5000, 0x800)):
        contents = {watched.key: watched.raw[:4] + bytes([number + 1]) + watched.raw[5:]}
        watched.writes.caught(watched.key, 1, pc, contents)
    taken = watched.writes.take(watched.state._replace(symbols=table))[watched.key]
    assert [write.function for write in taken] == ["do_nmi_crash", "do_nmi_crash", "machine_kexec"]


@pytest.mark.parametrize("what", ALLOWED)
def test_what_xen_does_to_a_gate_is_allowed(what: str) -> None:
    case = ALLOWED[what]
    outcome = case.outcome()
    assert outcome.verdict is Verdict.PASS
    assert len(outcome.observed) == len(case.was) and not any(outcome.because_of)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_xen_does_not_do_to_a_gate_there_fails(what: str) -> None:
    case, wrong = FORBIDDEN[what]
    outcome = case.outcome()
    assert (outcome.verdict, outcome.because_of) == (Verdict.FAIL, (wrong,))
    assert outcome.observed == [f"{text}, after {case.since.stage.id}" for text in OBSERVED[what]]


def test_a_change_that_a_check_of_the_stage_sees_follows_from_it() -> None:
    machine = Machine()
    state = read_state(machine.memory)
    before = moment_of(state, at("exec-entry"), 0)
    machine.gate(2, NMI, 4, b"\x00")
    machine.memory.forget()
    state = read_state(machine.memory)
    history = GateHistory()
    history.see(before)
    seen = history.see(moment_of(state, at("handover"), 1))
    context = Context(machine.memory, state, at("handover"), generations.BY_ID["4.17.0"], Followed(gates_before=seen))
    found = {(f.check, f.follows) for f in judge(context) if f.cpu == 2 and f.verdict is Verdict.FAIL}
    assert found == {("nmi-gate-ist", None), ("gate-change", "nmi-gate-ist")}


def test_one_look_alone_judges_no_change() -> None:
    assert "gate-change" not in {finding.check for finding in Machine().report().findings}


def test_a_change_of_a_real_xens_gate_is_listed_and_printed() -> None:
    machine = Machine()
    history = GateHistory()
    history.see(moment_of(read_state(machine.memory), HERE))
    machine.gate(2, NMI, 4, b"\x00")
    machine.memory.forget()
    report = evaluate(machine.memory)
    state = read_state(machine.memory)
    seen = history.see(moment_of(state, at("handover"), 0)).values()
    report.gate_changes = [describe_traced_change(state.symbols, change) for change in seen if change.changed]
    made = report.to_json()
    jsonschema.validate(made, SCHEMA)
    (change,) = made["gate_changes"]
    assert (change["cpu"], change["vector"], change["changed"], change["stage"]) == (2, NMI, ["ist"], "handover")
    assert (change["before"]["ist"], change["after"]["ist"], change["since"]) == (2, 0, None)
    text = plain(report_blocks(made))
    assert "Changes of gates" in text and "IST 2 -> 0" in text
