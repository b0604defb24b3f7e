"""`source` this file in gdb to have the xen commands. Sourcing it again does nothing.

It finds the rest of the project beside itself, in a checkout or in site-packages, and rich (for tables; not needed) in
the checkout's virtual environment or in the one that $VIRTUAL_ENV names, which gdb's own Python does not look at.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def _load() -> None:
    root = Path(__file__).resolve().parent.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if importlib.util.find_spec("rich") is None:
        environments = [root / ".venv", *map(Path, filter(None, [os.environ.get("VIRTUAL_ENV")]))]
        sys.path += [str(path) for env in environments for path in env.glob("lib/python3*/site-packages")]

    import gdbplugin

    gdbplugin.register()


_load()
