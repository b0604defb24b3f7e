"""Absence as a value with a reason: what could not be read is never a zero."""

from __future__ import annotations

import enum

from xen_symbols.records import NamedTuple


class Kind(enum.Enum):
    """Why a value is absent. A check's verdict follows from this alone."""

    UNREAD = "unread"  # could have been read but was not: a check is `unknown`
    NOT_HELD = "not held"  # this kind of target cannot hold it: a check is `skip`
    NO_SYMBOL = "no symbol"  # the symbols at hand do not name it: a check is `unknown`
    NOT_APPLICABLE = "not applicable"  # this Xen has no such thing: a check is `skip`


class Absent(NamedTuple):
    """An absent value. `reason` is one clause that says why."""

    reason: str
    kind: Kind = Kind.UNREAD

    def __str__(self) -> str:
        return self.reason


class Unreadable(Exception):
    """A value was asked for and is absent; carries the Absent."""

    def __init__(self, reason: str | Absent, kind: Kind = Kind.UNREAD) -> None:
        self.absent = reason if isinstance(reason, Absent) else Absent(reason, kind)
        super().__init__(self.absent.reason)


class Undecidable(Exception):
    """The question cannot be answered for this input: exit status 3.

    The message is one line that says what is wrong and what to do.
    """
