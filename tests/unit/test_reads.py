"""Batches of reads: each answer belongs to its question, whatever else was asked, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines.recorded import load, names
from xen_symbols.absence import Absent, Kind
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import Batch
from xen_symbols.xen.state import read_state

HOLE = range(0x8000, 0x9000)
NULL = Absent("it is null", Kind.NOT_APPLICABLE)


class Memory:
    """Every byte shows its address, except in a hole; each batch is one call, whose requests are recorded."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, int]]] = []

    def read_many(self, requests: Iterable[tuple[int, int]]) -> list[bytes | Absent]:
        self.calls.append(list(requests))
        return [self.content(*request) for request in self.calls[-1]]

    def content(self, address: int, size: int) -> bytes | Absent:
        if address + size > HOLE.start and address < HOLE.stop:
            return Absent(f"{address:#x} is in the hole")
        return bytes((address + at) * 37 >> 3 & 0xFF for at in range(size))


def batch() -> tuple[Batch, Memory]:
    memory = Memory()
    return Batch(memory), memory  # type: ignore[arg-type]


QUESTIONS = st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 64)), max_size=30)


@given(QUESTIONS, st.data())
def test_answers_do_not_depend_on_what_else_is_asked(questions: list[tuple[int, int]], data: st.DataObject) -> None:
    others = data.draw(QUESTIONS)
    order = data.draw(st.permutations([*((True, q) for q in questions), *((False, q) for q in others)]))
    asking, memory = batch()
    asked = [(ours, question, asking.ask(*question)) for ours, question in order]
    asking.read()
    answers = {question: handle.answer for ours, question, handle in asked if ours}
    assert answers == {question: memory.content(*question) for question in questions}
    assert len(memory.calls) == 1


def test_there_is_no_answer_before_the_batch_is_read() -> None:
    asking, _ = batch()
    asked = asking.ask(0x1000, 4)
    with pytest.raises(AttributeError):
        asked.read(len, "x")
    asking.read()
    assert asked.read(len, "x").value == 4


def test_a_batch_asks_once() -> None:
    asking, memory = batch()
    first = asking.ask(0x1000, 4)
    asking.read()
    second = asking.ask(0x2000, 4)
    asking.read()
    assert memory.calls == [[(0x1000, 4)], [(0x2000, 4)]]
    assert (first.answer, second.answer) == (memory.content(0x1000, 4), memory.content(0x2000, 4))


def test_what_has_no_address_is_not_asked_for() -> None:
    asking, memory = batch()
    asked = asking.ask(Absent("no symbol", Kind.NO_SYMBOL), 8)
    asking.read()
    assert memory.calls == [[]]
    assert asked.read(len, "x").value == Absent("no symbol", Kind.NO_SYMBOL)


def test_a_part_is_at_its_own_address() -> None:
    asking, memory = batch()
    whole, lost = asking.ask(0x1000, 32), asking.ask(HOLE.start - 8, 32)
    asking.read()
    read = whole.part(8, 4).read(bytes.hex, "array[2]")
    raw = memory.content(0x1008, 4)
    assert isinstance(raw, bytes)
    assert (read.value, read.address, read.raw, read.symbol) == (raw.hex(), 0x1008, raw, "array[2]")
    assert lost.part(0, 4).answer == lost.answer == Absent("0x7ff8 is in the hole")


@pytest.mark.parametrize(
    ("word", "asked", "answer"),
    [
        (0x4000, [(0x4010, 8)], None),
        (0, [], NULL),
        (HOLE.start, [(HOLE.start + 0x10, 8)], Absent("0x8010 is in the hole")),
        (-8 % (1 << 64), [(0x8, 8)], None),  # addresses wrap, as the machine's do
    ],
)
def test_a_pointer_is_followed(word: int, asked: list[tuple[int, int]], answer: Absent | None) -> None:
    asking, memory = batch()
    pointer = asking.ask(0x1000, 8)
    asking.read()
    pointer.answer = word.to_bytes(8, "little")
    found = asking.follow(pointer, 0x10, 8, NULL)
    asking.read()
    assert memory.calls[-1] == asked
    assert found.answer == (answer or memory.content(*asked[0]))


def test_an_unread_pointer_leads_nowhere() -> None:
    asking, memory = batch()
    pointer = asking.ask(HOLE.start, 8)
    asking.read()
    assert asking.follow(pointer, 0, 8, NULL).answer == pointer.answer == memory.content(HOLE.start, 8)


class Shuffled(Batch):
    """Reads in another order, and more than it was asked for."""

    def read(self) -> None:
        more = [self.ask(asked.address + 1, 3) for asked in self._asked[:5]]
        self._asked = [*more, *reversed(self._asked[: -len(more) or None])]
        super().read()


@pytest.mark.parametrize("name", names())
def test_a_state_does_not_depend_on_the_order_of_its_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memories: Sequence[XenMemory] = [locate(*load(name)) for _ in range(2)]
    plain = read_state(memories[0])
    monkeypatch.setattr("xen_symbols.xen.state.Batch", Shuffled)
    shuffled = read_state(memories[1])
    assert (shuffled.system, shuffled.cpus, shuffled.unmatched) == (plain.system, plain.cpus, plain.unmatched)
    assert len(plain.cpus) > 1
