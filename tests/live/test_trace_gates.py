"""`trace --gates`: every change of every gate between the stages of a real crash, and nothing else."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tests.live.machines import guest, target
from tests.unit.test_report import SCHEMA
from xencrash.trace import trace

pytestmark = pytest.mark.live

NMI, MC = 2, 18
# (CPU, vector, what changed, to which handler or IST), with CPU 0 crashing and one other.
ARMED = {(0, NMI, "handler", "trap_nop"), (0, NMI, "ist", 0), (0, MC, "ist", 0)}
PARKED = {(1, MC, "ist", 0)}
NEUTRALISED = {(0, MC, "handler", "trap_nop"), (1, MC, "handler", "trap_nop")}


def made(report: dict[str, Any]) -> set[tuple[int, int, str, Any]]:
    """(CPU, vector, property, new value) of every change in a report."""
    found = set()
    for change in report["gate_changes"]:
        for name in change["changed"]:
            value = change["after"][name]
            found.add((change["cpu"], change["vector"], name, value["symbol"] if name == "handler" else value))
    return found


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ("4.3.0", ARMED | PARKED | NEUTRALISED | {(1, NMI, "handler", "nmi_crash")}),
        ("4.17.0", ARMED | PARKED | NEUTRALISED),
        ("4.21.2", {(0, MC, "ist", 0)} | PARKED | NEUTRALISED),
    ],
)
def test_every_change_of_a_clean_crash(generation: str, expected: set[tuple[int, int, str, Any]]) -> None:
    with guest(generation, cpus=2) as lab:
        report = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=20, stall=10, gates=True,
                       trigger=lambda: lab.serial_send(b"C"))  # fmt: skip
    jsonschema.validate(report, SCHEMA)
    assert report["verdict"] == "pass"
    assert made(report) == expected
    assert len({(c["cpu"], c["vector"], name) for c in report["gate_changes"] for name in c["changed"]}) == sum(
        len(c["changed"]) for c in report["gate_changes"]
    )  # each property of each gate once
    stages = {(c["cpu"], c["vector"], c["changed"][0]): (c["since"], c["stage"]) for c in report["gate_changes"]}
    assert stages[0, MC, "ist"][1] == "shootdown"
    assert stages[0, MC, "handler"] == stages[1, MC, "handler"] == ("exec-entry", "handover")
