"""The boundaries of the crash path: where each begins, on which CPU, and how far each CPU has come there.

The crashing CPU and the other CPUs go through different steps. A stage is a place in Xen's text (its anchor) at
which the step of the CPU that reached it is exact; the others are within bounds.
"""

from __future__ import annotations

import enum

from xen_symbols.records import NamedTuple


class Role(enum.Enum):
    CRASHING = "crashing"
    OTHER = "other"


class CrashStep(enum.IntEnum):
    """What the crashing CPU has completed."""

    NOTHING = 0
    SAVED = 1  # kexecing set, ownership taken, own notes saved
    ARMED = 2  # waiting set, gates and hook installed
    WAITED = 3  # the wait is over: everybody answered, or a second passed
    STOPPED = 4  # own LAPIC, online bit, IO-APIC
    INFO_SAVED = 5  # the crash info note
    MC_SWAPPED = 6  # #MC handlers made no-ops
    NEUTRALISED = 7  # and NMIs unblocked
    LEFT = 8  # the crash kernel runs


class OtherStep(enum.IntEnum):
    """What another CPU has completed."""

    NOTHING = 0
    NMI_TAKEN = 1
    MC_IST_CLEARED = 2
    NOTES_SAVED = 3
    STOPPED = 4  # LAPIC, online bit
    DONE = 5  # crash_save_done
    SIGNED_OFF = 6  # no longer waited for
    SELF_NMI = 7
    PARKED = 8  # in the halt loop


class Stage(NamedTuple):
    """A named boundary. `anchors`: the symbols at whose first instruction it lies, newest first; `source`: of each
    but the oldest, the commit since which it is the one."""

    id: str
    role: Role
    anchors: tuple[str, ...]
    crash_step: CrashStep
    other_step: OtherStep | None = None
    says: str = ""
    source: str = ""


STAGES = (
    Stage("crash-entry", Role.CRASHING, ("kexec_crash",), CrashStep.NOTHING, says="a CPU has decided to crash"),
    Stage("shutdown-entry", Role.CRASHING, ("machine_crash_shutdown",), CrashStep.SAVED,
          says="its own notes are saved"),
    Stage("shootdown", Role.CRASHING, ("smp_send_nmi_allbutself",), CrashStep.ARMED,
          says="the hook is installed, the NMI is not sent yet"),
    Stage("nmi-taken", Role.OTHER, ("do_nmi_crash", "crash_nmi_callback"), CrashStep.ARMED, OtherStep.NMI_TAKEN,
          says="another CPU took the NMI", source="do_nmi_crash since 77ad1faa6b (4.3.0)"),
    Stage("cpu-save", Role.OTHER, ("kexec_crash_save_cpu",), CrashStep.ARMED, OtherStep.MC_IST_CLEARED,
          says="it is about to save its notes"),
    Stage("cpu-stop", Role.OTHER, ("__stop_this_cpu",), CrashStep.ARMED, OtherStep.NOTES_SAVED,
          says="its notes are saved"),
    Stage("shootdown-done", Role.CRASHING, ("__stop_this_cpu",), CrashStep.WAITED, says="the wait is over"),
    Stage("crash-info", Role.CRASHING, ("kexec_crash_save_info",), CrashStep.STOPPED,
          says="the crashing CPU and the platform are stopped"),
    Stage("exec-entry", Role.CRASHING, ("machine_kexec",), CrashStep.INFO_SAVED, says="all notes are complete"),
    # 4.2 and 4.3 leave through the image's own page, which no symbol names: the stage is not seen there.
    Stage("handover", Role.CRASHING, ("kexec_reloc",), CrashStep.NEUTRALISED, says="Xen hands the machine over"),
)  # fmt: skip

# Two that no symbol's first instruction begins: within machine_kexec(), once it has executed an IRET (unblocking.py);
# and where a trace looks once more, some time after the last (afterwards.py).
UNBLOCKED = Stage("nmis-unblocked", Role.CRASHING, (), CrashStep.MC_SWAPPED, says="an IRET has unblocked NMIs")
AFTERWARDS = Stage("after-handover", Role.CRASHING, (), CrashStep.LEFT, says="the crash kernel has run for a while")

NORMAL = Stage("normal", Role.CRASHING, (), CrashStep.NOTHING, says="Xen runs, or has not begun to crash")
CRASHING = Stage("crashing", Role.CRASHING, (), CrashStep.NOTHING, says="somewhere on the crash path")
CRASHED = Stage("crashed", Role.CRASHING, (), CrashStep.LEFT, says="Xen has handed the machine over")

BY_ID = {stage.id: stage for stage in (*STAGES[:-1], UNBLOCKED, STAGES[-1], AFTERWARDS, NORMAL, CRASHING, CRASHED)}


class Span(NamedTuple):
    """The steps between which a CPU is known to be, both inclusive."""

    low: int
    high: int

    def before(self, step: int) -> bool:
        """Certainly not yet at `step`."""
        return self.high < step

    def reached(self, step: int) -> bool:
        """Certainly at `step` or beyond."""
        return self.low >= step


ANYWHERE = Span(OtherStep.NOTHING, OtherStep.PARKED)  # of another CPU that nothing is known of


class Position(NamedTuple):
    """Where the crash path stands: at a stage, with each CPU within its bounds.

    `online` is the set of CPUs that were online when the crash began; others were dead, parked or never there.
    """

    stage: Stage
    subject: int | None  # the CPU that is at the stage's anchor
    crashing_cpu: int | None
    crash: Span
    others: dict[int, Span]
    online: frozenset[int]
