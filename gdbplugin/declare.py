"""Declarations of commands, settings and convenience functions, and what commands need from the debugger.

Nothing here knows gdb: `gdbplugin.register` binds the declarations to it, and documentation and tests walk them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.follow import Follower
from xen_symbols.crashpath.gatechanges import Key
from xen_symbols.crashpath.gatewatch import GateWatch
from xen_symbols.crashpath.identification import Identification
from xen_symbols.records import NamedTuple
from xen_symbols.report.blocks import Block, Cell
from xen_symbols.report.blocks import show as shown
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import CpuState, State

if TYPE_CHECKING:
    from xen_symbols.report import contract

Say = Callable[[Sequence[Block]], None]
# Of a write that a watchpoint caught: the gate, the target's index of the CPU, where that goes on, all the gates.
NoteWrite = Callable[[Key, int, int, Mapping[Key, bytes]], None]

# Exceptions of a handler that are an answer to the user, not a bug of the plugin.
ERRORS = (Undecidable, Unreadable)


class Stop(NamedTuple):
    """Why the machine stopped after it was let run."""

    expired: bool = False  # nothing happened in the time allowed, and it was stopped
    interrupted: bool = False  # by Ctrl-C


class Session(Protocol):
    """What the commands need from the debugger."""

    report: contract.Report | None  # the last one, by a check or a trace
    follower: Follower | None  # of the trace that has begun
    gate_watch: GateWatch | None

    def look(self) -> AbstractContextManager[XenMemory]:
        """Xen in the stopped machine, for one look. Raises Undecidable."""
        ...

    def symbols(self) -> SymbolTable: ...

    def connected(self) -> bool: ...

    def identification(self, memory: XenMemory) -> Identification: ...

    def thread(self, cpu: int | None, physical: PhysicalCpu) -> int | None:
        """gdb's number of the thread that is a CPU; `cpu` is Xen's number of it, if it has one."""
        ...

    def evaluate(self, expression: str) -> int:
        """The value of an expression in gdb's words. Raises Undecidable."""
        ...

    def formatted(self, name: str, raw: bytes) -> str | None:
        """The value of a per-CPU variable as gdb shows its type; None without debug information."""
        ...

    # -- letting the machine run --------------------------------------------------------------

    def look_again(self, memory: XenMemory) -> AbstractContextManager[None]:
        """The stopped machine in which this Xen was found, for one look, even if Xen is no longer there. Raises
        Undecidable when the debugger was connected anew."""
        ...

    def selected(self) -> tuple[int, int]:
        """(the target's index, pc) of the CPU that stopped."""
        ...

    def settable(self, addresses: Sequence[int]) -> int:
        """How many of these can have a hardware breakpoint at the same time. None stays set."""
        ...

    def breakpoints(self) -> AbstractContextManager[Callable[[Sequence[int]], None]]:
        """A function to call with the addresses for hardware breakpoints, and with none at the end; any others of ours
        are removed. The user does not see them."""
        ...

    def run(self, seconds: float | None) -> Stop:
        """Let the machine run until it stops; after `seconds` make it stop. Raises Undecidable when it is gone."""
        ...

    def watch(self, addresses: Mapping[Key, int], note: NoteWrite) -> str | None:
        """Watch writes to gates until `end_watching`. Returns why that cannot be done; None if it is done."""
        ...

    def end_watching(self) -> None: ...


@dataclass(frozen=True)
class Argument:
    """`kind` chooses how it is read and completed: cpu, vector, percpu, address, seconds, flag (the name itself), word.

    One whose name begins with -- is an option, with its value's name after it; both reach the answer by name.
    """

    name: str
    kind: str
    says: str
    optional: bool = False

    @property
    def keyword(self) -> str | None:
        """The answer's name for an option or a flag; None for a positional argument."""
        if self.name.startswith("--"):
            return self.name.split()[0].removeprefix("--").replace("-", "_")
        return self.name if self.kind == "flag" else None


def usage(name: str, arguments: Sequence[Argument]) -> str:
    return " ".join([name, *(f"[{a.name}]" if a.optional else a.name for a in arguments)])


@dataclass(frozen=True)
class Step:
    """One of the MI commands that replace a command which lets the machine run. It does not let it run itself: gdb
    drops the result of an MI command that does."""

    name: str
    answer: Callable[..., Mapping[str, Any]]
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Command:
    """`answer` gives the JSON; `blocks` the tables for users. The MI twin is `-xen-` and the words, hyphenated.

    With `steps` it lets the machine run: `answer` gets `say`, to print blocks while it runs, and the MI twin is one
    command for each step, with its name after a hyphen.
    """

    words: tuple[str, ...]
    summary: str
    details: str
    arguments: tuple[Argument, ...]
    answer: Callable[..., Mapping[str, Any]]
    blocks: Callable[[Any], Sequence[Block]]
    steps: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(("xen", *self.words))

    @property
    def mi(self) -> Mapping[str, Step]:
        """Its MI commands, by name."""
        base = "-".join(("-xen", *self.words))
        if not self.steps:
            return {base: Step("", self.answer, self.arguments)}
        return {f"{base}-{step.name}": step for step in self.steps}

    @property
    def usage(self) -> str:
        return usage(self.name, self.arguments)

    @property
    def help(self) -> str:
        lines = [self.summary, f"Usage: {self.usage}", "", self.details]
        if self.arguments:
            width = max(8, *(len(argument.name) for argument in self.arguments))
            lines += ["", *(f"  {argument.name:{width}} {argument.says}" for argument in self.arguments)]
        return "\n".join([*lines, "", *self._for_programs()])

    def _for_programs(self) -> list[str]:
        if not self.steps:
            return [f"For programs: {next(iter(self.mi))} returns the same as JSON, in the field json."]
        calls = [usage(name, step.arguments) for name, step in self.mi.items()]
        return ["For programs, which let the machine run themselves in between, each returning JSON in the field json:",
                *(f"  {call}" for call in calls)]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One parameter under `set xen`. `kind` is gdb's PARAM_ constant."""

    name: str
    kind: str
    summary: str
    details: str


# -- what several commands share -------------------------------------------------


def cell(value: Any, style: str = "") -> Cell:
    """A value in a table; a dash for none."""
    return Cell("-", "dim") if value is None else Cell(shown(value), style)


def hex_or_none(value: int | Absent | None) -> str | None:
    return None if value is None or isinstance(value, Absent) else hex(value)


def plain(value: Any) -> Any:
    return None if isinstance(value, Absent) else value


def chosen(state: State, cpu: int | None) -> list[CpuState]:
    """The one asked for, or all that exist. Raises Undecidable for a number that Xen does not have."""
    if cpu is None:
        return [known for known in state.cpus.values() if known.exists]
    if cpu not in state.cpus:
        raise Undecidable(f"CPU {cpu} does not exist: nr_cpu_ids is {len(state.cpus)}")
    return [state.of(cpu)]


CPU = Argument("CPU", "cpu", "Xen's number of a CPU (not gdb's thread or the APIC ID); default: every CPU", True)
