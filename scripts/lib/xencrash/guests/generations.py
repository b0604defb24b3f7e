"""The generations that the guest can be, and their features: the rows of generation.h, the one place where they are."""

from __future__ import annotations

import functools
import re
from pathlib import Path

SOURCES = Path(__file__).parent
_COLUMNS = re.compile(r"^/\* COLUMNS +(.*) \*/$", re.MULTILINE)
_ROW = re.compile(r"^#define +(\w+) +ROW\(([^)]*)\)$", re.MULTILINE)


@functools.cache
def generations() -> tuple[str, ...]:
    """Identifiers, oldest first. The place of one is the number of its column in generation.h."""
    header = _COLUMNS.search((SOURCES / "generation.h").read_text())
    assert header, "generation.h names its columns"
    return tuple(header[1].split())


@functools.cache
def _rows() -> dict[str, tuple[int, ...]]:
    text = (SOURCES / "generation.h").read_text()
    return {name: tuple(int(value, 0) for value in values.split(",")) for name, values in _ROW.findall(text)
            if name.isupper() and not name.startswith("ROW")}  # fmt: skip


def feature(generation: str, name: str) -> int:
    """A row of generation.h. Raises KeyError for a row, ValueError for a generation that does not exist."""
    return _rows()[name][generations().index(generation)]


def features() -> tuple[str, ...]:
    """The rows of generation.h, by name."""
    return tuple(_rows())
