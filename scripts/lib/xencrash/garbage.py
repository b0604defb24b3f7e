"""Work that leaves no garbage in cycles, done without looking for any.

Importing the command and judging one dump make tens of thousands of objects, all of which stay until the process ends.
Python would go through them several times meanwhile and once more at its end: a tenth of judging a vmcore
(docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def none_in_cycles() -> Iterator[None]:
    """What is made meanwhile is not looked through, neither now nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
