"""Parts of gdb's state that a command changes for a while, and restores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import gdb


@contextlib.contextmanager
def kept_selection() -> Iterator[None]:
    """The selected thread and frame are the same afterwards."""
    thread = gdb.selected_thread()
    level = gdb.selected_frame().level() if thread is not None else 0
    try:
        yield
    finally:
        if thread is not None and thread.is_valid():
            thread.switch()
            with contextlib.suppress(gdb.error):  # the stack may have become shorter
                gdb.execute(f"frame {level}", to_string=True)


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """One of gdb's settings has another value inside."""
    before = gdb.parameter(name)
    if isinstance(before, bool):
        before = "on" if before else "off"
    gdb.execute(f"set {name} {value}", to_string=True)
    try:
        yield
    finally:
        gdb.execute(f"set {name} {before}", to_string=True)
