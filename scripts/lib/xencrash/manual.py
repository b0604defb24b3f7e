"""The manual page and the shells' completions, made from the parser when a wheel is built (setup.py).

By argparse-manpage and shtab, of which this is the only importer, when it is asked: the command does not need them.
"""

from __future__ import annotations

from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator

from xen_symbols.version import VERSION
from xencrash import commands
from xencrash.lazy import load
from xencrash.subcommands import whole

NAME = "xencrash"
# What completes an argument, by the name that its help gives it: shtab's word for it.
_COMPLETES = {**dict.fromkeys(("FILE", "TARGET", "DUMP", "REPORT", "SOCKET"), "FILE"), "DIR": "DIRECTORY"}
# Where each shell looks, below the prefix of an installation.
COMPLETIONS = {
    "bash": f"share/bash-completion/completions/{NAME}",
    "zsh": f"share/zsh/site-functions/_{NAME}",
    "fish": f"share/fish/vendor_completions.d/{NAME}.fish",
}
PAGE = f"share/man/man1/{NAME}.1"


def files() -> dict[str, str]:
    """The text of each file, by its path below the prefix."""
    return {PAGE: page(), **{path: completion(shell) for shell, path in COMPLETIONS.items()}}


def completion(shell: str) -> str:
    """What bash, zsh or fish reads to complete the command."""
    parser, shtab = whole(commands, NAME), load("shtab")
    for each in _every(parser):
        for action in each._actions:
            if action.metavar in _COMPLETES and action.choices is None:
                action.complete = getattr(shtab, _COMPLETES[action.metavar])  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def page() -> str:
    """xencrash(1), as roff in ASCII."""
    parser = whole(commands, NAME)
    parser.man_short_description = f"{commands.__doc__}".strip().rstrip(".")  # type: ignore[attr-defined]
    parser._positionals.title = "commands"
    about = {"project_name": NAME, "version": VERSION, "manual_title": "User commands"}
    text = str(load("argparse_manpage.manpage:Manpage")(parser, format="single-commands-section", _data=about))
    # The library calls an epilog comments, and fills its lines.
    text = text.replace(".SH COMMENTS\n", ".SH TARGETS AND EXIT STATUS\n.nf\n") + "\n.fi"
    return "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in text) + "\n"


def _every(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for below in action.choices.values():
                yield from _every(below)
