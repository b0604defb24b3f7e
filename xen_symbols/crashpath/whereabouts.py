"""How far another CPU can have come at a stop of a trace, by what is seen of it: all CPUs stand still then.

One that was not seen at a breakpoint, set all along, has not come there. One that is inside what stops a CPU is still
waited for. (Where it is within the handler says nothing: compilers do not keep the order of a function's parts.) Only
an upper bound follows: that a CPU has come somewhere does not show that it did what it should on the way; that is
judged once the wait is over.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.generations import Generation, function_text
from xen_symbols.crashpath.position import STOPPING, anchor_address, function_of
from xen_symbols.crashpath.stages import BY_ID, OtherStep, Span, Stage
from xen_symbols.records import NamedTuple
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import State

_TAKEN = BY_ID["nmi-taken"]
_CALLED = ("cpu-save", "cpu-stop")  # the stages that begin with a function which the handler calls
_CALL, _CALL_BYTES = 0xE8, 5  # CALL rel32 (SDM vol. 2)


class Whereabouts(NamedTuple):
    """The `stages` of other CPUs that none of them passes in this build without hitting a breakpoint there."""

    stages: tuple[Stage, ...]

    def bounded(self, state: State, spans: Mapping[int, Span], missed: Container[str]) -> dict[int, Span]:
        """The spans of CPUs, each of which begins where it was last seen; `missed`: the stages that had no breakpoint
        for a while."""
        steps = [stage.other_step for stage in self.stages if stage.id not in missed and stage.other_step is not None]
        found = {}
        for cpu, (low, high) in spans.items():
            ahead = (step for step in steps if step > low)
            stopping = function_of(state.symbols, state.of(cpu).physical) in STOPPING
            known = OtherStep.STOPPED if stopping else OtherStep.PARKED
            found[cpu] = Span(low, max(low, min(high, known, *ahead)))
        return found


def whereabouts(memory: XenMemory, generation: Generation | None) -> Whereabouts:
    """What bounds them in this build: a compiler may have put a function into the handler, and then no CPU comes to its
    symbol. What cannot be read bounds nothing."""
    if generation is None:
        return Whereabouts(())
    try:
        start, code = function_text(memory, generation.parks_in)
    except Unreadable:
        return Whereabouts(())
    called = {
        start + at + _CALL_BYTES + int.from_bytes(code[at + 1 : at + _CALL_BYTES], "little", signed=True)
        for at in range(len(code) - _CALL_BYTES + 1)
        if code[at] == _CALL
    }
    stages = [BY_ID[name] for name in _CALLED if anchor_address(memory.symbols, BY_ID[name]) in called]
    if anchor_address(memory.symbols, _TAKEN) == start:
        stages = [_TAKEN, *stages]
    return Whereabouts(tuple(stages))
