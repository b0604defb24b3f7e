"""What is observed of one experiment: what drive.py writes down, and judge.py reads."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from xen_symbols.report.model import Finding
from xencrash.lab.storm.delivery import Delivery
from xencrash.lab.storm.experiment import Event


class End(enum.Enum):
    """How a crash ended."""

    HANDOVER = "handed over"
    HANG = "hangs"
    PANIC = "panics"
    RESET = "reset"  # the machine's end, or QEMU's own


@dataclass
class Injected:
    """What was observed of one injection."""

    event: Event
    pc: int  # of its target
    foreseen: Delivery
    nmi_blocked: bool
    after_handover: bool
    taken: bool = False
    frame: int | None = None  # where RSP was when the handler began
    returned: bool = False
    said: str = ""  # by QEMU


@dataclass
class Course:
    """Everything observed of one experiment."""

    end: End = End.HANG
    how: str = ""
    injected: list[Injected] = field(default_factory=list)
    unfired: tuple[Event, ...] = ()  # places that were not reached
    held: frozenset[int] = frozenset()  # other CPUs that an event kept from being done
    late: frozenset[int] = frozenset()  # other CPUs that were not done at the handover
    stopped: frozenset[int] = frozenset()  # for good
    spinning: frozenset[int] = frozenset()  # at the end
    at_handover: tuple[Finding, ...] = ()  # failures
    at_end: tuple[Finding, ...] = ()
    notes_changed: frozenset[int] = frozenset()  # CPUs whose notes were complete, and then written again
    running: dict[int, str] = field(default_factory=dict)  # other CPUs that are not parked at the end, and why not
    kernel: bool | None = None  # whether the crash kernel started; None if it was not waited for
    where: dict[int, str] = field(default_factory=dict)
    console: str = ""
