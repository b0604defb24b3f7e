"""The `xen` commands in gdb. `register()` adds them; importing this does nothing."""

from __future__ import annotations


def register() -> None:
    """Add the commands, convenience functions, settings and MI commands to this gdb, once."""
    from gdbplugin.register import register as add

    add()
