"""Following a crash live: what to break on, what each stop means, and when it is over. Nothing here knows gdb.

A driver sets hardware breakpoints on `breakpoints` and no others, lets the machine run for as long as `wait` allows,
and hands what happened to `stop`, until that says that the trace is finished. Every stop reads every gate and every
CPU afresh. After the handover the machine runs on, and is looked at once more. It is one module, of more than 400
lines, since each kind of stop depends on what all the stops before it have shown.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.afterwards import Afterwards
from xen_symbols.crashpath.breakpoints import NOT_BEGUN, SLOTS, Anchors
from xen_symbols.crashpath.checks.cpus import FATAL_TRAP
from xen_symbols.crashpath.complete import COMPLETE, completeness
from xen_symbols.crashpath.context import Context, Followed
from xen_symbols.crashpath.death import Death, last_words
from xen_symbols.crashpath.engine import add_stage, new_report
from xen_symbols.crashpath.gatechanges import GateHistory, Key, Writes, gate_addresses, moment_of
from xen_symbols.crashpath.identification import Identification, identify
from xen_symbols.crashpath.position import at_stage, handed_over, infer, once_left, online_at_crash
from xen_symbols.crashpath.preflight import NO_IMAGE, ends_early
from xen_symbols.crashpath.stages import (
    AFTERWARDS,
    BY_ID,
    NORMAL,
    UNBLOCKED,
    CrashStep,
    OtherStep,
    Position,
    Role,
    Span,
    Stage,
)
from xen_symbols.crashpath.unblocking import unblocking
from xen_symbols.crashpath.whereabouts import whereabouts
from xen_symbols.describe.changes import describe_traced_change
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Finding, Report, StageSeen, Verdict
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86.paging import CR0_PG
from xen_symbols.xen.kexec import is_crash_image_loaded
from xen_symbols.xen.locate import still_there
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import State, read_state

# Between two stages Xen waits at most a second of guest time; QEMU's emulation of many CPUs may take ten times that.
STALL_SECONDS = 30.0
# After so long without a stage the machine is looked at, whether it still has the Xen that crashes: there is no slot
# for a breakpoint that a reset would hit, and an ear on QMP would keep everybody else from it.
LOOK_SECONDS = 2.0


class StopResult(NamedTuple):
    """What a stop meant. `stage` is None for a stop that is not a stage: continue. `finished` ends the trace."""

    stage: StageSeen | None
    findings: tuple[Finding, ...] = ()
    finished: bool = False


class Follower:
    """The trace's state machine, for one crash."""

    def __init__(
        self,
        memory: XenMemory,
        identification: Identification | None = None,
        *,
        gates: bool = False,
        stay: bool = False,
        timeout: float | None = None,
        stall: float = STALL_SECONDS,
        settable: Callable[[Sequence[int]], int] = len,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gates` also lists every change of an NMI or #MC gate in the report; `stay` ends at the handover. `timeout`
        bounds the wait for the crash to begin (None: forever), `stall` the time between two stages, in seconds of
        `clock`. `settable` tries how many of some addresses can have hardware breakpoints at the same time.

        A path that no generation fits is followed by what symbols of its stages there are. Raises Undecidable for a Xen
        that has crashed already.
        """
        self.memory = memory
        self.identification = identification or identify(memory)
        self.generation = self.identification.generation
        self.report: Report = new_report(memory, self.identification)
        self.report.undecided = None  # that the path is unknown is said at the end: it is followed all the same
        self._unblocking = unblocking(memory, self.generation)
        self._anchors = Anchors(memory.symbols, unblocked=self._unblocking.address)
        self._anchors.slots = min(SLOTS, settable(self._anchors.all()))
        self._stay, self._timeout, self._stall, self._clock = stay, timeout, stall, clock
        self._since = clock()  # the last stage, or look: stops that are neither do not count as progress
        self._afterwards: Afterwards | None = None  # once the machine has been handed over
        self._crashing: int | None = None
        self._online: frozenset[int] = frozenset()
        self._step = CrashStep.NOTHING
        self._seen: dict[int, Span] = {}
        self._entries: dict[int, int] = {}
        self._again: set[int] = set()
        self._stopped: dict[int, dict[str, int] | None] = {}  # each CPU's registers at its last stop
        self._others = whereabouts(memory, self.generation)
        self._missed: set[str] = set()  # stages of other CPUs that had no breakpoint for a while
        self._unblocked = False
        self._died: Death | None = None  # the crashing CPU, at the last look
        self._history = GateHistory()
        self.writes = Writes()
        self.gate_addresses: dict[Key, int] = {}
        self._start(gates)

    def _start(self, gates: bool) -> None:
        state = self._read()
        if gates:
            self.report.gate_changes = []
            self.gate_addresses = gate_addresses(state)
        self.crash_kernel_loaded = is_crash_image_loaded(state)
        position = infer(state, self.generation)
        if position.stage is not NORMAL and position.stage.id != "crash-entry":
            raise Undecidable(
                f"Xen has begun to crash already (stage {position.stage.id}): it cannot be followed from its start; "
                "judge it with check"
            )
        self._history.see(moment_of(state, position, None if position.stage is not NORMAL else 0))
        self.writes.look(state)
        self.early: list[str] = []  # what will end the trace before its end
        if position.stage is NORMAL:
            context = Context(self.memory, state, position, self.generation)
            add_stage(self.report, context)
            self.early = ends_early(context)
        self._entered = self.begun = position.stage is not NORMAL
        self.report.findings += [self._unseen(stage) for stage in self._anchors.unseen()]
        if not (self._anchors.begins and self._anchors.slots):
            why = self._few() if self._anchors.begins else NOT_BEGUN
            self.report.undecided = f"{why}: no stage of a crash could be seen; judge it afterwards with check"

    def end(self) -> Report:
        """The report, which says of a path that was followed without its generation why that is not known."""
        self.report.undecided = self.report.undecided or self.identification.reason or None
        return self.report

    def _few(self) -> str:
        slots = self._anchors.slots
        some = f"only {slots} hardware breakpoint{'s' * (slots > 1)}" if slots else "no hardware breakpoint"
        return f"{some} can be set, and {SLOTS} are needed"

    @property
    def unseen(self) -> str | None:
        """Which stages cannot be seen, and why; None when all can."""
        names = ", ".join(stage.id for stage in self._anchors.unseen())
        return f"{self._few()}: {names} cannot be seen" if names else None

    def _unseen(self, stage: Stage) -> Finding:
        why = f"{self._few()}: nothing is seen at this stage"
        return self._of_trace(stage.id, Verdict.UNKNOWN, None, why, last=stage.id)

    def _read(self) -> State:
        self.memory.forget()
        try:
            return read_state(self.memory)
        except Unreadable as error:
            raise Undecidable(f"Xen's state could not be read: {error}") from None

    @property
    def breakpoints(self) -> tuple[int, ...]:
        """The addresses to break on while the machine runs next, and no others."""
        return self._anchors.wanted(self._step, entered=self._entered, owned=self._crashing is not None)

    def wait(self) -> float | None:
        """For how many seconds the machine may run before it is stopped, whatever happened; None: forever."""
        if self._afterwards is not None:
            return max(0.0, self._since + self._afterwards.interval - self._clock())
        patience = self._stall if self.begun else self._timeout
        left = None if patience is None else max(0.0, self._since + patience - self._clock())
        return min(left, LOOK_SECONDS) if left is not None and self.begun else left

    def stop(self, index: int, pc: int, *, expired: bool = False, signal: str | None = None) -> StopResult:
        """The machine stopped with the target's CPU `index` at `pc`; `expired`: because the time was over; `signal`: by
        somebody else, with that signal.

        Raises Undecidable when the trace is lost.
        """
        left = self._afterwards is not None
        result = self._at(index, pc)
        if result.stage is not None:
            self._since = self._since if left else self._clock()  # who answers late does not put off the look
            self.begun = True
            return result
        if expired:
            return self._expired()
        if signal is not None:
            raise Undecidable(f"the machine was stopped by something else ({signal}) while it was followed")
        return result

    def _expired(self) -> StopResult:
        if self._was_reset():
            raise Undecidable(self._reset())
        if self._afterwards is not None:
            return self._look_again(self._afterwards)
        left = self.wait()
        over = left is not None and left <= 0
        if self.begun and (dead := self._look_for_death(over)) is not None:
            return dead
        if not over:
            return StopResult(None)
        if self.begun:
            return StopResult(None, (self._stalled(),), finished=True)
        hint = "; no crash kernel was loaded: load one with kexec -p in dom0" * (self.crash_kernel_loaded is False)
        # Without a crash kernel Xen's crash key does nothing at all.
        raise Undecidable(f"Xen did not crash within {self._timeout:.0f} s{hint}")

    def _reset(self) -> str:
        followed = "the guest was reset while its crash was followed: the dump is lost; see its console log"
        return followed if self.begun else "the machine was reset before a crash began"

    def _was_reset(self) -> bool:
        """Whether the Xen that is followed is there no more: firmware or a loader runs, something else, or Xen anew."""
        paging = [cpu.registers["cr0"] & CR0_PG for cpu in self.memory.target.cpus() if "cr0" in cpu.registers]
        if self._afterwards is not None and len(paging) == 1:
            paging = []  # it is the crash kernel's, which may turn it off
        if (paging and not any(paging)) or not still_there(self.memory):
            return True
        with contextlib.suppress(Undecidable):  # nothing is known, then, of a reset
            # Before a CPU owns the crash nothing in memory may show it.
            return self._crashing is not None and infer(self._read(), self.generation).stage is NORMAL
        return False

    def _at(self, index: int, pc: int) -> StopResult:
        """What it means that this CPU is at this place."""
        if pc == self._anchors.reset:
            raise Undecidable(self._reset())
        if pc not in self._anchors.of.values():
            return StopResult(None)
        state = self._read()
        cpu = next(
            (c.cpu for c in state.cpus.values() if not isinstance(c.physical, Absent) and c.physical.index == index),
            None,
        )
        if cpu is None:
            raise Undecidable(f"the machine's CPU {index} stopped on the crash path, but is not one of Xen's CPUs")
        stage = self._stage(cpu, pc)
        if stage is None or self._has_not_moved(state.of(cpu).physical, cpu):
            self.writes.look(state)
            return StopResult(None)
        if self._crashing is not None:
            self._missed |= {name for name, address in self._anchors.of.items() if address not in self.breakpoints}
        self._advance(state, stage, cpu)
        position = at_stage(stage, cpu, self._crashing, self._online, self._spans(state))
        if stage.role is Role.OTHER:
            position = self._as_seen(state, position, cpu)
        seen, findings = self._judge(state, position)
        if stage.id == "crash-entry" and is_crash_image_loaded(state) is False:
            raise Undecidable(NO_IMAGE)
        if stage.id == self._anchors.last:
            self._afterwards = None if self._stay else Afterwards(findings, max(1.0, self._stall / STALL_SECONDS))
            findings = (*findings, self._complete(True))
        return StopResult(seen, findings, stage.id == self._anchors.last and self._stay)

    def _look_again(self, afterwards: Afterwards) -> StopResult:
        """The machine has run on for a while since the handover."""
        assert self._crashing is not None
        state = self._read()
        position = once_left(AFTERWARDS, self._crashing, self._online, afterwards.parked)
        left = handed_over(state, state.of(self._crashing).physical)
        self._since = self._clock()
        if afterwards.again(Context(self.memory, state, position, self.generation), left):
            return StopResult(None)
        if left:
            return StopResult(*self._judge(state, position), finished=True)
        why = "; ".join(self._whereabouts())
        why = f"the crashing CPU has not come out of Xen, and nothing was looked at: {why}"
        finding = self._of_trace(AFTERWARDS.id, Verdict.UNKNOWN, self._anchors.last, why, last=self._anchors.last)
        self.report.findings.append(finding)
        return StopResult(None, (finding,), finished=True)

    def _has_not_moved(self, physical: PhysicalCpu | Absent, cpu: int) -> bool:
        """Whether its last stop is reported again: where the machine was stopped before the CPU had left it."""
        registers = None if isinstance(physical, Absent) else dict(physical.registers)
        before, self._stopped[cpu] = self._stopped.get(cpu), registers
        return registers is not None and registers == before

    def _as_seen(self, state: State, position: Position, cpu: int) -> Position:
        """A stop of another CPU, when the crashing one has gone on without it, or when it was here before."""
        crash, others = position.crash, dict(position.others)
        if self._afterwards is not None and self._crashing is not None:
            left = handed_over(state, state.of(self._crashing).physical)
            crash = Span(CrashStep.LEFT if left else self._step, CrashStep.LEFT)
        elif self._step > position.stage.crash_step:
            crash = Span(self._step, self._anchors.step_after(self._step))
        if cpu in self._again:
            others[cpu] = self._seen[cpu]
        return position._replace(crash=crash, others=others)

    def _stage(self, cpu: int, pc: int) -> Stage | None:
        """The stage that this CPU has reached at `pc`; an anchor may be another stage's on the crashing CPU."""
        for stage_id, address in self._anchors.of.items():
            stage = BY_ID[stage_id]
            if address != pc:
                continue
            if stage.role is Role.OTHER and self._crashing is not None and cpu != self._crashing:
                return stage
            if stage.role is Role.CRASHING and (self._crashing in (None, cpu)) and self._is_next(stage):
                return stage
        return None

    def _is_next(self, stage: Stage) -> bool:
        if stage.id in ("crash-entry", "shutdown-entry"):
            return self._crashing is None
        return self._crashing is not None and stage.crash_step > self._step

    def _advance(self, state: State, stage: Stage, cpu: int) -> None:
        self._entered = True
        if stage.id == "crash-entry":
            self._online = online_at_crash(state, self.generation, None)
            return
        if stage.role is Role.CRASHING:
            if self._crashing is None:
                self._crashing = cpu
                self._online = self._online | online_at_crash(state, self.generation, cpu)
            self._step = stage.crash_step
            self._unblocked = self._unblocked or stage is UNBLOCKED
            return
        assert stage.other_step is not None
        if cpu in self._seen and stage.other_step <= self._seen[cpu].low:
            # It came again: what it has completed stays completed.
            self._seen[cpu] = Span(self._seen[cpu].low, OtherStep.PARKED)
            self._again.add(cpu)
        else:
            self._seen[cpu] = Span(stage.other_step, stage.other_step)
        if stage.other_step is OtherStep.NMI_TAKEN:
            self._entries[cpu] = self._entries.get(cpu, 0) + 1

    def _spans(self, state: State) -> dict[int, Span]:
        """What is known of each other CPU when one of them stops: at least where it was last seen, and no further than
        the evidence allows. One that came again may have completed anything the first time."""
        sent = self._step >= CrashStep.ARMED
        first = Span(OtherStep.NOTHING, OtherStep.PARKED if sent else OtherStep.NOTHING)
        spans = dict.fromkeys(self._online - {self._crashing}, first)
        spans |= {cpu: Span(span.low, OtherStep.PARKED) for cpu, span in self._seen.items()}
        once = {cpu: spans[cpu] for cpu in spans.keys() - self._again}
        return spans | self._others.bounded(state, once, self._missed)

    def _judge(self, state: State, position: Position) -> tuple[StageSeen, tuple[Finding, ...]]:
        counted = "nmi-taken" in self._anchors.of and BY_ID["nmi-taken"] not in self._anchors.unseen()
        now = moment_of(state, position, len(self.report.stages))
        before = self._history.see(now, self.writes.take(state))
        followed = Followed(self._entries if counted else None, before, self._how_unblocked(), self._looks)
        findings = add_stage(self.report, Context(self.memory, state, position, self.generation, followed))
        if self.report.gate_changes is not None:
            changes = [change for change in before.values() if change.changed]
            self.report.gate_changes += [describe_traced_change(state.symbols, change) for change in changes]
        return self.report.stages[-1], tuple(findings)

    @property
    def _looks(self) -> int | None:
        if self._stay:
            return None
        return 0 if self._afterwards is None else self._afterwards.looks

    def _how_unblocked(self) -> str | Absent:
        """How NMIs were unblocked on the crashing CPU, as far as that was seen."""
        if self._unblocked:
            return "executed"
        if UNBLOCKED in self._anchors.unseen():
            return Absent(f"{self._few()}: it could not be seen")
        return self._unblocking.absence or ("not executed" if self._unblocking.address else "no IRET in machine_kexec")

    def _complete(self, reached: bool, why: str | None = None, follows: str | None = None) -> Finding:
        last = self.report.stages[-1].stage if self.report.stages else None
        # An unknown path may end elsewhere.
        verdict = Verdict.PASS if reached else Verdict.FAIL if self.generation else Verdict.UNKNOWN
        reason = None if reached else "; ".join([f"{why}: {COMPLETE.consequence}", *self._whereabouts()])
        finding = self._of_trace(self._anchors.last, verdict, last, reason, last=last or "", follows=follows)
        self.report.findings.append(finding)
        return finding

    def _of_trace(self, stage: str, verdict: Verdict, observed: str | None, why: str | None, **more: Any) -> Finding:
        stop = max(0, len(self.report.stages) - 1)
        return completeness(stage, self._crashing, verdict, observed, why, stop, **more)

    def _look_for_death(self, over: bool) -> StopResult | None:
        """The end of the trace, where the crashing CPU has died and Xen has said all that it has to say of that."""
        try:
            state = self._read()
            context = Context(self.memory, state, infer(state, self.generation), self.generation)
        except Undecidable:
            return None
        crashing = context.position.crashing_cpu
        before, self._died = self._died, None if crashing is None else context.deaths.get(crashing)
        if self._died is None or not (over or self._died.lines or self._died == before):
            return None
        self._crashing = crashing
        complete = self._complete(False, "it died", follows=FATAL_TRAP.id)
        findings = add_stage(self.report, context)
        return StopResult(self.report.stages[-1], (complete, *findings), finished=True)

    def _stalled(self) -> Finding:
        """The crash began and never reached its end: a failure, located where it was last seen."""
        return self._complete(False, f"no further stage was reached in {self._stall:.0f} s")

    def _whereabouts(self) -> list[str]:
        with contextlib.suppress(Undecidable):
            return last_words(self.memory, self._read(), self._crashing)
        return []
