"""Binding the declared commands to gdb: command line, machine interface, settings and convenience functions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gdb

from gdbplugin import trace, watchgates
from gdbplugin.commands import (
    COMMANDS,
    ERRORS,
    FUNCTIONS,
    IDT_ENTRIES,
    SETTINGS,
    TRACE_HELP,
    WATCH_HELP,
    Argument,
    Command,
    Setting,
)
from gdbplugin.session import Session
from xen_symbols.absence import Undecidable
from xen_symbols.report.blocks import Block
from xen_symbols.report.console import coloured, plain
from xen_symbols.x86 import gate
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.percpu import per_cpu_address, per_cpu_areas

_PER_CPU = "per_cpu__"


class _Parameter(gdb.Parameter):
    def __init__(self, setting: Setting) -> None:
        self.set_doc = f"Set {setting.summary}."
        self.show_doc = f"Show {setting.summary}."
        self.__doc__ = setting.details
        super().__init__(f"xen {setting.name}", gdb.COMMAND_DATA, getattr(gdb, setting.kind))
        self.value = False if setting.kind == "PARAM_BOOLEAN" else None
        self._says = setting.summary

    def get_set_string(self) -> str:
        return ""

    def get_show_string(self, value: str) -> str:
        return f"{self._says[0].upper()}{self._says[1:]}: {value or 'not set'}."


class _Prefix(gdb.Command):
    def __init__(self, name: str, doc: str) -> None:
        self.__doc__ = doc
        super().__init__(name, gdb.COMMAND_DATA, gdb.COMPLETE_NONE, True)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Whatever goes wrong that is no fault of ours reaches the user as one line."""
    try:
        yield
    except (*ERRORS, gdb.error) as error:
        raise gdb.GdbError(" ".join(str(error).split())) from None


class _Words:
    """Arguments as the user typed them become what a command's answer takes."""

    def __init__(self, session: Session, command: Command) -> None:
        self._session = session
        self._command = command

    def parse(self, words: Sequence[str]) -> list[Any]:
        wanted = self._command.arguments
        needed = sum(not argument.optional for argument in wanted)
        if not needed <= len(words) <= len(wanted):
            raise Undecidable(f"usage: {self._command.usage}")
        return [self._value(argument, word) for argument, word in zip(wanted, words, strict=False)]

    def _value(self, argument: Argument, word: str) -> Any:
        if argument.kind == "percpu":
            return word
        if argument.kind == "address":
            return self._session.evaluate(word)
        try:
            return int(word, 0)
        except ValueError:
            try:
                return int(gdb.parse_and_eval(word))
            except gdb.error as error:
                why = str(error).partition("  ")[0]
                raise Undecidable(f"{argument.name} is a number, not {word!r}: {why}") from None

    def split(self, text: str) -> list[str]:
        """The words of a command line; an expression keeps its spaces."""
        if self._command.arguments and self._command.arguments[-1].kind == "address":
            return [text.strip()] if text.strip() else []
        words: list[str] = gdb.string_to_argv(text)
        return words

    def complete(self, text: str, word: str) -> list[str]:
        position = len(text[: len(text) - len(word)].split())
        if position >= len(self._command.arguments):
            return []
        kind = self._command.arguments[position].kind
        try:
            if kind == "percpu":
                return [name.removeprefix(_PER_CPU) for name in self._session.symbols().complete(_PER_CPU + word)]
            if kind == "address":
                return self._session.symbols().complete(word)
            if kind == "vector":
                return [str(vector) for vector in gate.VECTOR_NAMES if str(vector).startswith(word)]
            with self._session.look() as memory:
                return [str(cpu) for cpu in per_cpu_areas(memory).existing if str(cpu).startswith(word)]
        except (*ERRORS, gdb.error):
            return []  # nothing can be proposed: there are no symbols, or no machine, yet


class _CliCommand(gdb.Command):
    def __init__(self, session: Session, command: Command) -> None:
        self.__doc__ = command.help
        self._session, self._command = session, command
        self._words = _Words(session, command)
        super().__init__(command.name, gdb.COMMAND_DATA)

    def invoke(self, argument: str, from_tty: bool) -> None:
        self.dont_repeat()
        with one_line_errors():
            values = self._words.parse(self._words.split(argument))
            answer = self._command.answer(self._session, *values)
        write_blocks(self._command.blocks(answer), from_tty)

    def complete(self, text: str, word: str | None) -> list[str]:
        return self._words.complete(text, word or "")


def mi_result(answer: Any) -> dict[str, str]:
    """gdb turns every value in an MI result into a string: the answer travels as one JSON text."""
    return {"json": json.dumps(answer, separators=(",", ":"))}


