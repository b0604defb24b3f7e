"""Watching the gates of a Xen that nobody follows through a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xen_symbols.crashpath.gatechanges import GateHistory, Writes, moment_of
from xen_symbols.crashpath.position import online_at_crash
from xen_symbols.crashpath.stages import NORMAL, CrashStep, Position, Span
from xen_symbols.describe.changes import describe_gate_change
from xen_symbols.xen.state import State

if TYPE_CHECKING:
    from xen_symbols.report import contract


class GateWatch:
    """Every gate as it was read last, and the writes caught since, wherever Xen is."""

    def __init__(self) -> None:
        self._history = GateHistory()
        self.writes = Writes()

    def see(self, state: State) -> list[contract.GateChange]:
        """The changes since the last call."""
        anywhere = Span(CrashStep.NOTHING, CrashStep.NEUTRALISED)
        position = Position(NORMAL, None, None, anywhere, {}, online_at_crash(state, None, None))
        seen = self._history.see(moment_of(state, position), self.writes.take(state)).values()
        return [describe_gate_change(state.symbols, change) for change in seen if change.changed]
