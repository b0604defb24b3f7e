"""Where each CPU is and how it got there: its stacks, the exception frames on them, and the calls in between.

Release builds of Xen keep no frame pointers, and need not have debug information. So calls are found as Xen's own
show_trace() finds them, by scanning the part of a stack that is in use for return addresses, and kept when a call
instruction precedes them. One left over from an earlier call cannot be distinguished from one still in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, TEXT
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86.call import LONGEST, follows_indirect_call, follows_relative_call
from xen_symbols.x86.paging import PAGE_SIZE
from xen_symbols.xen import frames
from xen_symbols.xen.frames import Frame
from xen_symbols.xen.memory import HYPERVISOR_CS, IMAGE_REGION, XenMemory, image_region
from xen_symbols.xen.stacks import REGS_SIZE, CpuStacks, Stack, stacks_of
from xen_symbols.xen.state import CpuState, State

_CS_AT = 136  # offsetof(struct cpu_user_regs, cs)


class Call(NamedTuple):
    """A return address found on a stack."""

    at: int
    address: int
    name: str  # name+offset/size of the caller


@dataclass
class Step:
    """One context on the way back: the CPU's registers (`frame` None), or what an exception interrupted."""

    rip: int
    rsp: int
    cs: int
    name: str
    stack: Stack | None
    place: str
    frame: Frame | None = None
    calls: list[Call] = field(default_factory=list)
    unread: str | None = None  # why a part of the stack, or of the code that it points to, could not be looked at


class Found(NamedTuple):
    """A frame at the top of an exception's stack. `state` is current, moved, stale, or unknown; `says` explains it."""

    stack: Stack
    frame: Frame
    name: str
    state: str
    says: str


@dataclass
class Backtrace:
    """`steps` go from where the CPU is back to where it began; `end` says what lies before that."""

    cpu: int
    source: str
    registers: Absent | None = None  # why there are none
    stacks: CpuStacks | Absent = Absent("not looked for")  # noqa: RUF009 - a frozen value
    steps: list[Step] = field(default_factory=list)
    frames: list[Found] = field(default_factory=list)
    end: str = ""
    lost: bool = False  # the steps do not reach the beginning
    current: bool = True  # false when the registers are those that Xen saved in its notes, before it went on
    guest: Frame | None = None  # with which a guest entered Xen, where the way back ends there


def backtrace(memory: XenMemory, state: State, cpu: CpuState, stacks: CpuStacks | Absent | None = None) -> Backtrace:
    """One CPU's, on its `stacks`, which are looked for if they are not given. What could not be read or determined is
    stated in it; nothing is raised for that."""
    fred = state.system["fred"]
    stacks = stacks_of(memory, state, cpu) if stacks is None else stacks
    if fred.present and fred.value == 1:
        stacks = Absent("FRED delivers events: its stacks and frames are not decoded")
    physical = cpu.physical
    if isinstance(physical, Absent):
        trace = Backtrace(cpu.cpu, "none", physical, stacks, lost=True)
    else:
        trace = Backtrace(cpu.cpu, physical.source, stacks=stacks, current=physical.current)
        _Walk(memory, stacks, trace).from_registers(state, cpu, physical)
    if not isinstance(stacks, Absent):
        trace.frames = list(_remaining(memory, stacks, trace))
    return trace


