"""Blocks on a terminal: by rich where it is at hand, as plain text without it, into a pipe, or on a dumb terminal."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import IO, Any

from xen_symbols.report.blocks import Block, Cell, Lines
from xen_symbols.text import escaped

STYLES = {
    "pass": "green",
    "fail": "bold red",
    "unknown": "bold yellow",
    "skip": "dim",
    "dim": "dim",
    "strong": "bold",
}


def is_rich(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that shows colours, and rich is there to draw them."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("NO_COLOR"):
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def print_blocks(blocks: Sequence[Block], stream: IO[str]) -> None:
    """Print blocks in the way that suits the stream."""
    if is_rich(stream):
        from rich.console import Console

        draw(blocks, Console(file=stream, highlight=False))
    else:
        stream.write(plain(blocks))


def coloured(blocks: Sequence[Block], width: int) -> str | None:
    """Blocks as text with colours, for a terminal of that width that the caller knows of; None without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    out = io.StringIO()
    draw(blocks, Console(file=out, force_terminal=True, width=width, highlight=False))
    return out.getvalue()


def draw(blocks: Sequence[Block], console: Any) -> None:
    """Draw blocks on a rich console."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def text(cells: Sequence[Cell]) -> Any:
        return Text.assemble(*((_shown(cell), STYLES.get(cell.style, "")) for cell in cells))

    for block in blocks:
        if isinstance(block, Lines):
            if block.title:
                console.print(f"\n{escaped(block.title)}", style="bold", markup=False, soft_wrap=True)
            for line in block.lines:
                console.print(text(line), soft_wrap=True)
            continue
        table = Table(title=block.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in block.columns:
            table.add_column(column, overflow="fold")  # an address is of no use shortened
        for row in block.rows:
            table.add_row(*(text([cell]) for cell in row))
        console.print(table)


def plain(blocks: Sequence[Block]) -> str:
    """Blocks as text without any escape sequence. Columns are as wide as their widest cell."""
    out: list[str] = []
    for block in blocks:
        if isinstance(block, Lines):
            out += ["", escaped(block.title)] if block.title else []
            out += ["".join(map(_shown, line)).rstrip() for line in block.lines]
            continue
        rows = [list(block.columns), *(list(map(_shown, row)) for row in block.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(block.columns))]
        rows.insert(1, ["-" * width for width in widths])
        out += ["", block.title]
        out += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        out.append("")
    return "\n".join(out) + "\n"


def _shown(cell: Cell) -> str:
    """A cell's text without control characters: a file's name may contain any."""
    return escaped(cell.text, keep="\t")
