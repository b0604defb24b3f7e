"""docs/trace.svg: what `xencrash trace` prints of a recorded trace of real Xen. gendocs.py writes it with the generated
pages. Nothing in it is fetched: whoever opens it sees it in the reader's own monospaced font.
"""

from __future__ import annotations

import io
import json
import lzma
import re
from functools import cache
from html import unescape
from typing import Any

from tests.machines.recorded import RECORDED
from xen_symbols.report.blocks import report_blocks
from xen_symbols.report.console import draw

TRACE = RECORDED / "trace-4.17.json.xz"
COMMAND = "xencrash trace gdb:gdb.sock --symbols xen-syms --qmp qmp.sock"
WIDTH = 132  # columns


@cache
def trace() -> Any:
    """The JSON report of a crash of Xen 4.17 with 4 CPUs, followed to its end; not to be changed."""
    return json.loads(lzma.decompress(TRACE.read_bytes()))


def picture() -> str:
    """The text of the file."""
    from rich.console import Console

    class Terminal(Console):
        """Wraps long lines, as a terminal does."""

        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*objects, **{**options, "soft_wrap": False})

    console = Terminal(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, highlight=False)
    console.print(f"$ {COMMAND}", style="bold", markup=False)
    draw(report_blocks(trace()), console)
    svg = console.export_svg(title="xencrash", unique_id="trace")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code, ", "")


def words(svg: str) -> list[str]:
    """What a picture says, whichever rich drew it."""
    return unescape(" ".join(re.findall(r"<text[^>]*>(.*?)</text>", svg))).split()
