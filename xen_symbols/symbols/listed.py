"""Symbols as lists, and what can be concluded from them: how a `.map` and the table in Xen's image have them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from xen_symbols.formats.image import Image
from xen_symbols.symbols import buildid
from xen_symbols.symbols.table import Symbol, SymbolTable


class ListedRows:
    """Symbols as lists: addresses, nm letters, and names of which local ones may be `file#name`."""

    def __init__(self, addresses: Sequence[int], kinds: Sequence[str], names: Sequence[str]) -> None:
        self._addresses, self._kinds, self._names = addresses, kinds, names

    @cached_property
    def _bare(self) -> list[str]:
        return [name.rpartition("#")[2] if "#" in name else name for name in self._names]

    def names(self) -> Sequence[str]:
        return self._bare

    def addresses(self) -> Sequence[int]:
        return self._addresses

    def placed(self) -> list[int]:
        return [row for row, kind in enumerate(self._kinds) if kind not in ("A", "a", "U")]

    def symbol(self, row: int) -> Symbol:
        file, _, name = self._names[row].rpartition("#")
        return Symbol(self._addresses[row], name, file or None, self._kinds[row])

    def size(self, row: int) -> int:
        return 0

    def text_only(self) -> bool:
        return not any(kind in "dDbB" for kind in set(self._kinds) - {""})


def image_range(table: SymbolTable) -> tuple[int, int]:
    """(start, end) of the image by the symbols that mark them, else by the first and last symbol."""
    addresses = [table.rows.addresses()[row] for row in table.rows.placed()] or [0]
    starts = table.candidates("_start") + table.candidates("_stext")
    ends = table.candidates("_end")
    return starts[0].address if starts else min(addresses), ends[0].address if ends else max(addresses) + 1


def listed_table(path: str, source: str, rows: ListedRows, image: Image | None = None) -> SymbolTable:
    """A table of listed symbols: where the image lies, and its build-id note, they say themselves."""
    table = SymbolTable(path, source, rows, (), image=image, text_only=rows.text_only())
    table.ranges = (image_range(table),)
    table.note_address = next((symbol.address for symbol in table.candidates(buildid.SYMBOL)), None)
    return table
