"""`xencrash gdb`: an interactive gdb with the plugin, the symbols and the target loaded."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xen_symbols.api import open_dump
from xen_symbols.symbols.elf import SOURCE as ELF_TABLE
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable
from xencrash.cli import is_live, searching
from xencrash.gdbmi import find_gdb, gdb_arguments, parse_live, plugin_script


def run(args: argparse.Namespace) -> int:
    """gdb's own exit status. Raises Undecidable when there is no gdb, or the dump cannot be served."""
    command = [find_gdb(), *gdb_arguments()]
    with _target(args) as (place, settings, table), _symbol_file(args.symbols, table) as symbols:
        words = [f"source {plugin_script()}"]
        if args.symbols:
            words.append(f"set xen symbols {Path(args.symbols).absolute()}")
        if args.qmp:
            words.append(f"set xen qmp-socket {Path(args.qmp).absolute()}")
        if args.allow_build_id_mismatch:
            words.append("set xen allow-build-id-mismatch on")
        words += [*settings, f"target remote {place}"]
        for word in words:
            command += ["-ex", word]
        command += args.gdb_arguments
        if symbols:
            command.append(symbols)
        return _wait(command)


@contextlib.contextmanager
def _target(args: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...], SymbolTable | None]]:
    """(where gdb connects to, what to set before, the symbols if they are known by now): the machine's stub, or a dump
    served on a private socket."""
    if is_live(args.target):
        yield parse_live(args.target), (), load_symbols(args.symbols) if args.symbols else None
        return
    from xencrash.serve import GDB_SETTINGS, served, serving

    memory = open_dump(
        args.target,
        args.symbols,
        base=args.base,
        allow_mismatch=args.allow_build_id_mismatch,
        progress=searching(args.target),
    )
    with serving(served(memory, args.base)) as socket:
        yield socket, GDB_SETTINGS, memory.symbols


@contextlib.contextmanager
def _symbol_file(path: str | None, table: SymbolTable | None) -> Iterator[str | None]:
    """What gdb itself can load: xen-syms as it is, anything else as an ELF file of the same names while gdb runs."""
    if table is None:
        yield None
    elif path and table.source == ELF_TABLE:
        yield str(Path(path).absolute())
    else:
        from xen_symbols.symbols.elfwrite import symbol_file

        whose = f"of {path}" if path else "that Xen carries in its image"
        print(f"xencrash: gdb has the symbols {whose}, and no types; xen bt knows Xen's stacks", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="xencrash-") as folder:
            file = Path(folder) / "xen-syms"
            file.write_bytes(symbol_file(table))
            yield str(file)


def _wait(command: list[str]) -> int:
    """Ctrl-C is gdb's alone: it interrupts the machine, not us."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, check=False, preexec_fn=_default_interrupt).returncode
    finally:
        signal.signal(signal.SIGINT, previous)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
