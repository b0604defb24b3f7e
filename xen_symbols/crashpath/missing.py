"""Which of the symbols that are looked up a build lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xen_symbols.absence import Unreadable
from xen_symbols.crashpath import timeline
from xen_symbols.crashpath.generations import GENERATIONS, Generation
from xen_symbols.crashpath.position import anchor_address
from xen_symbols.crashpath.stages import STAGES
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, TEXT, SymbolTable
from xen_symbols.xen.idt import ENTRY_POINTS
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

_NEVER_MISSED = ("fred",)  # a build without it has no FRED
_SAVE_DONE, _NOP = ("per_cpu__crash_save_done",), ("trap_nop",)


def missing(symbols: SymbolTable, generation: Generation | None) -> list[Missing]:
    """In the order in which they come to be read; of what not every generation has, what `generation` has."""
    needed = (generation,) if generation else GENERATIONS  # of an unknown one, what every generation has
    variables = [*_BESIDES, *(row.names for row in SYSTEM if _is_needed(row.field, needed))]
    if all(timeline.exists_in(timeline.SAVE_DONE, each) for each in needed):
        variables.append(_SAVE_DONE)
    nop = all(timeline.needs_code(*_NOP, each) for each in needed)
    entries = [row.names for row in ENTRY_POINTS if row.names != _NOP or nop]
    named = [(names, DATA) for names in variables] + [(names, TEXT) for names in entries]
    return [Missing(names) for names, kinds in named if not any(_held(symbols, name, kinds) for name in names)] + [
        Missing(stage.anchors, stage.id) for stage in STAGES if anchor_address(symbols, stage) is None
    ]


def _is_needed(field: str, generations: Sequence[Generation]) -> bool:
    """Whether each of these generations has a variable; those that the path does not write, every Xen has."""
    written = timeline.BY_FIELD.get(field)
    if written is None:
        return field not in _NEVER_MISSED
    return all(timeline.exists_in(written, generation) for generation in generations)


def _held(symbols: SymbolTable, name: str, kinds: str) -> bool:
    try:
        return symbols.get(name, kinds) is not None
    except Unreadable:  # ambiguous, or there are text symbols only
        return False
