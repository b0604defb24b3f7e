"""`xencrash gdb`: an interactive gdb with the plugin, the symbols and the target loaded."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from xen_symbols.absence import Undecidable
from xen_symbols.api import open_dump
from xencrash.cli import is_live, searching
from xencrash.session import find_gdb, gdb_arguments, parse_live, plugin_script


def run(args: argparse.Namespace) -> int:
    """gdb's own exit status. Raises Undecidable when there is no gdb, or the dump cannot be served."""
    command = [find_gdb(), *gdb_arguments()]
    with _target(args) as (place, settings):
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
        if args.symbols and _is_elf64(args.symbols):
            command.append(str(Path(args.symbols).absolute()))
        return _wait(command)


@contextlib.contextmanager
def _target(args: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(where gdb connects to, what to set before): the machine's stub, or a dump served on a private socket."""
    if is_live(args.target):
        yield parse_live(args.target), ()
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
        yield socket, GDB_SETTINGS


def _is_elf64(path: str) -> bool:
    """xen-syms; the 32-bit image would make gdb take the machine for an i386."""
    try:
        with Path(path).open("rb") as file:
            return file.read(5) == b"\x7fELF\x02"
    except OSError as error:
        raise Undecidable(f"{path}: {error.strerror}; --symbols takes xen-syms, its .map, or Xen's image") from None


def _wait(command: list[str]) -> int:
    """Ctrl-C is gdb's alone: it interrupts the machine, not us."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, check=False, preexec_fn=_default_interrupt).returncode
    finally:
        signal.signal(signal.SIGINT, previous)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
