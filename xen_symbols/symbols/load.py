"""Opening a file of symbols: what it is shows in its content."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import Content, File, WrongFile
from xen_symbols.formats.magics import recognised
from xen_symbols.symbols.table import SymbolTable

ACCEPTED = "--symbols takes xen-syms, xen.efi, the .map of either, or Xen's image"


def load_symbols(path: str) -> SymbolTable:
    """Symbols from xen-syms, xen.efi, a `.map`, or Xen's image; compressed or not.

    A program without a symbol table gives the table embedded in Xen. Raises Undecidable.
    """
    try:
        return _load(path, File(path))
    except OSError as error:
        raise Undecidable(f"{path}: {error.strerror}; {ACCEPTED}") from None
    except WrongFile as error:
        raise Undecidable(f"{path}: {error}; {ACCEPTED}") from None
    except Undecidable as error:
        raise Undecidable(f"{path}: {error}") from None
    except Unreadable as error:
        raise Undecidable(f"{path}: {error}; the file is truncated or damaged") from None


def unpacked(content: Content) -> Content:
    """What is in a compressed file; another is what it is. Raises Undecidable."""
    kind = recognised(content)
    if kind is None or not kind.packed:
        return content
    undone: Content = import_module("xen_symbols.formats.compression").unpacked(content, kind.packed)
    return undone


def _load(path: str, content: Content) -> SymbolTable:
    content = unpacked(content)
    kind = recognised(content)
    if kind is not None and not kind.symbols and not kind.weak:
        raise WrongFile(f"{kind.what}; {kind.advice}" if kind.unpacks else kind.what)
    module = kind.symbols if kind is not None and kind.symbols else "mapfile"  # which is text, and has no magic
    read: Callable[[str, Content], SymbolTable] = import_module(f"{__package__}.{module}").read_symbols
    return read(path, content)
