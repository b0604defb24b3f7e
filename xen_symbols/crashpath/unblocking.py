"""Where Xen unblocks NMIs on its way out, so that it can be seen to be done.

enable_nmis() is an IRET to the next instruction: a function of entry.S, which machine_kexec() calls, until 7e9b3599f5
(4.11.0), and inline in machine_kexec() since. Nothing jumps past the IRET: who comes to the instruction after it has
executed it.
"""

from __future__ import annotations

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.crashpath.generations import Generation, function_text
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import TEXT
from xen_symbols.x86.iret import holds_iretq, returns_to_next
from xen_symbols.xen.memory import XenMemory

ENABLE_NMIS, MACHINE_KEXEC = "enable_nmis", "machine_kexec"
_NOT_KNOWN = "where NMIs are unblocked is not known"


class Unblocking(NamedTuple):
    """`address`: of the instruction after the IRET; None where there is none, and then `absence` says why it is not
    known. With neither, machine_kexec() holds no IRET: NMIs are never unblocked."""

    address: int | None = None
    absence: Absent | None = None


def unblocking(memory: XenMemory, generation: Generation | None) -> Unblocking:
    """Where a Xen unblocks NMIs, if its generation, if that is known, does."""
    if generation is None:
        return Unblocking(absence=Absent(f"{_NOT_KNOWN}: the generation of the crash path is not"))
    if not generation.swaps_mc:
        return Unblocking()
    try:
        return _found(memory)
    except Unreadable as error:
        return Unblocking(absence=Absent(f"{_NOT_KNOWN}: {error}"))


def _found(memory: XenMemory) -> Unblocking:
    """In machine_kexec(), or a part of it that gcc has split off; else in the function. Raises Unreadable."""
    doubtful = False
    for name in (MACHINE_KEXEC, *memory.symbols.complete(f"{MACHINE_KEXEC}.")):
        address, code = function_text(memory, name)
        if (after := returns_to_next(code, address)) is not None:
            return Unblocking(after)
        doubtful = doubtful or holds_iretq(code)
    function = memory.symbols.get(ENABLE_NMIS, TEXT)
    if function is not None:
        return Unblocking(returns_to_next(function_text(memory, ENABLE_NMIS)[1], function) or function)
    if doubtful:
        why = f"{MACHINE_KEXEC} may hold an IRET, and not one that is known to return to the next instruction"
        return Unblocking(absence=Absent(f"{_NOT_KNOWN}: {why}"))
    return Unblocking()
