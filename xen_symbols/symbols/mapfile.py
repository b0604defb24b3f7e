"""`.map` files: "address kind name" on each line, ascending, as Xen's build and nm(1) write them.

Since 4.15 Xen's own tools/symbols writes them, with all symbols and local ones as `file#name`;
before, they are nm's output reduced to text symbols.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from xen_symbols.absence import Undecidable
from xen_symbols.symbols.files import ACCEPTED
from xen_symbols.symbols.table import Symbol, SymbolTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xen_symbols.symbols.files import Bytes

_LONGEST = 64 << 20


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


def note_address(table: SymbolTable) -> int | None:
    """The address of the build-id note, if a symbol says it."""
    return next((symbol.address for symbol in table.candidates("__note_gnu_build_id_start")), None)


def load_map(path: str, content: Bytes) -> SymbolTable:
    """Raises Undecidable if it is not such a file."""
    head = content.read(0, min(content.size, 4096))
    if head[:2] == b"MZ":
        raise Undecidable(f"{path}: an EFI binary; give xen-syms, its .map, or the ELF image instead")
    if b"\0" in head or content.size > _LONGEST:
        raise Undecidable(f"{path}: neither an ELF file nor a .map; {ACCEPTED}")
    addresses: list[int] = []
    kinds: list[str] = []
    names: list[str] = []
    for number, line in enumerate(content.read(0, content.size).decode("latin-1").split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            address, kind, name = line.split(None, 2)
            value = int(address, 16)
        except ValueError:
            value = -1
        if not 0 <= value < 1 << 64 or len(kind) != 1 or not name.isprintable():
            raise Undecidable(
                f"{path}: line {number} is not `address kind name`, so this is neither an ELF file nor a .map; "
                f"{ACCEPTED}"
            )
        addresses.append(value)
        kinds.append(kind)
        names.append(name)
    rows = ListedRows(addresses, kinds, names)
    table = SymbolTable(path, ".map", rows, (), text_only=rows.text_only())
    table.ranges = (image_range(table),)
    table.note_address = note_address(table)
    return table
