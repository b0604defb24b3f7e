"""Changes of gates as the JSON contract gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from xen_symbols.describe.machine import describe_gate, describe_place
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.x86.gate import Gate

if TYPE_CHECKING:
    from xen_symbols.report import contract


class Write(Protocol):
    """A write to a gate that a watchpoint caught: by which CPU, and the instruction after it."""

    @property
    def cpu(self) -> int: ...
    @property
    def pc(self) -> int: ...


class GateChange(Protocol):
    """What is known of one: xen_symbols.crashpath makes them."""

    @property
    def cpu(self) -> int: ...
    @property
    def vector(self) -> int: ...
    @property
    def changed(self) -> Sequence[str]: ...
    @property
    def before(self) -> Gate: ...
    @property
    def after(self) -> Gate: ...
    @property
    def writes(self) -> Sequence[Write]: ...


class TracedChange(GateChange, Protocol):
    """One between two stops of a trace: `stop` is the index of the later one in the report's stages, `stage` its name;
    `since_stage` is where the gate was last read, None before the first."""

    @property
    def since_stage(self) -> str | None: ...
    @property
    def stage(self) -> str: ...
    @property
    def stop(self) -> int: ...


def describe_gate_change(symbols: SymbolTable, change: GateChange) -> contract.GateChange:
    """What changed a gate from what to what, and who was seen to write to it."""
    return {
        "cpu": change.cpu,
        "vector": change.vector,
        "changed": list(change.changed),
        "before": describe_gate(symbols, change.before),
        "after": describe_gate(symbols, change.after),
        "writers": [{"cpu": write.cpu, "at": describe_place(symbols, write.pc)} for write in change.writes],
    }


def describe_traced_change(symbols: SymbolTable, change: TracedChange) -> contract.TracedChange:
    """The same between two stops of a trace."""
    return {
        **describe_gate_change(symbols, change),
        "since": change.since_stage,
        "stage": change.stage,
        "stop": change.stop,
    }
