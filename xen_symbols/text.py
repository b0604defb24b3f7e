"""Text that came out of a machine or a file, made safe to print."""

from __future__ import annotations


def escaped(text: str, keep: str = "") -> str:
    """`text` with every character that a terminal might obey as an escape, those in `keep` excepted."""
    return "".join(c if c in keep or c.isprintable() else repr(c)[1:-1] for c in text)
