"""What changed each gate: the list that follows from reading every gate again."""

from __future__ import annotations

import itertools

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_checks import MC, NMI, Machine
from tests.unit.test_report import SCHEMA
from xen_symbols.crashpath.engine import evaluate, gate_change_json
from xen_symbols.crashpath.gatechanges import GateHistory, gates_of
from xen_symbols.report.blocks import report_blocks
from xen_symbols.report.console import plain
from xen_symbols.x86.gate import SIZE, decode
from xen_symbols.xen.state import read_state

GATES = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from((NMI, MC))),
    st.binary(min_size=SIZE, max_size=SIZE).map(decode),
)


@given(st.lists(GATES, min_size=2))
def test_the_changes_lead_from_the_first_gates_to_the_last(readings: list[dict]) -> None:  # type: ignore[type-arg]
    """Applied in order they give every gate as it was last read, and each begins where the one before it ended."""
    history = GateHistory(readings[0])
    now = dict(readings[0])
    for stop, gates in enumerate(readings[1:]):
        changes = history.see(gates, stop)
        for change in changes:
            key = (change.cpu, change.vector)
            assert change.changed and change.before == now[key] and change.after == gates[key]
            assert change.stop == stop and (change.since is None or change.since < stop)
        assert len({(change.cpu, change.vector) for change in changes}) == len(changes)
        now |= gates
    assert history.see(now, len(readings)) == []


def test_each_property_has_its_name() -> None:
    before = decode(bytes.fromhex("b32008e0028e2040d082ffff00000000"))
    history = GateHistory({(0, NMI): before})
    found = {}
    for stop, (byte, bit) in enumerate(itertools.product(range(SIZE), range(8))):
        raw = bytearray(before.raw)
        raw[byte] ^= 1 << bit
        (change,) = history.see({(0, NMI): decode(bytes(raw))}, stop)
        found[byte, bit] = change.changed
        history = GateHistory({(0, NMI): before})
    assert all(len(names) == 1 for names in found.values())
    assert {names[0] for names in found.values()} == {
        "handler", "selector", "ist", "type", "dpl", "present", "reserved",
    }  # fmt: skip
    assert [found[4, bit][0] for bit in range(8)] == ["ist"] * 3 + ["reserved"] * 5


def test_a_change_of_a_real_xens_gate_is_listed_and_printed() -> None:
    machine = Machine()
    history = GateHistory(gates_of(read_state(machine.memory)))
    machine.gate(2, NMI, 4, b"\x00")
    machine.memory.forget()
    report = evaluate(machine.memory)
    state = read_state(machine.memory)
    changes = [gate_change_json(report, state.symbols, change) for change in history.see(gates_of(state), 0)]
    report.gate_changes = list(changes)
    made = report.to_json()
    jsonschema.validate(made, SCHEMA)
    (change,) = made["gate_changes"]
    assert (change["cpu"], change["vector"], change["changed"], change["stage"]) == (2, NMI, ["ist"], "handover")
    assert (change["before"]["ist"], change["after"]["ist"], change["since"]) == (2, 0, None)
    text = plain(report_blocks(made))
    assert "Changes of gates" in text and "IST 2 -> 0" in text
