"""Start gdb with the xen commands, the symbols and the target loaded.
Arguments after -- go to gdb.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from xen_symbols.formats.compression import STANDARD
from xen_symbols.formats.content import File
from xen_symbols.formats.magics import recognised
from xen_symbols.symbols.elf import SOURCE as ELF_TABLE
from xen_symbols.symbols.elfwrite import symbol_file
from xen_symbols.symbols.load import load_symbols, unpacked
from xen_symbols.symbols.table import SymbolTable
from xencrash.gdbprogram import find_gdb, gdb_arguments, path_for_gdb, plugin_script, plugin_settings
from xencrash.judging import open_xen
from xencrash.options import ANY_TARGET, Request, add_given, add_target, parse_live, request
from xencrash.serve import GDB_SETTINGS, served, serving

EPILOG = f"""\
{ANY_TARGET}

exit status:
  gdb's own, or
  2  bad usage     3  no gdb, or a file or socket cannot be opened (the reason is on standard error)
"""


def add_options(parser: ArgumentParser) -> None:
    add_target(parser)
    add_given(parser)
    parser.set_defaults(gdb_arguments=[])  # those after --


def run(args: Namespace) -> int:
    """gdb's own exit status. Raises Undecidable when there is no gdb, or the dump cannot be served."""
    asked = request(args, symbols_may_follow=True)
    command = [find_gdb(), *gdb_arguments()]
    with _target(asked) as (place, settings, table), _symbol_files(asked.symbols, table) as (ours, gdbs):
        words = [f"source {plugin_script()}"]
        words += [f"set xen {name} {value}" for name, value in plugin_settings(ours, asked.qmp, asked.given).items()]
        words += [*settings, f"target remote {place}"]
        for word in words:
            command += ["-ex", word]
        command += args.gdb_arguments
        if gdbs:
            command.append(gdbs)
        return _wait(command)


@contextlib.contextmanager
def _target(asked: Request) -> Iterator[tuple[str, tuple[str, ...], SymbolTable | None]]:
    """(where gdb connects to, what to set before, the symbols if they are known by now): the machine's stub, or a dump
    served on a private socket."""
    if asked.live:
        yield parse_live(asked.target), (), load_symbols(asked.symbols) if asked.symbols else None
        return
    memory = open_xen(asked)
    with serving(served(memory, asked.base, asked.maps)) as socket:
        yield socket, GDB_SETTINGS, memory.symbols


@contextlib.contextmanager
def _symbol_files(path: str | None, table: SymbolTable | None) -> Iterator[tuple[str | None, str | None]]:
    """(what the xen commands load, what gdb itself loads), as long as gdb runs.

    The first is the file given, under a name that gdb can hand to Python. The second is xen-syms as it is or unpacked,
    anything else as an ELF file of the same names.
    """
    if table is None:
        yield None, None
        return
    with tempfile.TemporaryDirectory(prefix="xencrash-") as folder:
        given = _given(path, Path(folder)) if path else (None, None)
        if path and table.source == ELF_TABLE:
            yield given
            return
        whose = f"of {path}" if path else "that Xen carries in its image"
        print(f"xencrash: gdb has the symbols {whose}, and no types; use xen bt for Xen's stacks", file=sys.stderr)
        made = Path(folder) / "xen-syms"
        made.write_bytes(symbol_file(table))
        yield given[0], str(made)


def _given(path: str, folder: Path) -> tuple[str, str]:
    """(the file, the same unpacked)."""
    file = File(path)
    kind = recognised(file)
    content = unpacked(file)
    plain = path_for_gdb(path, folder)
    if content is file:
        return plain, plain
    made = folder / "unpacked"
    made.write_bytes(content.read(0, content.size))
    needs_package = kind is not None and kind.packed not in STANDARD  # which gdb's own Python may not have
    return str(made) if needs_package else plain, str(made)


def _wait(command: list[str]) -> int:
    """Ctrl-C is gdb's alone: it interrupts the machine, not us."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, check=False, preexec_fn=_default_interrupt).returncode
    finally:
        signal.signal(signal.SIGINT, previous)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
