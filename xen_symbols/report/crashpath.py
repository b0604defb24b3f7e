"""The generation of a crash path in words, or those that come nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xen_symbols.report import contract


def crash_path(generation: Mapping[str, Any]) -> str:
    """A generation, by the releases that have it and the commit that introduced it, and whether it was recognised."""
    return _in_words(generation) + (", given, not recognised" if generation.get("given") else "")


_DIFFERENCES = 4  # that are shown


def near_line(near: contract.NearGeneration) -> str:
    """One that does not fit, and why not."""
    differs, more = near["differs"][:_DIFFERENCES], len(near["differs"]) - _DIFFERENCES
    held = f"{near['holds']} of {near['holds'] + len(near['differs'])} statements hold"
    words = "; ".join(differs) + (f" and {more} more" if more > 0 else "")
    return f"not identified; perhaps {_in_words(near)}: {held}" + (f"; not so: {words}" if words else "")


def _in_words(generation: Mapping[str, Any]) -> str:
    releases = generation.get("releases")
    if releases is None:  # a report from before it had them
        return f"generation {generation['id']}"
    if releases[0].isdecimal():
        return f"as in Xen {releases} ({generation['introduced']})"
    return f"{generation['introduced']} ({releases})"
