"""Xen in a dump, for scripts: what `xencrash check` does, in two calls. docs/api.md shows how."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from xen_symbols.crashpath.engine import evaluate
from xen_symbols.symbols.load import load_symbols
from xen_symbols.targets import Map, dump
from xen_symbols.xen.given import Given
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory

__all__ = ["evaluate", "open_dump"]


def open_dump(
    path: str | os.PathLike[str],
    symbols: str | os.PathLike[str] | None = None,
    *,
    base: int | None = None,
    maps: Sequence[tuple[int, int, int]] = (),
    allow_mismatch: bool = False,
    generation: str | None = None,
    aliases: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> XenMemory:
    """Xen in the dump at `path`. Raises Undecidable: one line that says what is wrong and what to do.

    `symbols` is xen-syms, xen.efi, a .map or an image; without it the table that Xen carries is used. `base` is the
    physical address of a raw image's first byte, or `maps` has (physical address, offset in the file, size) of each
    stretch of memory in it. `allow_mismatch` accepts symbols of another build.
    Of a Xen whose crash path was patched `generation` says which it comes from, and `aliases` which names it renames.
    A dump whose notes show no Xen is searched for it; `progress` is called with (bytes searched, bytes in all).
    """
    target = dump.open_dump(os.fspath(path), base=base, maps=[Map(*one) for one in maps])
    if symbols is None:
        from xen_symbols.xen.images import carried_symbols  # where none are given

        table = carried_symbols(target, progress)
    else:
        table = load_symbols(os.fspath(symbols))
    return locate(target, table, Given(generation, aliases or {}, allow_mismatch))
