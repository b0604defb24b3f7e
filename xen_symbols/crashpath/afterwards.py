"""The look after the handover: whether every other CPU has come to rest, once the machine has run on for a while.

At the handover a CPU may have signed off and be on its way into its halt loop still: nobody waits for that. Afterwards
none may be. No clock decides it: of a busy host's vCPUs some may have hardly run, so one that is still on its way is
looked at again, a number of times, before it is judged. On a machine whose stages take longer the looks are further
apart by as much.
"""

from __future__ import annotations

from collections.abc import Sequence

from xen_symbols.crashpath.checks.cpus import PARKED
from xen_symbols.crashpath.checks.model import Check
from xen_symbols.crashpath.checks.shootdown import ANSWERED
from xen_symbols.crashpath.context import Context
from xen_symbols.report.model import Finding, Verdict

# Seconds for which the machine runs on before each look.
INTERVALS = (0.05, 0.1, 0.2, 0.4, 1.2)


class Afterwards:
    """The looks after the handover, at which `findings` were made. `parked`: the CPUs that had come to rest by then."""

    def __init__(self, findings: Sequence[Finding], slower: float = 1.0) -> None:
        """`slower`: how many times longer than usual the machine runs before each look."""
        where = [finding for finding in findings if finding.check == PARKED.id]
        self.parked = {f.cpu for f in where if f.cpu is not None and f.verdict is Verdict.PASS}
        self._judged = {f.cpu for f in where if f.verdict is Verdict.FAIL and f.follows is None}
        self.looks = 0
        self._slower = slower

    @property
    def interval(self) -> float:
        """For how many seconds the machine runs before the next look."""
        return INTERVALS[min(self.looks, len(INTERVALS) - 1)] * self._slower

    def again(self, context: Context, left: bool) -> bool:
        """Whether to look again; `left`: the crashing CPU is in the crash kernel."""
        self.looks += 1
        settled = left and not any(self._is_on_its_way(context, cpu) for cpu in context.others)
        return not settled and self.looks < len(INTERVALS)

    def _is_on_its_way(self, context: Context, cpu: int) -> bool:
        """It has begun to answer, late perhaps, and has not come to rest."""
        return cpu not in self._judged and _fails(PARKED, context, cpu) and not _fails(ANSWERED, context, cpu)


def _fails(check: Check, context: Context, cpu: int) -> bool:
    return check.made_of(context)(context, cpu).verdict is Verdict.FAIL
