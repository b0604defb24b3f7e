"""NamedTuple, made in a sixth of the time.

The one device by which the command starts quickly: it defines some sixty of them, for which typing's compiles a
constructor and checks each annotation, and that was a seventh of judging a vmcore (docs/benchmarks.md). Here those
of one length share one compiled constructor. What the classes do is the same (tests/unit/test_records.py). A module
that defines one has `from __future__ import annotations`, as all have: the names of its fields are known by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    from collections import _tuplegetter  # as namedtuple's own fields
    from functools import cache
    from types import CodeType, FunctionType

    class _Record(tuple):
        """What all of them have."""

        __slots__ = ()

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _replace(self, **changed):
            values = [changed.pop(name, value) for name, value in zip(self._fields, self, strict=True)]
            if changed:
                raise ValueError(f"Got unexpected field names: {list(changed)!r}")
            return tuple.__new__(type(self), values)

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

        def __getnewargs__(self):
            return tuple(self)

    @cache
    def _constructor(length: int) -> CodeType:
        values = "".join(f"_{number}, " for number in range(length))
        return eval(f"lambda _cls, {values}: _new(_cls, ({values}))").__code__

    class _Definition(type):
        def __new__(cls, name, bases, namespace):
            if not bases:
                return super().__new__(cls, name, bases, namespace)
            fields = tuple(namespace.get("__annotations__", ()))
            given = [field for field in fields if field in namespace]
            if given != list(fields[len(fields) - len(given) :]):
                raise TypeError(f"{name}: a field without a default is behind one with a default")
            defaults = {field: namespace.pop(field) for field in given}
            code = _constructor(len(fields)).replace(co_name="__new__", co_varnames=("_cls", *fields))
            new = FunctionType(code, {"_new": tuple.__new__}, "__new__", tuple(defaults.values()))
            new.__qualname__ = f"{name}.__new__"
            getters = {field: _tuplegetter(number, "") for number, field in enumerate(fields)}
            shared = {"__slots__": (), "_fields": fields, "_field_defaults": defaults, "__match_args__": fields}
            return type(name, (_Record,), {**getters, **shared, **namespace, "__new__": new})

    class NamedTuple(metaclass=_Definition):
        """Stands for typing.NamedTuple as a base class."""
