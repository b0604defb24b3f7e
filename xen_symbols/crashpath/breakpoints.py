"""Which hardware breakpoints are set at which point of a crash: never more than a processor has.

An x86 processor has four, DR0 to DR3 (SDM vol. 3, 18.2.1), and KVM no more; QEMU's TCG has any number, and gets the
same four. They follow the crash: where the crashing CPU comes next, and, once an NMI may be sent, where other CPUs do.
That NMIs are unblocked is a stage that a wrong path leaves out, so the next one is broken on at the same time: while
the crashing CPU is in machine_kexec() one stage of other CPUs, which are late by then, is given up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xen_symbols.crashpath.position import anchor_address
from xen_symbols.crashpath.stages import BY_ID, STAGES, UNBLOCKED, CrashStep, Role, Stage
from xen_symbols.symbols.table import TEXT, SymbolTable

SLOTS = 4
# Where Xen's C code begins at boot: reached again only after a reset.
_RESET_ANCHOR = "__start_xen"
_BEGIN = ("crash-entry", "shutdown-entry")
NOT_BEGUN = f"the symbols name neither {' nor '.join(BY_ID[name].anchors[0] for name in _BEGIN)}"
# The stages of other CPUs, from the one that is missed most: where there are fewer slots the last are given up. On
# the way out of Xen the entries into the handler go on being counted.
_OTHERS = ("cpu-stop", "nmi-taken", "cpu-save")
_OTHERS_WHEN_LEAVING = ("nmi-taken", "cpu-stop", "cpu-save")


class Anchors:
    """Where a build's stages begin, and those of them to break on, with `slots` breakpoints at a time. `unblocked`:
    where `nmis-unblocked` does, if it is known."""

    def __init__(self, symbols: SymbolTable, slots: int = SLOTS, unblocked: int | None = None) -> None:
        self.slots = slots
        found = {stage.id: anchor_address(symbols, stage) for stage in STAGES} | {UNBLOCKED.id: unblocked}
        self.of: Mapping[str, int] = {name: at for name in BY_ID if (at := found.get(name)) is not None}
        self.reset = symbols.get(_RESET_ANCHOR, TEXT)
        self._crashing = [s for name in self.of if (s := BY_ID[name]).role is Role.CRASHING and s is not UNBLOCKED]

    @property
    def begins(self) -> bool:
        """Whether a crash can be seen to begin."""
        return any(name in self.of for name in _BEGIN)

    @property
    def last(self) -> str:
        """The stage at which the crash path ends."""
        return self._crashing[-1].id

    def step_after(self, step: CrashStep) -> CrashStep:
        """The furthest that the crashing CPU may be, which has completed this step, before it stops again."""
        return next((stage.crash_step for stage in self._crashing if stage.crash_step > step), CrashStep.NEUTRALISED)

    def all(self) -> list[int]:
        return list(dict.fromkeys(self.of.values()))

    def unseen(self) -> list[Stage]:
        """The stages that may be reached without a breakpoint."""
        if not self.slots:
            return [BY_ID[name] for name in self.of]
        kept = (*_OTHERS[: self.slots - 1], *([UNBLOCKED.id] if self.slots > 1 else []))
        return [BY_ID[name] for name in self.of if name in (*_OTHERS, UNBLOCKED.id) and name not in kept]

    def wanted(self, step: CrashStep, *, entered: bool, owned: bool) -> tuple[int, ...]:
        """Where to break on next. `entered`: a CPU is in kexec_crash(); `owned`: one of them goes on, and has completed
        `step`."""
        found = dict.fromkeys(self._before(entered) if not owned else self._after(step))
        return tuple(found)[: self.slots]

    def _before(self, entered: bool) -> Iterator[int]:
        yield from (self.of[name] for name in (reversed(_BEGIN) if entered else _BEGIN) if name in self.of)
        if self.reset is not None:
            yield self.reset

    def _after(self, step: CrashStep) -> Iterator[int]:
        ahead = [self.of[stage.id] for stage in self._crashing if stage.crash_step > step]
        unseen = self.unseen()
        leaving = step is CrashStep.INFO_SAVED and UNBLOCKED.id in self.of and UNBLOCKED not in unseen
        if leaving:
            yield self.of[UNBLOCKED.id]
        yield from ahead[:1]
        others = _OTHERS_WHEN_LEAVING if leaving else _OTHERS
        yield from (self.of[name] for name in others if name in self.of and BY_ID[name] not in unseen)
        yield from ahead[1:]
        if self.reset is not None:
            yield self.reset
