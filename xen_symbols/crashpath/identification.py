"""Which generation the crash path of a Xen is, by what holds for it; where none fits, which are nearest.

Every row's evidence is tried; exactly one row must hold. A path that none fits, a patched one perhaps, is not judged by
another's rules: what depends on no generation is judged all the same (checks/model.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath import timeline
from xen_symbols.crashpath.generations import (
    BY_ID,
    GENERATIONS,
    Evidence,
    Generation,
    code_references,
    either,
    has,
    lacks,
)
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.functions import names_no_variables
from xen_symbols.symbols.table import DATA, TEXT
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import SYSTEM

_NEAREST = 3  # that are named
_DIFFERENCES = 4  # of each


class Near(NamedTuple):
    """How near a generation comes: `holds` of the statements about it hold, and `differs` are those that do not."""

    generation: Generation
    holds: int
    differs: tuple[str, ...]


class Identification(NamedTuple):
    """Which generation a Xen is, and the statements that say so; `given` where it was not recognised by them.

    Without one, `reason` is a line that says why and what to do, and `nearest` ranks some.
    """

    generation: Generation | None
    evidence: tuple[str, ...] = ()
    given: bool = False
    reason: str = ""
    nearest: tuple[Near, ...] = ()


def identify(memory: XenMemory) -> Identification:
    """The one generation whose evidence all holds, if there is one; one that was given is taken, whatever holds.

    Raises Undecidable for a given id that there is not, and for symbols that name functions only.
    """
    if memory.given_generation is not None:
        return _given(memory, memory.given_generation)
    holding: list[Generation] = []
    unread: list[str] = []
    for generation in GENERATIONS:
        reasons = []
        for evidence in generation.evidence:
            try:
                if not evidence.test(memory):
                    break
            except Unreadable as error:
                reasons.append(f"{evidence.says}: {error.absent}")
        else:
            if reasons:
                unread.append(f"{generation.id} ({'; '.join(reasons)})")
            else:
                holding.append(generation)
    if len(holding) == 1 and not unread:
        return Identification(holding[0], tuple(evidence.says for evidence in holding[0].evidence))
    if unread and memory.symbols.text_only:
        raise Undecidable(names_no_variables(memory.symbols))
    near = nearest(memory)
    return Identification(None, reason=_why_none(memory, holding, unread, near), nearest=near)


def _given(memory: XenMemory, name: str) -> Identification:
    if name not in BY_ID:
        raise Undecidable(f"--generation {name}: the generations are {', '.join(BY_ID)}")
    evidence = BY_ID[name].evidence
    statements = [item.says if _holds(item, memory) else f"not so: {item.says}" for item in evidence]
    return Identification(BY_ID[name], tuple(statements), given=True)


def _why_none(memory: XenMemory, holding: list[Generation], unread: list[str], near: tuple[Near, ...]) -> str:
    names = ", ".join(generation.id for generation in holding)
    if unread:
        possible = "; ".join(filter(None, [names, *unread]))
        return f"the generation of the crash path could not be determined: it may be {possible}"
    if holding:
        return f"the evidence fits several generations of the crash path: {names}; give the right one (--generation)"
    first = [one for one in near if len(one.differs) == len(near[0].differs)]
    words = (f"{one.generation.id} ({counted(one)}; not so: {'; '.join(one.differs[:_DIFFERENCES])})" for one in first)
    return (
        f"no generation of the crash path fits {memory.symbols.path}: is it Xen with kexec support? "
        "A newer Xen needs a row in xen_symbols/crashpath/generations.py; for a patched one give the generation that "
        f"it comes from (--generation) and what it renames (--alias). The nearest: {', '.join(words)}"
    )


def counted(near: Near) -> str:
    """How many of the statements hold."""
    return f"{near.holds} of {near.holds + len(near.differs)} statements hold"


# -- The nearest ------------------------------------------------------------------------------


def nearest(memory: XenMemory) -> tuple[Near, ...]:
    """Some generations, from the one that the fewest statements speak against; what cannot be read does not count."""
    found = []
    for generation in GENERATIONS:
        held = {item.says: _holds(item, memory) for item in statements(generation)}
        differs = tuple(says for says, holds in held.items() if holds is False)
        found.append(Near(generation, sum(holds is True for holds in held.values()), differs))
    return tuple(sorted(found, key=lambda near: (len(near.differs), -near.holds))[:_NEAREST])


def _holds(evidence: Evidence, memory: XenMemory) -> bool | None:
    try:
        return evidence.test(memory)
    except Unreadable:
        return None


def statements(generation: Generation) -> tuple[Evidence, ...]:
    """All that can be said of a Xen of this generation: its evidence, and what its path calls and writes."""
    return (*generation.evidence, *_functions(generation), *_variables(generation), *_others(generation))


def _functions(generation: Generation) -> Iterator[Evidence]:
    for name in dict.fromkeys(str(write.to) for write in timeline.PATH if isinstance(write.to, timeline.Code)):
        needed = timeline.needs_code(name, generation) or generation.parks_in == name
        yield has(name, TEXT) if needed else lacks(name, TEXT)


def _variables(generation: Generation) -> Iterator[Evidence]:
    names = {row.field: row.names for row in SYSTEM}
    for written in (timeline.WAITING_COUNT, timeline.WAITING_MASK):
        for name in names[written.field]:
            yield has(name) if timeline.makes(written, generation) else lacks(name)
    if timeline.exists_in(timeline.CRASH_OWNER, generation):
        yield has(names[timeline.CRASH_OWNER.field][0])
    yield has(_SAVE_DONE) if generation.has_save_done else lacks(_SAVE_DONE)
    per_cpu = _OWN_IDT.says in {item.says for item in generation.evidence}
    yield from (_OWN_IDT, lacks("idt_tables", DATA)) if per_cpu else (lacks(_IDT), has("idt_tables", DATA))


_SAVE_DONE, _IDT = "per_cpu__crash_save_done", "per_cpu__idt"
_OWN_IDT = has(_IDT, DATA)


def _others(generation: Generation) -> Iterator[Evidence]:
    table, dummy = ("exception_table", DATA), ("dummy_nmi_callback", TEXT)
    if dummy[0] in generation.idle_callbacks:  # until e7f147bf4a (4.17.0)
        yield either(has(*table), has(*dummy))
    else:
        yield from (lacks(*table), lacks(*dummy))
    if generation.own_nmi_gate:
        yield code_references("machine_crash_shutdown", "trap_nop")
