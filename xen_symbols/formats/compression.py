"""Compressions, of whole files and of single pages. Only zlib is in the standard library; a package that another needs
is imported when one is met, and named where it is not installed."""

import zlib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import NamedTuple

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import Content, Held

FILE_MAX = 128 << 20  # of a decompressed file; xen-syms with DWARF is 30 MB


# -- files ------------------------------------------------------------------------------------


def unpacked(content: Content, packed: str) -> Content:
    """The content of a compressed file, undone in memory. Raises Undecidable."""
    data = _FILES[packed](content.read(0, content.size))
    if not data:
        raise Undecidable("empty when decompressed; fetch the file again")
    return Held(data)


def _gunzip(data: bytes) -> bytes:
    inflate = zlib.decompressobj(wbits=31)
    try:
        found = inflate.decompress(data, FILE_MAX)
    except zlib.error as error:
        raise Undecidable(f"bad gzip data ({error}); fetch the file again") from None
    if not inflate.eof:
        why = "more than 128 MB when decompressed" if len(found) == FILE_MAX else "truncated gzip data"
        raise Undecidable(f"{why}; fetch the file again")
    return found


_FILES: dict[str, Callable[[bytes], bytes]] = {"gzip": _gunzip}


# -- pages ------------------------------------------------------------------------------------


class Codec(NamedTuple):
    """How a page is decompressed, and which Python package does it."""

    name: str
    package: str
    page: Callable[[bytes, int], bytes]  # compressed bytes, size of the page


def _zlib(data: bytes, size: int) -> bytes:
    return zlib.decompressobj().decompress(data, size + 1)


def _lzo(data: bytes, size: int) -> bytes:
    from lzallright import LZOCompressor

    return bytes(LZOCompressor.decompress(data, output_size_hint=size))


def _snappy(data: bytes, size: int) -> bytes:
    from cramjam import snappy

    page = bytearray(size)
    return bytes(page[: snappy.decompress_raw_into(data, page)])


def _zstd(data: bytes, size: int) -> bytes:
    from cramjam import zstd

    page = bytearray(size)
    return bytes(page[: zstd.decompress_into(data, page)])


ZLIB = Codec("zlib", "zlib", _zlib)
LZO = Codec("lzo", "lzallright", _lzo)
SNAPPY = Codec("snappy", "cramjam", _snappy)
ZSTD = Codec("zstd", "cramjam", _zstd)


def missing(codecs: Iterable[Codec]) -> str | None:
    """What to install for pages that are compressed so; None where nothing is lacking."""
    for codec in codecs:
        try:
            import_module(codec.package)
        except ImportError:
            return _install(codec)
    return None


def _install(codec: Codec) -> str:
    return f"compressed with {codec.name}; install the Python package {codec.package}"


def decompress(codec: Codec, data: bytes, size: int) -> bytes:
    """The `size` bytes of a page; raises Unreadable for bad data or a package that is not installed."""
    try:
        page = codec.page(data, size)
    except ImportError:
        raise Unreadable(_install(codec)) from None
    except Exception as error:  # each library has its own error class, and bad data is all it can mean
        raise Unreadable(f"bad {codec.name} data: {error}") from None
    if len(page) != size:
        raise Unreadable(f"bad {codec.name} data: {len(page)} bytes instead of {size}")
    return page
