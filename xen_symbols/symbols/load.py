"""Opening a file of symbols: what it is shows in its content."""

from __future__ import annotations

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.compression import unpacked
from xen_symbols.formats.content import Content, File, NotAFile, start_of
from xen_symbols.formats.elf import MAGIC
from xen_symbols.symbols.elf import load_elf
from xen_symbols.symbols.mapfile import ACCEPTED, load_map
from xen_symbols.symbols.table import SymbolTable


def load_symbols(path: str) -> SymbolTable:
    """Symbols from xen-syms, a `.map`, or Xen's image; gzip-compressed or not.

    An ELF file without a symbol table gives the table embedded in Xen. Raises Undecidable.
    """
    try:
        return _load(path, unpacked(File(path)))
    except OSError as error:
        raise Undecidable(f"{path}: {error.strerror}; {ACCEPTED}") from None
    except NotAFile as error:
        raise Undecidable(f"{path}: {error}; {ACCEPTED}") from None
    except Undecidable as error:
        raise Undecidable(f"{path}: {error}") from None
    except Unreadable as error:
        raise Undecidable(f"{path}: {error}; the file is truncated or damaged") from None


def _load(path: str, content: Content) -> SymbolTable:
    if start_of(content, len(MAGIC)) == MAGIC:
        return load_elf(path, content)
    return load_map(path, content)
