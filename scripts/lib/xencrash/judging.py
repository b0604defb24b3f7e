"""From a request to a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xen_symbols import api
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath.engine import TOOL
from xen_symbols.report.model import Report
from xen_symbols.xen.memory import XenMemory
from xencrash.errors import complain, internal_error
from xencrash.lazy import load
from xencrash.options import Request

if TYPE_CHECKING:
    from xen_symbols.report import contract


_LIVE = "xencrash.live:judge"  # a dump is judged without gdb, and all that drives it
_SAID_EVERY = 2.0  # seconds


def judge(asked: Request) -> Report | contract.Report:
    """The report on what is there now. Raises Undecidable."""
    if asked.live:
        report: contract.Report = load(_LIVE)(asked)
        return report
    return judge_dump(asked)


def attempt(asked: Request, judge: Callable[[Request], Report | contract.Report]) -> Report | contract.Report:
    """The report that `judge` makes; of what it could not judge, a report that says why."""
    try:
        return judge(asked)
    except (Undecidable, Unreadable) as error:
        return undecided(asked, str(error))
    except OSError as error:
        return undecided(asked, f"{asked.target}: {error.strerror or error}")
    except Exception:
        return undecided(asked, f"{asked.target}: {internal_error()}")


def undecided(asked: Request, why: str) -> Report:
    """The report on what could not be judged at all."""
    nothing: contract.Symbols = {"path": None, "build_id": None, "match": None}
    target: contract.Target = {
        "kind": "live" if asked.live else "dump", "format": "unknown", "location": asked.target,
    }  # fmt: skip
    return Report(TOOL, target, nothing, undecided=why)


def judge_dump(asked: Request) -> Report:
    """The report on one dump. Raises Undecidable."""
    return api.evaluate(open_xen(asked))


def open_xen(asked: Request) -> XenMemory:
    """Xen in a dump. Raises Undecidable."""
    return api.open_dump(
        asked.target,
        asked.symbols,
        base=asked.base,
        maps=asked.maps,
        progress=searching(asked.target),
        **asked.given._asdict(),
    )


def searching(path: str) -> Callable[[int, int], None] | None:
    """Says how far the search for Xen in a dump has come: a line every few seconds, on a terminal."""
    if not sys.stderr.isatty():  # a script finds the reason there, and nothing else
        return None
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > _SAID_EVERY:
            said = time.monotonic()
            complain(f"{path}: looking for Xen, {done >> 20} of {total >> 20} MiB so far")

    return say
