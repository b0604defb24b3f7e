"""Binds the declared commands to gdb: command line, machine interface, settings and convenience functions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gdb

from gdbplugin.commands import COMMANDS
from gdbplugin.declare import ERRORS, Argument, Command, Setting, Step, usage
from gdbplugin.session import Session
from gdbplugin.settings import FUNCTIONS, SETTINGS
from xen_symbols.absence import Undecidable
from xen_symbols.report.blocks import Block
from xen_symbols.report.console import coloured, plain
from xen_symbols.text import escaped
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
    """Errors that are not bugs of the plugin reach the user as one line."""
    try:
        yield
    except (*ERRORS, gdb.error) as error:
        raise gdb.GdbError(escaped(" ".join(str(error).split()))) from None


class _Words:
    """Converts arguments as typed to those of an answer."""

    def __init__(self, session: Session, name: str, arguments: Sequence[Argument]) -> None:
        self._session = session
        self._usage = usage(name, arguments)
        self._options = {a.name.split()[0]: a for a in arguments if a.keyword is not None}
        self._by_place = [a for a in arguments if a.keyword is None]

    def parse(self, words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments, and the others by keyword."""
        left, places, keywords = list(words), [], {}
        while left:
            word = left.pop(0)
            option = self._options.get(word)
            if option is None:
                places.append(word)
            elif option.kind == "flag":
                keywords[str(option.keyword)] = True
            else:
                keywords[str(option.keyword)] = self._value(option, left.pop(0) if left else "")
        needed = sum(not argument.optional for argument in self._by_place)
        if not needed <= len(places) <= len(self._by_place):
            raise Undecidable(f"usage: {self._usage}")
        return [self._value(a, word) for a, word in zip(self._by_place, places, strict=False)], keywords

    def _value(self, argument: Argument, word: str) -> Any:
        if argument.kind in ("percpu", "word"):
            return word
        if argument.kind == "address":
            return self._session.evaluate(word)
        if argument.kind == "seconds":
            return self._seconds(word)
        try:
            return int(word, 0)
        except ValueError:
            try:
                return int(gdb.parse_and_eval(word))
            except gdb.error as error:
                why = str(error).partition("  ")[0]
                raise Undecidable(f"{argument.name} is a number, not {word!r}: {why}") from None

    def _seconds(self, word: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < (seconds := float(word)) < threading.TIMEOUT_MAX:
                return seconds
        raise Undecidable(f"usage: {self._usage}")

    def split(self, text: str) -> list[str]:
        """The words of a command line; an expression keeps its spaces."""
        if self._by_place and self._by_place[-1].kind == "address":
            return [text.strip()] if text.strip() else []
        words: list[str] = gdb.string_to_argv(text)
        return words

    def complete(self, text: str, word: str) -> list[str]:
        position = len(text[: len(text) - len(word)].split())
        if word.startswith("-"):
            return [name for name in self._options if name.startswith(word)]
        if position >= len(self._by_place):
            return []
        kind = self._by_place[position].kind
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
            return []  # nothing to propose: there are no symbols yet, or no machine


class _CliCommand(gdb.Command):
    def __init__(self, session: Session, command: Command) -> None:
        self.__doc__ = command.help
        self._session, self._command = session, command
        self._words = _Words(session, command.name, command.arguments)
        super().__init__(command.name, gdb.COMMAND_RUNNING if command.steps else gdb.COMMAND_DATA)

    def invoke(self, argument: str, from_tty: bool) -> None:
        self.dont_repeat()
        with one_line_errors():
            places, keywords = self._words.parse(self._words.split(argument))
            if self._command.steps:
                keywords["say"] = partial(write_blocks, from_tty=from_tty)
            answer = self._command.answer(self._session, *places, **keywords)
        write_blocks(self._command.blocks(answer), from_tty)

    def complete(self, text: str, word: str | None) -> list[str]:
        return self._words.complete(text, word or "")


class _MiCommand(gdb.MICommand):
    def __init__(self, session: Session, command: Command, name: str, step: Step) -> None:
        self._session, self._step = session, step
        self._words = _Words(session, name if command.steps else command.name, step.arguments)
        super().__init__(name)

    def invoke(self, argv: list[str]) -> dict[str, str]:
        with one_line_errors():
            if self._session.settings["rdmsr"].value:
                raise Undecidable("set xen rdmsr is on: gdb drops the result of an MI command that steps the machine")
            places, keywords = self._words.parse(argv)
            answer = self._step.answer(self._session, *places, **keywords)
            # gdb turns every value in an MI result into a string: the answer travels as one JSON text.
            return {"json": json.dumps(answer, separators=(",", ":"))}


class _PerCpu(gdb.Function):
    __doc__ = FUNCTIONS["xen_per_cpu"]

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("xen_per_cpu")

    def invoke(self, *arguments: gdb.Value) -> gdb.Value:
        with one_line_errors():
            name, cpu = _taken('$xen_per_cpu("NAME", CPU)', arguments, 2)
            try:
                bare = name.string().removeprefix(_PER_CPU)
            except (gdb.error, UnicodeDecodeError):
                raise Undecidable('$xen_per_cpu("NAME", CPU): NAME is a string, in quotes') from None
            with self._session.look() as memory:
                size = memory.symbols.size(_PER_CPU + bare)
                if not size:
                    raise Undecidable(f"{memory.symbols.path} does not say how large {bare} is")
                raw = memory.read(per_cpu_address(memory, bare, _number("CPU", cpu)), size)
            return self._session.value(bare, raw)


class _Gate(gdb.Function):
    __doc__ = FUNCTIONS["xen_gate"]

    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("xen_gate")

    def invoke(self, *arguments: gdb.Value) -> gdb.Value:
        with one_line_errors():
            names, taken = ("CPU", "VECTOR"), _taken("$xen_gate(CPU, VECTOR)", arguments, 2)
            cpu, vector = map(_number, names, taken)
            if not 0 <= vector < gate.IDT_ENTRIES:
                raise Undecidable(f"vector {vector} does not exist: an IDT has {gate.IDT_ENTRIES}")
            with self._session.look() as memory:
                raw = memory.read(idt_address(memory, cpu) + vector * gate.SIZE, gate.SIZE)
            return gdb.Value(gate.decode(raw).handler).cast(gdb.parse_and_eval("(void (*)(void))0").type)


def _taken(call: str, arguments: Sequence[gdb.Value], count: int) -> Sequence[gdb.Value]:
    """The arguments of a convenience function, if their number is right."""
    if len(arguments) != count:
        raise Undecidable(f"usage: {call}")
    return arguments


def _number(name: str, value: gdb.Value) -> int:
    try:
        return int(value)
    except (gdb.error, TypeError, ValueError):
        raise Undecidable(f"{name} is a number, not {value}") from None


def write_blocks(blocks: Sequence[Block], from_tty: bool) -> None:
    """To gdb's output: with colours on a terminal that has them, if rich is installed; else plain."""
    text = None
    if from_tty and _terminal() and not _piped():
        text = coloured(blocks, gdb.parameter("width") or shutil.get_terminal_size().columns)
    gdb.write(plain(blocks) if text is None else text)


def _terminal() -> bool:
    dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("NO_COLOR")
    return os.isatty(1) and not dumb and bool(gdb.parameter("style enabled"))


def _piped() -> bool:
    """Whether gdb's `pipe` command runs this one: gdb does not say so, but then a child process reads our output."""
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
        for name, step in command.mi.items():
            _MiCommand(session, command, name, step)
    _PerCpu(session)
    _Gate(session)
    _registered.append(session)
