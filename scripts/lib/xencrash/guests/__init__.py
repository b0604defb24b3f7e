"""The bare-metal reference guest: the crash path itself, in each of its generations, right or wrong on demand.

Beside this package's modules lie the guest's sources, C and assembler; generation.h says what differs.
"""

from __future__ import annotations

from xencrash.guests.build import Built, build
from xencrash.guests.faults import BY_ID, FAULTS, Expected, Fault, command_line, listing
from xencrash.guests.generations import feature, generations

__all__ = [
    "BY_ID",
    "FAULTS",
    "Built",
    "Expected",
    "Fault",
    "build",
    "command_line",
    "feature",
    "generations",
    "listing",
]
