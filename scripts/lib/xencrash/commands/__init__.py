"""Validate the crash path of x86 Xen: live in QEMU, stage by stage, or in a dump."""

from __future__ import annotations

from argparse import ArgumentParser

from xen_symbols.version import VERSION
from xencrash.options import ANY_TARGET, JUDGED
from xencrash.subcommands import Command, add_commands

COMMANDS = {
    "trace": Command("xencrash.commands.trace", "follow a crash live, stage by stage, and judge each"),
    "check": Command("xencrash.commands.check", "judge the present state of a dump, or of a stopped live machine"),
    "preflight": Command("xencrash.commands.preflight", "would a crash work? For a running Xen, before one is needed"),
    "gdb": Command("xencrash.commands.gdb", "an interactive gdb with the plugin loaded"),
    "info": Command(
        "xencrash.commands.info", "what this is: format, notes, CPUs, symbols, build-id, generation and evidence"
    ),
    "summary": Command("xencrash.commands.summary", "why Xen crashed and where, on a page for a bug report"),
    "render": Command("xencrash.commands.render", "a JSON report in another format: html, table, junit"),
    "log": Command("xencrash.commands.log", "Xen's console, from its ring in memory"),
    "lab": Command("xencrash.lab.commands", "real Xen, or a reference guest, in QEMU"),
}
EPILOG = f"{ANY_TARGET}\n\n{JUDGED}"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"xencrash {VERSION}")
    add_commands(parser, COMMANDS, "COMMAND")
