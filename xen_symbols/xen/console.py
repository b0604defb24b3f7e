"""Xen's console ring (xen/drivers/char/console.c): conring, conring_size, conringc, conringp."""

from __future__ import annotations

import re

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.table import DATA
from xen_symbols.text import escaped
from xen_symbols.xen.memory import XenMemory

_PAGE = 4096
OF_XEN = "(XEN)"  # with which Xen begins its own lines: what domains print may be in the ring, too
_PREFIX = re.compile(r"\(XEN\) ?(?:\[[-\d :.]+\] ?)?")  # console_timestamps= puts the time there
_LARGEST = 64 << 20  # conring_size=; no Xen keeps more


def read_console(memory: XenMemory, last: int | None = None) -> str:
    """The text of the ring from its oldest byte, or only its `last` bytes. Raises Unreadable."""
    raw = b"".join(memory.read(address, size) for address, size in _held(memory, last))
    return raw.decode("utf-8", "replace")


def console_parts(memory: XenMemory, last: int | None = None) -> list[str | Absent]:
    """The text of the ring as `read_console` has it, page by page where not all can be read; why not in its place.

    Raises Unreadable where the ring cannot be found.
    """
    parts: list[bytes | Absent] = []
    for start, size in _held(memory, last):
        for address in range(start & -_PAGE, start + size, _PAGE):
            begin, end = max(address, start), min(address + _PAGE, start + size)
            try:
                raw = memory.read(begin, end - begin)
            except Unreadable as error:
                parts.append(Absent(f"{end - begin} bytes could not be read: {error}"))
                continue
            if parts and isinstance(parts[-1], bytes):
                parts[-1] += raw  # a character may lie in two pages
            else:
                parts.append(raw)
    return [part if isinstance(part, Absent) else part.decode("utf-8", "replace") for part in parts]


def _held(memory: XenMemory, last: int | None = None) -> list[tuple[int, int]]:
    """Where the ring's text lies, from its oldest byte: addresses and sizes. Raises Unreadable.

    The indices run free; byte k is at k modulo the size, a power of two.
    """
    size, consumer, producer = (memory.variable(name, 4, DATA) for name in ("conring_size", "conringc", "conringp"))
    ring = memory.variable("conring", 8, DATA)
    if not 0 < size <= _LARGEST or size & (size - 1) or not ring:
        raise Unreadable(f"conring_size is {size}, not a size that Xen gives its ring")
    held = min((producer - consumer) % (1 << 32), size)
    if last is not None:
        held = min(producer, size, last)
    start = (producer - held) % size
    first = min(held, size - start)
    return [(ring + start, first), (ring, held - first)]


def without_prefix(line: str) -> str:
    """What Xen said, of a line of its own."""
    return _PREFIX.sub("", line, count=1).strip()


def printable(text: str) -> str:
    """Text with every control character but newline and tab shown as an escape, so that no terminal obeys it."""
    return escaped(text.replace("\r", ""), keep="\n\t")
