"""A CPU's way back, as describe/backtrace.py has it, in lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xen_symbols.report.blocks import Cell

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json

SCANNED = "Calls are found by scanning the stacks; some may be left from earlier."


def way_back(cpu: Json) -> list[list[Cell]]:
    """Each step with its calls, from the innermost frame outwards, and what lies before the last one."""
    lines = [line for step in cpu["steps"] for line in _step(step)]
    if cpu["end"]:
        lines.append([Cell(f"  {cpu['end']}", "unknown" if cpu["lost"] else "")])
    if cpu["guest"] is not None:
        guest = cpu["guest"]
        lines.append([Cell(f"    rip {guest['rip']}, cs {guest['cs']}, rsp {guest['rsp']}")])
    return lines


def _step(step: Json) -> list[list[Cell]]:
    where = [Cell(step["at"]["symbol"], "strong"), Cell(f", rsp {step['rsp']} on {step['place']}")]
    if step["interrupted_by"] is not None:
        where = [Cell(f"{step['interrupted_by']} interrupted "), *where,
                 Cell(f" (cs {step['cs']}, frame at {step['frame']})", "dim")]  # fmt: skip
    lines = [[Cell("  "), *where]]
    lines += [[Cell(f"    [<{call['address']}>] {call['symbol']}")] for call in step["calls"]]
    if "absent" in step:
        lines.append([Cell(f"    {step['absent']}", "unknown")])
    return lines