class _Walk:
    """The way back of one CPU, step by step."""

    def __init__(self, memory: XenMemory, stacks: CpuStacks | Absent, trace: Backtrace) -> None:
        self._memory, self._stacks, self._trace = memory, stacks, trace
        self._xen = _xen_image(memory)
        self._visited: set[Stack] = set()

    def from_registers(self, state: State, cpu: CpuState, physical: PhysicalCpu) -> None:
        """Every step, beginning with the CPU's own registers."""
        trace, registers = self._trace, physical.registers
        if physical.guest_mode is True:
            trace.end = "it runs an HVM guest: its registers are the guest's, and Xen's stack is empty"
            return
        missing = [name for name in ("rip", "rsp", "cs") if name not in registers]
        if missing:
            lacks = f"no {', '.join(missing)} among its registers" if registers else "no registers saved"
            trace.registers = Absent(f"{lacks} ({physical.source})")
            trace.lost = True
            return
        self._step(registers["rip"], registers["rsp"], registers["cs"], None)
        if registers["cs"] & 3:
            trace.end = "it runs a guest: Xen's stack is empty"
        elif not self._xen <= registers["rip"] < self._xen + IMAGE_REGION:
            trace.end = "what runs there is not Xen: the crash kernel, or an HVM guest"
        else:
            self._unwind(state, cpu)

    def _step(self, rip: int, rsp: int, cs: int, frame: Frame | None) -> Step:
        stacks = self._stacks
        step = Step(rip, rsp, cs, self._memory.symbols.describe(rip), None, "a stack that is not known", frame)
        if cs & 3:
            step.place = "a guest's stack"
        elif not isinstance(stacks, Absent):
            step.stack, step.place = stacks.at(rsp), stacks.place(rsp)
        self._trace.steps.append(step)
        return step

    def _interrupted(self, frame: Frame) -> Step:
        return self._step(frame.rip, frame.rsp, frame.cs, frame)

    def _unwind(self, state: State, cpu: CpuState) -> None:
        """From the last step to the beginning: up its stack, over each frame, to the stack that it interrupted."""
        stacks, trace = self._stacks, self._trace
        while True:
            step = trace.steps[-1]
            stack = step.stack
            if step.cs & 3:
                trace.end = "a guest was interrupted"
                return
            if stack is None or isinstance(stacks, Absent):
                why = str(stacks) if isinstance(stacks, Absent) else f"rsp {step.rsp:#x} is on {step.place}"
                self._lose(f"what was before it is not known: {why}")
                return
            if stack in self._visited:
                self._lose(f"another {stack.name} came while the first was handled, and overwrote its frame")
                return
            if stack.ist:
                self._visited.add(stack)
                self._scan(step, stack.end - REGS_SIZE)
                frame = self._top(stack, step.rsp)
                if isinstance(frame, Absent):
                    self._lose(f"what was before it is not known: {frame}")
                    return
                self._interrupted(frame)
            else:
                self._scan(step, stacks.guest_regs)
                self._finish(cpu, stacks)
                return

    def _lose(self, why: str) -> None:
        self._trace.end, self._trace.lost = why, True

    def _top(self, stack: Stack, rsp: int) -> Frame | Absent:
        """The frame at the top of an exception's stack that is in use down to `rsp`."""
        if rsp > stack.end - frames.PUSHED_SIZE:
            return Absent(f"nothing has been pushed on the {stack.name} stack yet")
        return _frame_at(self._memory, stack, stored=rsp <= stack.end - REGS_SIZE)

    def _scan(self, step: Step, end: int) -> None:
        """The calls between a step's rsp and `end`; a frame that the CPU pushed there begins another step."""
        at = (step.rsp + 7) & ~7
        words = dict(self._words(step, at, end))
        candidates = [word for word in dict.fromkeys(words.values()) if self._is_code(word)]
        called = self._after_calls(step, candidates)
        while at < end:
            frame = self._pushed(words, at)
            if frame is not None:
                step = self._interrupted(frame)
                at = frame.end
                continue
            word = words.get(at)
            if word in called:
                step.calls.append(Call(at, word, self._memory.symbols.describe_caller(word)))
            at += 8

    def _words(self, step: Step, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(address, word) of what can be read, a page at a time: a dump may have left one out."""
        edges = [start, *range((start & -PAGE_SIZE) + PAGE_SIZE, end, PAGE_SIZE), end]
        pieces = [(low, high - low) for low, high in pairwise(edges) if low < high]
        for (low, size), raw in zip(pieces, self._memory.read_many(pieces), strict=True):
            if isinstance(raw, Absent):
                step.unread = f"the stack from {low:#x} to {low + size:#x} could not be read: {raw}"
                continue
            for offset in range(0, size - 7, 8):
                yield low + offset, int.from_bytes(raw[offset : offset + 8], "little")

    def _pushed(self, words: dict[int, int], at: int) -> Frame | None:
        """The frame at `at` that an exception left without changing stacks, if all of it is there and fits."""
        if words.get(at + _CS_AT) != HYPERVISOR_CS:  # most words end here
            return None
        parts = [words.get(at + offset) for offset in range(0, REGS_SIZE, 8)]
        raw = b"".join(part.to_bytes(8, "little") for part in parts if part is not None)
        if len(raw) != REGS_SIZE:
            return None
        frame = frames.decode(raw, at)
        fits = frames.pushed_here(frame) and frame.vector is not None and frame.vector < 256
        return frame if fits and frames.problem(frame, self._xen) is None else None

    def _is_code(self, address: int) -> bool:
        found = self._memory.symbols.lookup(address)
        return found is not None and found[0].kind in TEXT

    def _after_calls(self, step: Step, candidates: list[int]) -> set[int]:
        """Those addresses that a call instruction precedes."""
        codes = self._memory.read_many([(address - LONGEST, LONGEST) for address in candidates])
        unread = next((code for code in codes if isinstance(code, Absent)), None)
        if unread is not None:
            step.unread = f"some code that it points to could not be read: {unread}"
        return {
            address
            for address, code in zip(candidates, codes, strict=True)
            if not isinstance(code, Absent) and self._follows_call(address, code)
        }

    def _follows_call(self, address: int, before: bytes) -> bool:
        """A function may end with a call that never returns. In front of the next one lies padding, too, which looks
        like an indirect call behind the right byte: ff 90 90 90 90 90."""
        if follows_relative_call(address, before, self._is_code):
            return True
        found = self._memory.symbols.lookup(address)
        return found is not None and found[1] > 0 and follows_indirect_call(before)

    def _finish(self, cpu: CpuState, stacks: CpuStacks) -> None:
        """What the primary stack began with: a guest that entered Xen, or nothing."""
        idle = _is_idle(self._memory, cpu, stacks)
        if idle is True:
            self._trace.end = "the idle vCPU was running: no guest was interrupted"
            return
        try:
            frame = frames.decode(self._memory.read(stacks.guest_regs, REGS_SIZE), stacks.guest_regs)
        except Unreadable as error:
            self._lose(f"the guest's registers could not be read: {error.absent}")
            return
        if not frame.ring or frames.problem(frame, self._xen):
            self._trace.end = "the beginning of the stack: no PV guest's registers are there"
            return
        if idle is None:
            self._lose("a guest's registers are there, perhaps an earlier one's: it is not known which vCPU ran")
            return
        self._trace.guest = frame
        self._trace.end = f"a guest was running, and entered Xen by {frame.name}"


def _xen_image(memory: XenMemory) -> int:
    return image_region(memory.symbols.address("idle_pg_table"))


def _is_idle(memory: XenMemory, cpu: CpuState, stacks: CpuStacks) -> bool | None:
    """Whether the vCPU that runs is the idle one, on whose stack guest registers are left from another."""
    if isinstance(stacks.current, Absent):
        return None
    try:
        return stacks.current == memory.read_uint(memory.symbols.address("idle_vcpu", DATA) + 8 * cpu.cpu)
    except Unreadable:
        return None


def _frame_at(memory: XenMemory, stack: Stack, *, stored: bool = True) -> Frame | Absent:
    """The frame at the top of an exception's stack; Absent with the reason when there is none."""
    try:
        raw = memory.read(stack.end - REGS_SIZE, REGS_SIZE)
    except Unreadable as error:
        return Absent(f"the top of the {stack.name} stack could not be read: {error.absent}")
    if not any(raw):
        return Absent(f"the {stack.name} stack was never used")
    frame = frames.decode(raw, stack.end - REGS_SIZE, stored=stored)
    wrong = frames.problem(frame, _xen_image(memory), stack.vector)
    return frame if wrong is None else Absent(f"no frame is at the top of the {stack.name} stack: {wrong}")


def _remaining(memory: XenMemory, stacks: CpuStacks, trace: Backtrace) -> Iterator[Found]:
    """The frame of each exception's stack, and whether it belongs to the way back or was left behind."""
    current = {step.frame.address for step in trace.steps if step.frame is not None}
    for stack in stacks.stacks:
        if not stack.ist:
            continue
        partial = any(step.frame and step.frame.address == stack.end - REGS_SIZE and step.frame.vector is None
                      for step in trace.steps)  # fmt: skip
        frame = _frame_at(memory, stack, stored=not partial)
        if isinstance(frame, Absent):
            continue
        name = memory.symbols.describe(frame.rip)
        if frame.address in current:
            yield Found(stack, frame, name, "current", f"{stack.name} is being handled")
        elif trace.lost:
            yield Found(stack, frame, name, "unknown", f"of {stack.name}, now or earlier: the call chain is not known")
        elif _moved(memory, stacks, frame, trace):
            says = (
                f"{stack.name} is being handled: it interrupted a guest, and its frame was moved to the primary stack"
            )
            yield Found(stack, frame, name, "moved", says)
        else:
            yield Found(stack, frame, name, "stale", f"left from an earlier {stack.name}")


def _moved(memory: XenMemory, stacks: CpuStacks, frame: Frame, trace: Backtrace) -> bool:
    """Whether the entry code copied this frame to where a guest's registers lie, and they still count."""
    if trace.guest is None or not frame.ring:
        return False
    try:
        return memory.read(frame.address, REGS_SIZE) == memory.read(stacks.guest_regs, REGS_SIZE)
    except Unreadable:
        return False
