"""The project's NamedTuple does what typing's does."""

from __future__ import annotations

import copy
import pickle
import typing
from typing import Any

import pytest

from xen_symbols import records


class Plain(records.NamedTuple):
    """Has a docstring."""

    first: int
    second: str = "two"
    third: tuple[int, ...] = ()

    @property
    def both(self) -> str:
        return f"{self.first} {self.second}"

    def more(self) -> Plain:
        return self._replace(first=self.first + 1)


class Model(typing.NamedTuple):
    """Has a docstring."""

    first: int
    second: str = "two"
    third: tuple[int, ...] = ()


class Empty(records.NamedTuple):
    pass


@pytest.mark.parametrize(
    "words",
    [((1,), {}), ((1, "b"), {}), ((), {"first": 1, "third": (2,)}), ((1,), {"second": "x"}), ((1, "b", (3,)), {})],
)
def test_it_is_made_and_read_as_typings(words: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    positional, named = words
    mine, model = Plain(*positional, **named), Model(*positional, **named)
    assert mine == model and hash(mine) == hash(model) and len(mine) == 3
    assert (mine.first, mine.second, mine.third) == (model.first, model.second, model.third)
    assert mine._asdict() == model._asdict()
    assert repr(mine) == repr(model).replace("Model", "Plain")
    assert mine._replace(second="y") == model._replace(second="y")
    assert Plain._make(model) == mine and type(Plain._make(model)) is Plain
    assert (mine.both, mine.more().first) == (f"{mine.first} {mine.second}", mine.first + 1)
    for again in (copy.copy(mine), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert again == mine and type(again) is Plain
    match mine:
        case Plain(first, second, third):
            assert (first, second, third) == tuple(mine)


def test_what_a_class_says_of_itself() -> None:
    assert (Plain._fields, Plain._field_defaults) == (Model._fields, Model._field_defaults)
    assert (Plain.__doc__, Plain.__name__, Plain.__module__) == ("Has a docstring.", "Plain", __name__)
    assert Plain.__match_args__ == Model.__match_args__
    assert issubclass(Plain, tuple) and not hasattr(Plain(1), "__dict__")
    assert (Empty(), Empty._fields) == ((), ())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda kind: kind(),
        lambda kind: kind(1, "b", (), 4),
        lambda kind: kind(1, fourth=4),
        lambda kind: kind(1, first=2),
    ],
)
def test_wrong_values_are_refused(wrong: Any) -> None:
    for kind in (Plain, Model):
        with pytest.raises(TypeError):
            wrong(kind)


def test_an_unknown_field_cannot_be_replaced_nor_one_be_set() -> None:
    for made in (Plain(1), Model(1)):
        with pytest.raises((ValueError, TypeError), match="unexpected field names: \\['fourth'\\]"):
            made._replace(fourth=4)
        with pytest.raises(AttributeError):
            made.first = 2  # type: ignore[misc]


def test_a_field_without_a_default_behind_one_with_a_default() -> None:
    with pytest.raises(TypeError):
        records.NamedTuple.__class__("Wrong", (records.NamedTuple,), {"__annotations__": {"a": int, "b": int}, "a": 1})
