"""Decompressors of kdump pages. Only zlib is in the standard library; the others are asked for when met."""

from __future__ import annotations

from collections.abc import Callable

from xen_symbols.absence import Unreadable

Decompressor = Callable[[bytes, int], bytes]  # compressed bytes, size of the page


def _zlib(data: bytes, size: int) -> bytes:
    import zlib

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


# By the flag in a page's descriptor (makedumpfile's diskdump_mod.h, DUMP_DH_COMPRESSED_*).
_BY_FLAG: dict[int, tuple[str, str, Decompressor]] = {  # name, Python package, function
    0x01: ("zlib", "zlib", _zlib),
    0x02: ("lzo", "lzallright", _lzo),
    0x04: ("snappy", "cramjam", _snappy),
    0x20: ("zstd", "cramjam", _zstd),
}


def missing(flags: int) -> str | None:
    """What to install for pages compressed as any of `flags`; None where nothing is lacking."""
    from importlib import import_module

    for flag, (name, package, _) in _BY_FLAG.items():
        if flags & flag:
            try:
                import_module(package)
            except ImportError:
                return _install(name, package)
    return None


def _install(name: str, package: str) -> str:
    return f"compressed with {name}; install the Python package {package}"


def decompress(flag: int, data: bytes, size: int) -> bytes:
    """The `size` bytes of a page; raises Unreadable for bad data or a decompressor that is not installed."""
    if flag not in _BY_FLAG:
        raise Unreadable(f"unknown compression {flag:#x}")
    name, package, function = _BY_FLAG[flag]
    try:
        page = function(data, size)
    except ImportError:
        raise Unreadable(_install(name, package)) from None
    except Exception as error:  # each library has its own error class, and bad data is all it can mean
        raise Unreadable(f"bad {name} data: {error}") from None
    if len(page) != size:
        raise Unreadable(f"bad {name} data: {len(page)} bytes instead of {size}")
    return page
