"""What killed a CPU on the crash path: an exception or a panic there, what Xen said of it, and what fixed it.

An exception that Xen does not expect ends in panic(). On the crash path that finds the path taken already
(one_cpu_only), and halts or resets the machine: a CPU in panic(), in whose way back the crash path comes before, has
died there. Which exception it was follows from its stacks.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence

from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.generations import Generation, Hook
from xen_symbols.crashpath.position import ONLY_CRASHING, STOPPING, function_of
from xen_symbols.crashpath.stages import CRASHING, Position
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86.apic import Mode
from xen_symbols.xen.backtrace import Backtrace, Step, backtrace
from xen_symbols.xen.console import OF_XEN, printable, read_console, without_prefix
from xen_symbols.xen.lapic import BOOT_MODES
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import State

_ENTRY = "kexec_crash"
_FATAL = {"panic", "fatal_trap", "do_double_fault"}  # xen/drivers/char/console.c, xen/arch/x86/traps.c
_ENDS = {"machine_halt", "machine_restart"}  # of panic(): xen/arch/x86/shutdown.c
# Where another CPU stays whose panic() finds the crash path taken: one_cpu_only (470f58c159), before that its caller.
_LOSES_IN = {"one_cpu_only", "kexec_crash", *_ENDS}
_CONSOLE = 16384  # bytes: the registers, stacks and panic of a few CPUs
_LAST_WORDS = 512
_GP = 13


class Defect(NamedTuple):
    """A known one of Xen's own: an exception that comes in one of these functions."""

    source: str  # the commit that fixes it, and since when
    says: str
    vector: int
    functions: frozenset[str]
    holds: Callable[[State, Generation], bool]


def _has_absent_cpus(state: State, generation: Generation) -> bool:
    return generation.reads_absent_idts and not all(cpu.exists for cpu in state.cpus.values())


def _returns_to_x2apic(state: State, generation: Generation) -> bool:
    mode = state.system["apic_boot_mode"]
    return generation.hook is not Hook.CALLBACK and mode.present and BOOT_MODES.get(mode.value) is Mode.X2APIC


DEFECTS = (
    Defect(
        "2c9829a261 (4.21.2, 4.22.0)",
        "machine_kexec() reads the IDT of each possible CPU, of those that are not present, too",
        _GP, frozenset(("machine_kexec",)), _has_absent_cpus,
    ),
    Defect(
        "77ffa26374 (4.5.0)",
        "disable_local_APIC() goes from disabled to x2APIC mode in one write, which is not allowed",
        _GP, frozenset(STOPPING), _returns_to_x2apic,
    ),
)  # fmt: skip


class Death(NamedTuple):
    """`event` came `at` a place, on the crash path; `frame` is the address of what it pushed, None for a panic()
    without an exception; `lines` are those of Xen's panic message, none where the console does not hold them."""

    event: str
    at: str
    frame: int | None
    lines: tuple[str, ...]
    defect: Defect | None


def deaths(memory: XenMemory, state: State, position: Position, generation: Generation | None) -> dict[int, Death]:
    """What killed each CPU that died on the crash path, as far as its registers and stacks show it."""
    found = {}
    for cpu in _may_have_died(state, position):
        trace = backtrace(memory, state, state.of(cpu))
        own = ONLY_CRASHING if cpu == position.crashing_cpu else {generation.parks_in} if generation else ()
        path = {_ENTRY, *own}
        step = cause(trace, path, cpu == position.crashing_cpu)
        if step is not None:
            assert step.frame is not None
            defect = _known(state, generation, step)
            lines = _panic(memory, cpu, step.rip)
            found[cpu] = Death(step.frame.name, step.name, step.frame.address, lines, defect)
        elif (caller := panicked(trace, path)) is not None:
            found[cpu] = Death("panic", caller, None, _panic(memory, cpu), None)
    return found


