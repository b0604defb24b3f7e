"""Which hardware breakpoints are set at which point of a crash: never more than a processor has.

An x86 processor has four, DR0 to DR3 (SDM vol. 3, 18.2.1), and KVM no more; QEMU's TCG has any number, and gets the
same four. They follow the crash: where the crashing CPU comes next, and, once an NMI may be sent, where other CPUs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xen_symbols.crashpath.position import anchor_address
from xen_symbols.crashpath.stages import BY_ID, STAGES, CrashStep, Role, Stage
from xen_symbols.symbols.table import TEXT, SymbolTable

SLOTS = 4
# Where Xen's C code begins at boot: reached again only after a reset.
_RESET_ANCHOR = "__start_xen"
# The stages of other CPUs, from the one that is missed most: where there are fewer slots the last are given up.
_OTHERS = ("cpu-stop", "nmi-taken", "cpu-save")


class Anchors:
    """Where a build's stages begin, and those of them to break on, with `slots` breakpoints at a time."""

    def __init__(self, symbols: SymbolTable, slots: int = SLOTS) -> None:
        self.slots = slots
        self.of: Mapping[str, int] = {
            stage.id: address for stage in STAGES if (address := anchor_address(symbols, stage)) is not None
        }
        self.reset = symbols.get(_RESET_ANCHOR, TEXT)
        self._crashing = sorted(
            (BY_ID[name] for name in self.of if BY_ID[name].role is Role.CRASHING), key=lambda stage: stage.crash_step
        )

    @property
    def last(self) -> str:
        """The stage at which the crash path ends."""
        return self._crashing[-1].id

    def all(self) -> list[int]:
        return list(dict.fromkeys(self.of.values()))

    def unseen(self) -> list[Stage]:
        """The stages of other CPUs that are not broken on whenever they may be reached."""
        if not self.slots:
            return [BY_ID[name] for name in self.of]
        kept = _OTHERS[: self.slots - 1]
        return [BY_ID[name] for name in self.of if name in _OTHERS and name not in kept]

    def wanted(self, step: CrashStep, *, entered: bool, owned: bool) -> tuple[int, ...]:
        """Where to break on next. `entered`: a CPU is in kexec_crash(); `owned`: one of them goes on, and has completed
        `step`."""
        found = dict.fromkeys(self._before(entered) if not owned else self._after(step))
        return tuple(found)[: self.slots]

    def _before(self, entered: bool) -> Iterator[int]:
        names = ("shutdown-entry", "crash-entry") if entered else ("crash-entry", "shutdown-entry")
        yield from (self.of[name] for name in names if name in self.of)
        if self.reset is not None:
            yield self.reset

    def _after(self, step: CrashStep) -> Iterator[int]:
        ahead = [self.of[stage.id] for stage in self._crashing if stage.crash_step > step]
        unseen = self.unseen()
        yield from ahead[:1]
        yield from (self.of[name] for name in _OTHERS if name in self.of and BY_ID[name] not in unseen)
        yield from ahead[1:]
        if self.reset is not None:
            yield self.reset
