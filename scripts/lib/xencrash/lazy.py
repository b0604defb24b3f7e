"""What is imported late: a table names the module of each row, and only the one that is asked for is imported.

Importing is most of what judging a dump costs (docs/benchmarks.md). All other imports stand at the top of a module.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(name: str) -> Any:
    """A module, by its whole name; of `MODULE:NAME` what that module calls so."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)