class _MiCommand(gdb.MICommand):
    def __init__(self, session: Session, command: Command) -> None:
        self._session, self._command = session, command
        super().__init__(command.mi)

    def invoke(self, argv: list[str]) -> dict[str, str]:
        with one_line_errors():
            if self._session.settings["rdmsr"].value:
                raise Undecidable("set xen rdmsr is on: gdb drops the result of an MI command that steps the machine")
            values = _Words(self._session, self._command).parse(argv)
            return mi_result(self._command.answer(self._session, *values))


class _MiTrace(gdb.MICommand):
    """The steps of gdbplugin.trace and gdbplugin.watchgates. None of them continues the machine."""

    def __init__(self, name: str, session: Session, step: Any) -> None:
        self._session, self._step = session, step
        super().__init__(name)

    def invoke(self, argv: list[str]) -> dict[str, str]:
        with one_line_errors():
            return mi_result(self._step(self._session, *argv))


class _CrashTrace(gdb.Command):
    __doc__ = TRACE_HELP

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("xen crash trace", gdb.COMMAND_RUNNING)

    def invoke(self, argument: str, from_tty: bool) -> None:
        self.dont_repeat()
        with one_line_errors():
            timeout = trace.parse_timeout(gdb.string_to_argv(argument))
            trace.run(self._session, timeout, lambda blocks: write_blocks(blocks, from_tty))


class _WatchGates(gdb.Command):
    __doc__ = WATCH_HELP

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("xen watch gates", gdb.COMMAND_RUNNING)

    def invoke(self, argument: str, from_tty: bool) -> None:
        self.dont_repeat()
        with one_line_errors():
            if argument.strip():
                raise Undecidable("usage: xen watch gates")
            watchgates.run(self._session, lambda blocks: write_blocks(blocks, from_tty))


class _PerCpu(gdb.Function):
    __doc__ = FUNCTIONS["xen_per_cpu"]

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("xen_per_cpu")

    def invoke(self, name: gdb.Value, cpu: gdb.Value) -> gdb.Value:
        with one_line_errors():
            plain_name = name.string().removeprefix(_PER_CPU)
            with self._session.look() as memory:
                size = memory.symbols.size(_PER_CPU + plain_name)
                if not size:
                    raise Undecidable(f"{memory.symbols.path} does not say how large {plain_name} is")
                raw = memory.read(per_cpu_address(memory, plain_name, int(cpu)), size)
            return self._session.value(plain_name, raw)


class _Gate(gdb.Function):
    __doc__ = FUNCTIONS["xen_gate"]

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("xen_gate")

    def invoke(self, cpu: gdb.Value, vector: gdb.Value) -> gdb.Value:
        with one_line_errors():
            if not 0 <= int(vector) < IDT_ENTRIES:
                raise Undecidable(f"vector {int(vector)} does not exist: an IDT has {IDT_ENTRIES}")
            with self._session.look() as memory:
                raw = memory.read(idt_address(memory, int(cpu)) + int(vector) * gate.SIZE, gate.SIZE)
            kind = gdb.selected_inferior().architecture().integer_type(64, False)
            return gdb.Value(gate.decode(raw).handler).cast(kind)


def write_blocks(blocks: Sequence[Block], from_tty: bool) -> None:
    """To gdb's output: with colours on a terminal that has them, if rich is there; else plain."""
    text = None
    if from_tty and _terminal() and not _piped():
        text = coloured(blocks, gdb.parameter("width") or shutil.get_terminal_size().columns)
    gdb.write(plain(blocks) if text is None else text)


def _terminal() -> bool:
    dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("NO_COLOR")
    return os.isatty(1) and not dumb and bool(gdb.parameter("style enabled"))


def _piped() -> bool:
    """Whether gdb's `pipe` command runs this one: gdb does not say so, but then a child reads what we write."""
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        ours = {str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
        inputs = {str(Path(f"/proc/{child}/fd/0").readlink()) for child in children}
    except OSError:
        return False
    return any(name.startswith("pipe:") for name in inputs & ours)


_registered: list[Session] = []


def register() -> None:
    """Add everything to this gdb; a second call does nothing."""
    if _registered:
        return
    _Prefix("xen", "Inspect a Xen hypervisor: its CPUs, gates and crash path.")
    _Prefix("xen crash", "Follow and judge Xen's crash path.")
    _Prefix("xen watch", "Watch what changes while the machine runs.")
    _Prefix("set xen", "Settings of the xen commands.")
    _Prefix("show xen", "Show the settings of the xen commands.")
    session = Session({setting.name: _Parameter(setting) for setting in SETTINGS})
    for command in COMMANDS:
        _CliCommand(session, command)
        _MiCommand(session, command)
    _CrashTrace(session)
    _WatchGates(session)
    for name, step in (trace.MI_STEPS | watchgates.MI_STEPS).items():
        _MiTrace(name, session, step)
    _PerCpu(session)
    _Gate(session)
    _registered.append(session)
