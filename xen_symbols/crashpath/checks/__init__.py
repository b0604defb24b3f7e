"""What the crash path promises at each step: one row per invariant, beside its judge, in the module of what it judges.

A row's `judge` says which values are allowed, given how far each CPU has come, and what was observed.
"""

from __future__ import annotations

from xen_symbols.crashpath.checks import cpus, filenotes, gates, lapic, machine, notes, running, shootdown
from xen_symbols.crashpath.checks.model import Check

# In the order of reports.
CHECKS: tuple[Check, ...] = (
    *cpus.FOUND,
    cpus.FATAL_TRAP,
    *gates.CHECKS,
    *shootdown.CHECKS,
    *notes.CHECKS,
    *filenotes.CHECKS,
    *machine.CHECKS,
    *lapic.CHECKS,
    *running.CHECKS,
    *cpus.LEFT,
)
