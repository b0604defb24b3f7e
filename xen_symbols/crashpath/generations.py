"""Xen's crash path, one row per revision: what it does, which commit made it so, and how to recognise it.

A row is recognised by symbols and by Xen's own code in memory, never by a version number (identification.py).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, TEXT
from xen_symbols.xen.memory import XenMemory

_FUNCTION_MAX = 1 << 16  # bytes; far more than any of Xen's functions that are read here


class Hook(enum.Enum):
    """Where an NMI is turned into the shootdown on each other CPU."""

    CRASH_CALLBACK = "nmi_callback = crash_nmi_callback"
    GATE = "nmi_crash in the CPU's own NMI gate"
    EXCEPTION_TABLE = "exception_table[2] = do_nmi_crash"
    CALLBACK = "nmi_callback = do_nmi_crash"


class Bookkeeping(enum.Enum):
    """How the other CPUs sign off."""

    COUNT = "waiting_for_crash_ipi counts those that have not"
    MASK = "waiting_to_crash has a bit of each that has not"


class Evidence(NamedTuple):
    """A statement that holds for a build, or does not. `test` may raise Unreadable: not decidable."""

    says: str
    test: Callable[[XenMemory], bool]


def has(name: str, kinds: str | None = None) -> Evidence:
    return Evidence(f"symbol {name}", lambda memory: memory.symbols.has(name, kinds))


def lacks(name: str, kinds: str | None = None) -> Evidence:
    return Evidence(f"no symbol {name}", lambda memory: not memory.symbols.has(name, kinds))


def either(first: Evidence, second: Evidence) -> Evidence:
    return Evidence(f"{first.says} or {second.says}", lambda memory: first.test(memory) or second.test(memory))


def function_text(memory: XenMemory, name: str) -> tuple[int, bytes]:
    """(address, code) of a function. Raises Unreadable."""
    start, end = memory.symbols.extent(name)
    if end - start > _FUNCTION_MAX:
        raise Unreadable(f"{name} would be {end - start} bytes long by the {memory.symbols.source}: its end is missing")
    return start, memory.read(start, end - start)


def references(memory: XenMemory, function: str, symbol: str) -> bool:
    """Whether a function's code names a symbol's address: RIP-relative (with up to 4 bytes of immediate after the
    displacement), as a sign-extended 32-bit or as a 64-bit immediate (Intel SDM vol. 2, 2.2.1.6)."""
    start, code = function_text(memory, function)
    target = memory.symbols.address(symbol)
    if target.to_bytes(8, "little") in code:
        return True
    for at in range(len(code) - 3):
        value = int.from_bytes(code[at : at + 4], "little", signed=True)
        if target - (start + at + 4) - value in (0, 1, 2, 4):
            return True
    return False


def code_references(function: str, symbol: str, expected: bool = True) -> Evidence:
    says = f"{function} {'names' if expected else 'does not name'} {symbol}"
    return Evidence(says, lambda memory: references(memory, function, symbol) is expected)


def _decrements(memory: XenMemory) -> bool:
    """`lock decl waiting_for_crash_ipi(%rip)` in do_nmi_crash: f0 ff 0d, displacement."""
    start, code = function_text(memory, "do_nmi_crash")
    counter = memory.symbols.address("waiting_for_crash_ipi", DATA)
    for match in re.finditer(rb"\xf0\xff\x0d", code):
        displacement = code[match.end() : match.end() + 4]
        if start + match.end() + 4 + int.from_bytes(displacement, "little", signed=True) == counter:
            return True
    return False


def _decrement(expected: bool) -> Evidence:
    says = f"do_nmi_crash {'has' if expected else 'lacks'} the locked decrement of waiting_for_crash_ipi"
    return Evidence(says, lambda memory: _decrements(memory) is expected)


# The RFC's stub starts with cli; the patch as committed dropped it.
def _stub_starts_with_cli(expected: bool) -> Evidence:
    says = f"nmi_crash {'starts' if expected else 'does not start'} with cli"

    def test(memory: XenMemory) -> bool:
        return (memory.read(memory.symbols.address("nmi_crash", TEXT), 1) == b"\xfa") is expected

    return Evidence(says, test)


class Generation(NamedTuple):
    """One revision of the crash path.

    `introduced` cites the commits that made it, `releases` have it. A default holds for most rows.
    """

    id: str
    introduced: str
    releases: str
    hook: Hook
    evidence: tuple[Evidence, ...]
    bookkeeping: Bookkeeping
    own_nmi_gate: bool = True  # the crashing CPU's NMI gate becomes trap_nop
    swaps_mc: bool = True  # the #MC handlers become trap_nop in machine_kexec, and NMIs are unblocked
    clears_remote_ist: bool = False  # the RFC: the crashing CPU clears the others' IST, and the NMI gate's too
    has_save_done: bool = True  # crash_save_done and the self-NMI
    announces: bool = True  # "Shot down all CPUs" on the console
    frees_offline_cpus: bool = False  # with its IDT: every CPU that has one was online (until 8797d20a6e, 4.12)
    switches_lapic_off: bool = False  # and on again, on its way to the boot mode, always (until 77ffa26374, 4.5.0)
    reads_absent_idts: bool = False  # in machine_kexec, of possible CPUs that are not present (until 2c9829a261)
    dead_cpus_use_trap_nop: bool = False  # in their own NMI gates (73cb1383bf, 4.13)
    idle_callbacks: tuple[str, ...] = ()  # legitimate values of nmi_callback before the crash
    parks_in: str = "do_nmi_crash"
    # Real Xens whose crash was followed and judged, of those without a row in the lab built from source.
    judged_on: tuple[str, ...] = ()


_DUMMY = ("dummy_nmi_callback", "nmi_int.c#nmi_callback")
# Callbacks that other parts of Xen install for a while, or leave behind: fatal_trap's dump of all CPUs stays.
_TRANSIENT = ("nmi_show_execution_state", "mask_nmi_callback", "microcode_nmi_callback", "nmi_apply_alternatives")

GENERATIONS = (
    Generation(
        "4.2.0", "before 77ad1faa6b", "4.2.0 - 4.2.5", Hook.CRASH_CALLBACK,
        (has("crash_nmi_callback", TEXT), lacks("do_nmi_crash", TEXT)),
        bookkeeping=Bookkeeping.COUNT, own_nmi_gate=False, swaps_mc=False, has_save_done=False, announces=False,
        frees_offline_cpus=True, switches_lapic_off=True, idle_callbacks=_DUMMY, parks_in="crash_nmi_callback",
        judged_on=("4.2.5",),
    ),
    Generation(
        "rfc-v1", "RFC of 2012-12-04, as posted", "never released", Hook.GATE,
        (has("nmi_crash", TEXT), lacks("waiting_to_crash"), _stub_starts_with_cli(True), _decrement(False)),
        bookkeeping=Bookkeeping.COUNT, clears_remote_ist=True, announces=False, frees_offline_cpus=True,
        switches_lapic_off=True, idle_callbacks=_DUMMY,
    ),
    Generation(
        "rfc-v1-fixed", "RFC of 2012-12-04 with the missing atomic_dec", "never released", Hook.GATE,
        (has("nmi_crash", TEXT), lacks("waiting_to_crash"), _stub_starts_with_cli(True), _decrement(True)),
        bookkeeping=Bookkeeping.COUNT, clears_remote_ist=True, announces=False, frees_offline_cpus=True,
        switches_lapic_off=True, idle_callbacks=_DUMMY,
    ),
    Generation(
        "4.3.0", "77ad1faa6b", "4.3.0, 4.3.1", Hook.GATE,
        (has("nmi_crash", TEXT), lacks("waiting_to_crash"), has("waiting_for_crash_ipi"), _stub_starts_with_cli(False)),
        bookkeeping=Bookkeeping.COUNT, announces=False, frees_offline_cpus=True, switches_lapic_off=True,
        idle_callbacks=_DUMMY, judged_on=("4.3.0",),
    ),
    Generation(
        "4.3.2", "f12c1f0b09", "4.3.2, 4.3.3, 4.4.0, 4.4.1, 4.5.0", Hook.GATE,
        (has("nmi_crash", TEXT), has("waiting_to_crash")),
        bookkeeping=Bookkeeping.MASK, frees_offline_cpus=True, switches_lapic_off=True, idle_callbacks=_DUMMY,
        judged_on=("4.5.0",),
    ),
    Generation(
        # 8228055568 (4.4.3) writes the same entry through another mapping, which leaves no trace.
        "4.3.4", "cbeeaa7da0, 8228055568", "4.3.4, 4.4.2 - 4.4.4, 4.5.1 - 4.16", Hook.EXCEPTION_TABLE,
        (
            has("do_nmi_crash", TEXT), lacks("nmi_crash", TEXT), lacks("waiting_for_crash_ipi"),
            either(has("exception_table", DATA), has("dummy_nmi_callback", TEXT)),
        ),
        bookkeeping=Bookkeeping.MASK, dead_cpus_use_trap_nop=True, idle_callbacks=(*_DUMMY, *_TRANSIENT),
        judged_on=("4.8.5", "4.11.4", "4.13.4", "4.14"),
    ),
    Generation(
        "4.17.0", "e7f147bf4a", "4.17 - 4.20", Hook.CALLBACK,
        (
            has("do_nmi_crash", TEXT), lacks("nmi_crash", TEXT), lacks("exception_table", DATA),
            lacks("dummy_nmi_callback", TEXT), has("idt_tables", DATA),
        ),
        bookkeeping=Bookkeeping.MASK, dead_cpus_use_trap_nop=True, idle_callbacks=_TRANSIENT,
        judged_on=("4.17", "4.19.6", "4.20"),
    ),
    Generation(
        "4.21.0", "9c20d3c591", "4.21.0, 4.21.1", Hook.CALLBACK,
        (
            has("do_nmi_crash", TEXT), lacks("idt_tables", DATA), has("per_cpu__idt", DATA),
            code_references("machine_crash_shutdown", "trap_nop"),
        ),
        bookkeeping=Bookkeeping.MASK, reads_absent_idts=True, dead_cpus_use_trap_nop=True, idle_callbacks=_TRANSIENT,
        judged_on=("4.21.0",),
    ),
    Generation(
        "4.21.2", "ad9c7d86c9, 2c9829a261", "4.21.2, 4.22", Hook.CALLBACK,
        (
            has("do_nmi_crash", TEXT), lacks("idt_tables", DATA), has("per_cpu__idt", DATA),
            code_references("machine_crash_shutdown", "trap_nop", expected=False),
        ),
        bookkeeping=Bookkeeping.MASK, own_nmi_gate=False, dead_cpus_use_trap_nop=True, idle_callbacks=_TRANSIENT,
        judged_on=("4.22.0",),
    ),
)  # fmt: skip

BY_ID = {generation.id: generation for generation in GENERATIONS}
