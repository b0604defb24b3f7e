"""Sub-commands: a table of rows, each a module or a package.

Its docstring is its help, and `EPILOG` the end of that; `add_options(parser)` adds what it takes; `run(args)` does it,
and returns the exit status. One that has sub-commands itself has their table, `COMMANDS`, instead of `run`, and may
have `around(run, args)`, by which each of them is run.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter, _SubParsersAction
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from xen_symbols.records import NamedTuple
from xen_symbols.text import escaped
from xencrash.lazy import load


class Command(NamedTuple):
    """One sub-command: its module, imported when it is asked for, and what the list of commands says of it."""

    module: str
    summary: str


Commands = Mapping[str, Command]  # by name


def find(module: Any, name: str, words: Sequence[str]) -> tuple[ArgumentParser, Sequence[str]]:
    """The parser of the sub-command that the words begin with, and the words that are left for it.

    Where they begin with none it is `module`'s own, which has --help, and says what is wrong.
    """
    commands: Commands = getattr(module, "COMMANDS", {})
    if not words or words[0] not in commands:
        return _parser(module, name), words
    parser, left = find(load(commands[words[0]].module), f"{name} {words[0]}", words[1:])
    if hasattr(module, "around"):
        parser.set_defaults(run=partial(module.around, parser.get_default("run")))
    return parser, left


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """What was typed is quoted so that no terminal obeys it."""
        super().error(escaped(message))


# Each option is tried in a formatter when it is added. One that has to ask for the width of the terminal imports
# shutil, with its archives: a twentieth of judging a vmcore (docs/benchmarks.md).
_UNSHOWN = partial(RawDescriptionHelpFormatter, width=80)


def _parser(module: Any, name: str) -> ArgumentParser:
    return _defined(_Parser(prog=name, formatter_class=_UNSHOWN), module)


def _defined(parser: ArgumentParser, module: Any) -> ArgumentParser:
    """The parser with what its module says of it."""
    parser.description, parser.epilog = module.__doc__, module.EPILOG
    parser.formatter_class = _UNSHOWN
    module.add_options(parser)
    parser.formatter_class = RawDescriptionHelpFormatter
    if not hasattr(module, "COMMANDS"):
        parser.set_defaults(run=module.run)
    return parser


def add_commands(parser: ArgumentParser, commands: Commands, metavar: str) -> None:
    """The list of sub-commands for the help of a parser, which takes none but these."""
    rows = parser.add_subparsers(metavar=metavar, required=True)
    for name, command in commands.items():
        rows.add_parser(name, help=command.summary)


def every(module: Any, name: str) -> Iterator[ArgumentParser]:
    """The parsers of a module and of all sub-commands below it."""
    yield _parser(module, name)
    for row, command in getattr(module, "COMMANDS", {}).items():
        yield from every(load(command.module), f"{name} {row}")


def whole(module: Any, name: str) -> ArgumentParser:
    """One parser of a module and of all sub-commands below it, for what is made from all of them."""
    return _with_commands(_parser(module, name), module)


def _with_commands(parser: ArgumentParser, module: Any) -> ArgumentParser:
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):  # add_commands made it
            for name, command in module.COMMANDS.items():
                below = load(command.module)
                _with_commands(_defined(action.choices[name], below), below)
    return parser
