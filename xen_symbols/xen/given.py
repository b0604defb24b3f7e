"""What a user says of a Xen, where it cannot be found out or is not to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from xen_symbols.absence import Undecidable
from xen_symbols.records import NamedTuple


class Given(NamedTuple):
    """`generation`: the crash path's, which is then not recognised. `aliases`: what this build calls a name of the
    crash path. `allow_mismatch`: symbols of another build are accepted."""

    generation: str | None = None
    aliases: Mapping[str, str] = MappingProxyType({})
    allow_mismatch: bool = False


NOTHING_GIVEN = Given()


def parse_aliases(words: Iterable[str]) -> dict[str, str]:
    """Of NAME=ACTUAL each. Raises Undecidable."""
    aliases = {}
    for word in words:
        name, equals, actual = word.partition("=")
        if not (name and equals and actual):
            raise Undecidable(f"{word!r} is not an alias: that is NAME=ACTUAL, such as do_nmi_crash=my_nmi_crash")
        aliases[name] = actual
    return aliases
