"""The xen commands, in one table: each row is beside the function that answers it, in a module for its subject.

An answer uses the names of the JSON contract; addresses are hex strings. Nothing here knows gdb.
"""

from __future__ import annotations

from gdbplugin.commands import cpus, crashpath, following, hypervisor, watching, x86
from gdbplugin.declare import Command

COMMANDS: tuple[Command, ...] = (
    *x86.COMMANDS, *cpus.COMMANDS, *hypervisor.COMMANDS, *crashpath.COMMANDS, *following.COMMANDS, *watching.COMMANDS,
)  # fmt: skip
