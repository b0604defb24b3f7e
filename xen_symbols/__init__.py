"""What x86 Xen looks like in memory when it crashes. Never imports gdb."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["evaluate", "open_dump"]

if TYPE_CHECKING:
    from xen_symbols.api import evaluate, open_dump


def __getattr__(name: str) -> object:
    """The API is imported when it is asked for: importing the package costs nothing."""
    if name in __all__:
        from xen_symbols import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
