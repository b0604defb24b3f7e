"""What the fuzz tests share: values that break arithmetic, and a limit on memory."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

# Sizes and offsets at the edges of the types, and near those of pages.
EDGES = [0, 1, 2, 3, 7, 8, 0xFF, 0xFFFF, 0xFFFE, 0x1000, 0x1001, 1 << 31, (1 << 31) - 1, (1 << 32) - 1]
EDGES += [1 << 32, 1 << 40, 1 << 52, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 0x1000, 60_000, 0x10000]


@contextlib.contextmanager
def bounded_memory(size: int = 256 << 20) -> Iterator[None]:
    """`size` bytes on top of what the process uses now; beyond that is a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
