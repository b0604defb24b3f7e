"""`xen watch gates`: what changes the NMI and #MC gates while the machine runs, on the way of a crash or not.

For programs the same in steps, of which none lets the machine run: begin, stop after each stop, and end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gdbplugin.commands import Json
from gdbplugin.session import Session
from gdbplugin.trace import let_run
from gdbplugin.watch import end_watching, watch
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.follow import GateWatch
from xen_symbols.crashpath.gatechanges import gate_addresses
from xen_symbols.report.blocks import Block, Cell, Lines, watched_gates
from xen_symbols.xen.state import read_state


def begin(session: Session) -> Json:
    """Watch every gate that there is. {"gates": how many}. Raises Undecidable."""
    end_watching()
    with session.look() as memory:
        if memory.target.kind != "live":
            raise Undecidable(f"{memory.target.location} is a dump, which does not run: nothing in it changes")
        state = read_state(memory)
    session.gate_watch = GateWatch()
    session.gate_watch.see(state)
    addresses = gate_addresses(state)
    watch(addresses, session.gate_watch.writes.caught)
    return {"gates": len(addresses)}


def stop(session: Session) -> Json:
    """{"changes": since the last stop, as in a report's gate_changes but without stages}."""
    if session.gate_watch is None:
        raise Undecidable("no gates are watched")
    with session.look() as memory:
        return {"changes": session.gate_watch.see(read_state(memory))}


def end(session: Session) -> Json:
    """The last changes, as `stop` has them; nothing is watched any more."""
    end_watching()
    try:
        return stop(session)
    finally:
        session.gate_watch = None


MI_STEPS = {"-xen-watch-gates-begin": begin, "-xen-watch-gates-stop": stop, "-xen-watch-gates-end": end}


def run(session: Session, say: Callable[[Sequence[Block]], None]) -> None:
    """The command: until the machine stops, by Ctrl-C or a breakpoint. Raises Undecidable."""
    watched = begin(session)["gates"]
    try:
        say([Lines([[Cell(f"watching {watched} gates: Ctrl-C ends it", "dim")]])])
        let_run(None)
    finally:
        end_watching()
    say(watched_gates(end(session)))
