"""Compressions, of whole files and of single pages. A package that one needs is imported when it is met, and named
where it is not installed: zstd, lzo and snappy are not in the standard library."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Protocol

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import Content, Held
from xen_symbols.records import NamedTuple

_EXTRA = ("cramjam", "lzallright")  # what setup.cfg's extra `dumps` installs
FILE_MAX = 128 << 20  # of a decompressed file; xen-syms with DWARF is 30 MB
_TOO_LONG = f"more than {FILE_MAX >> 20} MB when decompressed"


# -- files ------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    """What zlib, lzma, bz2 and compression.zstd (Python 3.14) have in common."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...


def unpacked(content: Content, packed: str) -> Content:
    """The content of a compressed file, undone in memory. Raises Undecidable."""
    data = content.read(0, content.size)
    try:
        found = _zstd_file(data) if packed == "zstd" else _streamed(data, packed)
    except Undecidable:
        raise
    except ImportError as error:
        raise Undecidable(f"compressed with {packed}; {_install(f'{error.name}')}") from None
    except MemoryError:
        raise Undecidable(f"not enough memory to undo its {packed} compression; give the uncompressed file") from None
    except Exception as error:  # each library has its own error class, and bad data is all it can mean
        raise Undecidable(f"bad {packed} data ({error}); fetch the file again") from None
    if not found:
        raise Undecidable("empty when decompressed; fetch the file again")
    return Held(found)


def _gzip() -> _Decompressor:
    return zlib.decompressobj(wbits=31)


def _xz() -> _Decompressor:
    return import_module("lzma").LZMADecompressor()  # type: ignore[no-any-return]


def _bzip2() -> _Decompressor:
    return import_module("bz2").BZ2Decompressor()  # type: ignore[no-any-return]


_STREAMS: dict[str, Callable[[], _Decompressor]] = {"gzip": _gzip, "xz": _xz, "lzma": _xz, "bzip2": _bzip2}

STANDARD = frozenset(_STREAMS)  # what the standard library undoes


def _streamed(data: bytes, packed: str) -> bytes:
    stream = _STREAMS[packed]()
    found = stream.decompress(data, FILE_MAX)
    if not stream.eof:
        raise Undecidable(
            f"{_TOO_LONG if len(found) == FILE_MAX else f'truncated {packed} data'}; fetch the file again"
        )
    return found


def _zstd_file(data: bytes) -> bytes:
    from cramjam import zstd

    found = bytearray(FILE_MAX)  # of which only what is written takes memory
    return bytes(memoryview(found)[: zstd.decompress_into(data, found)])


def _install(package: str) -> str:
    if package in _EXTRA:
        return f"pip install 'xencrash[dumps]' ({package})"
    return f"install the Python package {package}"


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
            return _lacks(codec)
    return None


def _lacks(codec: Codec) -> str:
    return f"compressed with {codec.name}; {_install(codec.package)}"


def decompress(codec: Codec, data: bytes, size: int) -> bytes:
    """The `size` bytes of a page; raises Unreadable for bad data or a package that is not installed."""
    try:
        page = codec.page(data, size)
    except ImportError:
        raise Unreadable(_lacks(codec)) from None
    except Exception as error:  # each library has its own error class, and bad data is all it can mean
        raise Unreadable(f"bad {codec.name} data: {error}") from None
    if len(page) != size:
        raise Unreadable(f"bad {codec.name} data: {len(page)} bytes instead of {size}")
    return page
