"""What a build's symbols do not name of all that is looked up in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.checks import ENTRY_POINTS
from xen_symbols.crashpath.generations import Bookkeeping, Generation, Hook
from xen_symbols.crashpath.position import anchor_address
from xen_symbols.crashpath.stages import STAGES
from xen_symbols.symbols.table import DATA, TEXT, SymbolTable
from xen_symbols.xen.state import SYSTEM


class Missing(NamedTuple):
    """The names that one thing has had, newest first: the symbols hold none of them. Without a stage's anchor a trace
    does not stop at that `stage`; without another, what is read through it is unknown."""

    names: tuple[str, ...]
    stage: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "stage": self.stage}


# Besides the variables of SYSTEM: what leads to page tables, CPUs, their gates and TSS, notes and the console ring.
_BESIDES = (
    ("idle_pg_table",), ("nr_cpu_ids",), ("__per_cpu_offset",), ("__per_cpu_start",), ("x86_cpu_to_apicid",),
    ("per_cpu__idt", "idt_tables"), ("per_cpu__tss_page", "per_cpu__init_tss"), ("crash_notes",),
    ("conring",), ("conring_size",), ("conringc",), ("conringp",),
)  # fmt: skip

# What some generations do not have: that their symbols lack it is as it should be.
_ONLY_IN: dict[str, Callable[[Generation], bool]] = {
    "waiting_mask": lambda generation: generation.bookkeeping is Bookkeeping.MASK,
    "waiting_count": lambda generation: generation.bookkeeping is Bookkeeping.COUNT,
    "crash_owner": lambda generation: generation.bookkeeping is Bookkeeping.MASK,
    "exception_table_nmi": lambda generation: generation.hook is Hook.EXCEPTION_TABLE,
    "fred": lambda generation: False,  # a build without it has no FRED
}
_SAVE_DONE, _NOP = ("per_cpu__crash_save_done",), ("trap_nop",)


def missing(symbols: SymbolTable, generation: Generation | None) -> list[Missing]:
    """In the order in which they come to be read; of what not every generation has, what `generation` has."""
    variables = [*_BESIDES]
    variables += [row.names for row in SYSTEM if row.field not in _ONLY_IN or _has(generation, _ONLY_IN[row.field])]
    if _has(generation, lambda known: known.has_save_done):
        variables.append(_SAVE_DONE)
    entries = [row.names for row in ENTRY_POINTS if row.names != _NOP or _has(generation, lambda known: known.swaps_mc)]
    named = [(names, DATA) for names in variables] + [(names, TEXT) for names in entries]
    return [Missing(names) for names, kinds in named if not any(_held(symbols, name, kinds) for name in names)] + [
        Missing(stage.anchors, stage.id) for stage in STAGES if anchor_address(symbols, stage) is None
    ]


def _has(generation: Generation | None, test: Callable[[Generation], bool]) -> bool:
    return generation is not None and test(generation)


def _held(symbols: SymbolTable, name: str, kinds: str) -> bool:
    try:
        return symbols.get(name, kinds) is not None
    except Unreadable:  # ambiguous, or there are text symbols only
        return False
