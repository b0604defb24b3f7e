"""Why Xen crashed: by the way in which kexec_crash() was reached, and by what Xen printed on that way.

A line of the console may be an earlier event's (the crash key does nothing while no crash kernel is loaded), so that
the call chain decides where it is known. Only lines with Xen's own prefix count: a domain prints there, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xen_symbols.records import NamedTuple
from xen_symbols.xen.console import OF_XEN, without_prefix


class Way(NamedTuple):
    """One way into kexec_crash(): its caller, the line that Xen prints there, and what that means."""

    id: str
    callers: tuple[str, ...]
    printed: str | None
    says: str
    source: str


WAYS = (
    Way("panic", ("panic",), r"Panic on CPU (\d+):", "panic", "xen/drivers/char/console.c, panic"),
    Way("key", ("do_crashdump_trigger",), r"'.' pressed -> triggering crashdump",
        "the crash key was pressed on Xen's console, or sent by dom0", "xen/common/kexec.c, do_crashdump_trigger"),
    Way("watchdog", (), r"(?:Hardware Dom|Domain )(\d+) shutdown: watchdog",
        "the watchdog of the hardware domain expired", "xen/common/shutdown.c, hwdom_shutdown"),
    Way("domain", ("hwdom_shutdown", "dom0_shutdown"), r"(?:Hardware Dom|Domain )(\d+) crashed: ",
        "the hardware domain crashed", "xen/common/shutdown.c, hwdom_shutdown"),
    Way("hypercall", ("kexec_exec", "do_kexec_op_internal", "do_kexec_op"), None,
        "the hardware domain's kernel started the crash kernel, as it does when it panics",
        "xen/common/kexec.c, kexec_exec"),
)  # fmt: skip
_LEAVES = re.compile("Executing (?:kexec|crash) image")  # xen/common/kexec.c: what comes later is not the reason
_STARS = "*" * 20  # panic() prints them around its message
_MESSAGE = 8  # lines of a panic's message, at most
_REGISTERS = "----[ Xen-"  # show_registers() begins with it
_REPORT = 150  # lines from there to the panic, at most: registers, code, stack, calls, page tables
_BEFORE, _AFTER = 8, 30  # lines around the reason


class Reason(NamedTuple):
    """`line` is the index of the line that says it, among those that Xen printed; None where none does."""

    id: str
    says: str
    line: int | None
    known_by: str


def lines_of_xen(text: str) -> list[str]:
    """The lines that Xen itself printed; all of them where none has its prefix."""
    lines = text.replace("\r", "").splitlines()
    return [line for line in lines if line.startswith(OF_XEN)] or lines


def find_reason(lines: Sequence[str], calls: Sequence[str]) -> Reason | None:
    """Why Xen crashed, from the lines that it printed and the functions on the crashing CPU's stack, innermost first.

    None where neither shows it.
    """
    ways = _by_calls(calls)
    before = next((at for at in reversed(range(len(lines))) if _LEAVES.search(lines[at])), len(lines) - 1)
    printed = ((at, way) for at in range(before, -1, -1) for way in (ways or WAYS) if _matches(way, lines[at]))
    at, way = next(printed, (None, None))
    if way is None:
        says = ", or ".join(one.says for one in ways)
        return Reason(ways[-1].id, says, None, "its call chain") if ways else None
    says = way.says if at is None or way.id != "panic" else _message(lines, at)
    return Reason(way.id, says, at, "its console and its call chain" if ways else "its console")


def around(lines: Sequence[str], at: int | None) -> tuple[int, int]:
    """[start, end) of the lines to show: around the reason, with the registers that were printed before a panic.

    Without a reason the last ones.
    """
    if at is None:
        return max(0, len(lines) - _AFTER), len(lines)
    report = (one for one in range(at, max(-1, at - _REPORT), -1) if _REGISTERS in lines[one])
    return max(0, next(report, at) - _BEFORE), min(len(lines), at + _AFTER)


def _by_calls(calls: Sequence[str]) -> list[Way]:
    """The ways of the first caller after the outermost kexec_crash(): a second panic may have come on the path."""
    starts = [at for at, name in enumerate(calls) if name == "kexec_crash"]
    for name in calls[starts[-1] :] if starts else calls:
        if way := next((way for way in WAYS if name in way.callers), None):
            return [one for one in WAYS if one is way or (way.id, one.id) == ("domain", "watchdog")]
    return []


def _matches(way: Way, line: str) -> bool:
    return way.printed is not None and re.search(way.printed, line) is not None


def _message(lines: Sequence[str], at: int) -> str:
    """What panic() was given, on one line."""
    found = []
    for line in lines[at + 1 : at + 1 + _MESSAGE]:
        if _STARS in line:
            break
        found.append(without_prefix(line))
    return ", ".join(filter(None, found)) or WAYS[0].says
