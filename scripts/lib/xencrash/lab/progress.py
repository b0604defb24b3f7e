"""What the lab is doing, on standard error, while it takes its time."""

from __future__ import annotations

import sys
import time

from xen_symbols.text import escaped
from xencrash.lab.process import Progress


def on_stderr() -> Progress:
    """A line for each step, with the seconds since now."""
    begun = time.monotonic()
    return lambda text: print(f"{time.monotonic() - begun:6.1f} s  {escaped(text)}", file=sys.stderr, flush=True)
