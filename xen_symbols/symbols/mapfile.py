"""`.map` files: "address kind name" on each line, ascending, as Xen's build and nm(1) write them.

Since 4.15 Xen's own tools/symbols writes them, with all symbols and local ones as `file#name`;
before, they are nm's output reduced to text symbols.
"""

from __future__ import annotations

from xen_symbols.formats.content import Content, WrongFile, start_of
from xen_symbols.symbols.listed import ListedRows, listed_table
from xen_symbols.symbols.table import SymbolTable

SOURCE = ".map"
_LONGEST = 64 << 20
_UTF8_MARK = b"\xef\xbb\xbf"  # as CRLF, what a Windows editor leaves


def read_symbols(path: str, content: Content) -> SymbolTable:
    """Raises WrongFile."""
    head = start_of(content, 4096)
    if b"\0" in head or content.size > _LONGEST:
        raise WrongFile("neither an ELF file nor a .map")
    addresses: list[int] = []
    kinds: list[str] = []
    names: list[str] = []
    text = content.read(0, content.size).removeprefix(_UTF8_MARK).decode("latin-1")
    for number, line in enumerate(text.split("\n"), 1):
        words = line.strip().split(None, 2)
        if not words:
            continue
        try:
            address, kind, name = words
            value = int(address, 16)
        except ValueError:
            value = -1
        if not 0 <= value < 1 << 64 or len(kind) != 1 or not name.isprintable():
            raise WrongFile(f"line {number} is not `address kind name`, so this is neither an ELF file nor a .map")
        addresses.append(value)
        kinds.append(kind)
        names.append(name)
    return listed_table(path, SOURCE, ListedRows(addresses, kinds, names))
