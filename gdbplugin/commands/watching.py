"""What changes the NMI and #MC gates while the machine runs, in a crash or not: `xen watch gates`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbplugin.declare import Command, Say, Session, Step
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.gatechanges import gate_addresses
from xen_symbols.crashpath.gatewatch import GateWatch
from xen_symbols.report.blocks import Cell, Lines, watched_gates
from xen_symbols.xen.state import read_state

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


def _begin(session: Session) -> Json:
    """Watch every gate. {"gates": how many}, and "writers_absent": why no writer can be seen, if so."""
    session.end_watching()
    with session.look() as memory:
        if memory.target.kind != "live":
            raise Undecidable(f"{memory.target.location} is a dump, which does not run: nothing in it changes")
        state = read_state(memory)
    session.gate_watch = GateWatch()
    session.gate_watch.see(state)
    addresses = gate_addresses(state)
    refused = session.watch(addresses, session.gate_watch.writes.caught)
    return {"gates": len(addresses)} | ({} if refused is None else {"writers_absent": refused})


def _stop(session: Session) -> Json:
    """{"changes": since the last stop, as in a report's gate_changes but without stages}."""
    if session.gate_watch is None:
        raise Undecidable("no gates are watched")
    with session.look() as memory:
        return {"changes": session.gate_watch.see(read_state(memory))}


def _end(session: Session) -> Json:
    """The last changes, as `stop` has them; nothing is watched any more."""
    session.end_watching()
    try:
        return _stop(session)
    finally:
        session.gate_watch = None


def _watch(session: Session, *, say: Say) -> Json:
    """The command: until the machine stops, by Ctrl-C or a breakpoint. Raises Undecidable."""
    watched = _begin(session)
    try:
        if "writers_absent" in watched:
            say([Lines([[Cell(f"writers not seen: {watched['writers_absent']}", "unknown")]])])
        say([Lines([[Cell(f"watching {watched['gates']} gates: Ctrl-C ends it", "dim")]])])
        session.run(None)
    finally:
        session.end_watching()
    return _end(session)


COMMANDS = (
    Command(
        ("watch", "gates"), "List changes of the CPUs' NMI and #MC gates while the machine runs, and who makes them.",
        "Lets the machine run until Ctrl-C or a breakpoint stops it, and lists each gate that is not as it was:\n"
        "whose, which property, before and after, and the writer's CPU, function and offset where a write\n"
        "watchpoint saw it. A gate that changed and changed back is not listed; a writer is missed where several\n"
        "CPUs write at once. While a guest runs on an AMD CPU its gates change at each switch, which makes it slow.",
        (), _watch, watched_gates, (Step("begin", _begin), Step("stop", _stop), Step("end", _end)),
    ),
)  # fmt: skip
