"""Xen's console ring (xen/drivers/char/console.c): conring, conring_size, conringc, conringp."""

from __future__ import annotations

from xen_symbols.absence import Unreadable
from xen_symbols.symbols.table import DATA
from xen_symbols.text import escaped
from xen_symbols.xen.memory import XenMemory

_LARGEST = 64 << 20  # conring_size=; no Xen keeps more


def read_console(memory: XenMemory, last: int | None = None) -> str:
    """The text of the ring from its oldest byte, or only its `last` bytes. Raises Unreadable.

    The indices run free; byte k is at k modulo the size, a power of two.
    """
    size, consumer, producer = (memory.variable(name, 4, DATA) for name in ("conring_size", "conringc", "conringp"))
    ring = memory.variable("conring", 8, DATA)
    if not 0 < size <= _LARGEST or size & (size - 1) or not ring:
        raise Unreadable(f"conring_size is {size}, not a size that Xen gives its ring")
    held = min((producer - consumer) % (1 << 32), size)
    if last is not None:
        held = min((producer % (1 << 32)), size, last)
    start = (producer - held) % size
    first = min(held, size - start)
    raw = memory.read(ring + start, first) + (memory.read(ring, held - first) if held > first else b"")
    return raw.decode("utf-8", "replace")


def printable(text: str) -> str:
    """Text with every control character but newline and tab shown as an escape, so that no terminal obeys it."""
    return escaped(text.replace("\r", ""), keep="\n\t")