def _may_have_died(state: State, position: Position) -> list[int]:
    """The crashing CPU where it is at no stage, and others that are where a panic ends."""
    inside = {cpu: function_of(state.symbols, state.of(cpu).physical) for cpu in position.online}
    lost = position.crashing_cpu if position.stage is CRASHING else None
    return sorted(cpu for cpu, function in inside.items() if function and (cpu == lost or function in _LOSES_IN))


def cause(trace: Backtrace, path: set[str], owner: bool) -> Step | None:
    """What the oldest exception interrupted that came on the path and ended in a panic. `owner`: the path is this
    CPU's, so that it is in there where its way back is lost, and does not show that it led to the path."""
    names = [_functions(step) for step in trace.steps]
    for number in range(len(names) - 1, 0, -1):
        newer = {name for step in names[:number] for name in step}
        older = {name for step in names[number:] for name in step}
        if newer & _FATAL and (older & path or (owner and trace.lost and not newer & path)):
            return trace.steps[number]
    return None


def panicked(trace: Backtrace, path: set[str]) -> str | None:
    """Who called panic() on the path, without an exception."""
    if not trace.steps:
        return None
    names = _functions(trace.steps[0])
    if "panic" not in names or not _ENDS & set(names):
        return None
    at = names.index("panic")
    older = {name for step in (names[at:], *map(_functions, trace.steps[1:])) for name in step}
    return trace.steps[0].calls[at].name if older & path and at < len(trace.steps[0].calls) else None


def _functions(step: Step) -> list[str]:
    """That it is in, and those that called it, without what a compiler made of them (`.cold`, `.part.0`)."""
    return [re.split(r"[+.]", name)[0] for name in (step.name, *(call.name for call in step.calls))]


def _known(state: State, generation: Generation | None, step: Step) -> Defect | None:
    assert step.frame is not None
    if generation is None:
        return None
    inside = _functions(step)[0]
    return next(
        (
            defect for defect in DEFECTS
            if defect.vector == step.frame.vector and inside in defect.functions and defect.holds(state, generation)
        ), None,
    )  # fmt: skip


# -- What Xen said ----------------------------------------------------------------------------


def _panic(memory: XenMemory, cpu: int, rip: int | None = None) -> tuple[str, ...]:
    """The lines of a CPU's panic; with `rip`, of the one that came after the registers with it."""
    try:
        return panic_lines(printable(read_console(memory, _CONSOLE)), cpu, rip)
    except Unreadable:
        return ()


def panic_lines(console: str, cpu: int, rip: int | None = None) -> tuple[str, ...]:
    """From the text of Xen's console."""
    said = [without_prefix(line) for line in console.split("\n") if line.startswith(OF_XEN)]
    if rip is not None:
        registers = [at for at, line in enumerate(said) if line.startswith("RIP:") and f"<{rip:016x}>" in line]
        said = said[registers[0] :] if registers else []
    begins = f"Panic on CPU {cpu}:"
    if begins not in said:
        return ()
    after = said[said.index(begins) + 1 :]
    return tuple(_until_stars(after))


def _until_stars(lines: Sequence[str]) -> list[str]:
    end = next((at for at, line in enumerate(lines) if line.startswith("****")), 0)
    return [line for line in lines[:end] if line]


def last_words(memory: XenMemory, state: State, cpu: int | None) -> list[str]:
    """Where a CPU got to, and what Xen said last, as far as they can be read."""
    found = []
    physical = None if cpu is None else state.of(cpu).physical
    if isinstance(physical, PhysicalCpu) and "rip" in physical.registers:
        halted = "halted in" if physical.halted is True else "in"
        found.append(f"CPU {cpu} is {halted} {memory.symbols.describe(physical.registers['rip'])}")
    with contextlib.suppress(Unreadable):
        lines = printable(read_console(memory, _LAST_WORDS)).split("\n")
        if said := [line.strip() for line in lines if line.strip()]:
            found.append(f"Xen's console ends: {said[-1]}")
    return found
