"""`check`, `info` and `trace`: from a TARGET and its symbols to a report."""

from __future__ import annotations

import argparse
from typing import Any

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.symbols.table import load_symbols
from xen_symbols.target.dump import open_dump
from xen_symbols.xen.locate import carried_symbols, locate
from xen_symbols.xen.memory import XenMemory

Json = dict[str, Any]


def open_xen(path: str, symbols: str | None, *, base: int | None = None, allow_mismatch: bool = False) -> XenMemory:
    """Xen in a dump. Raises Undecidable."""
    target = open_dump(path, base=base)
    table = carried_symbols(target) if symbols is None else load_symbols(symbols)
    return locate(target, table, allow_mismatch=allow_mismatch)


def check_dump(path: str, args: argparse.Namespace) -> Json:
    """The report on one dump. Raises Undecidable."""
    memory = open_xen(path, args.symbols, base=args.base, allow_mismatch=args.allow_build_id_mismatch)
    try:
        return evaluate(memory).to_json()
    except Unreadable as error:
        raise Undecidable(f"{path}: {error}") from None
