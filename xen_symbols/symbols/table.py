"""Symbols of one build of Xen: names to addresses and back, whatever they came from.

A name alone does not identify a symbol: until 4.21 `nmi_callback` is both a function of the
profiler and the variable in traps.c. `file#name` (Xen's own notation) says which, and a bare
name that stands for several addresses is an error that lists them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

from xen_symbols.absence import Kind, Undecidable, Unreadable
from xen_symbols.formats.image import Image
from xen_symbols.records import NamedTuple

TEXT = "tTwW"
DATA = "dDbBrRvV"
CARRIED = "table embedded in Xen"  # a source: what Xen's own image has
# Linker-script symbols that mark an end: nothing lies between one of them and the next symbol.
_END_MARKERS = frozenset({"_etext", "_einittext", "_erodata", "_end"})

# These hold a function's own name (C11, 6.4.2.2, and gcc's): clang's `__func__.one_cpu_only` is not a variable of its.
_OWN_NAME = frozenset({"__func__", "__FUNCTION__", "__PRETTY_FUNCTION__"})

# GNU ld writes 14 characters of a path of 15 to 18 into a COFF symbol table (binutils bfd/coffgen.c; a longer one goes
# into the string table): arch/x86/traps.c is `arch/x86/traps` in all that is made of xen.efi.
_CUT_PATH, _CUT = 14, range(1, 5)

_PLACES = 1024
_NAMES = 256


class Symbol(NamedTuple):
    """One symbol. `kind` is nm(1)'s letter (lower case: local to `file`), "?" if unknown."""

    address: int
    name: str
    file: str | None  # as the build recorded it: "arch/x86/traps.c", in older builds "traps.c"
    kind: str

    @property
    def local(self) -> bool:
        return self.kind.islower()

    @property
    def qualified(self) -> str:
        """`file#name` for a local symbol whose file is known, else the name."""
        return f"{self.file}#{self.name}" if self.file and self.local else self.name


class SymbolNotFound(Unreadable):
    """The table does not hold the name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, Kind.NO_SYMBOL)


class SymbolAmbiguous(Unreadable):
    """The name stands for symbols at different addresses."""

    def __init__(self, name: str, candidates: tuple[Symbol, ...]) -> None:
        self.candidates = candidates
        listed = ", ".join(f"{s.qualified} ({s.kind}) at {s.address:#x}" for s in candidates)
        super().__init__(f"{name} is ambiguous: {listed}", Kind.NO_SYMBOL)


class Rows(Protocol):
    """What a source of symbols provides; a row is a position in its table."""

    def names(self) -> Sequence[str]:
        """The bare name of each row, empty where the row has none."""
        ...

    def addresses(self) -> Sequence[int]: ...

    def placed(self) -> Iterable[int]:
        """The rows whose address lies in the image (not absolute, not undefined)."""
        ...

    def symbol(self, row: int) -> Symbol: ...

    def size(self, row: int) -> int:
        """The symbol's size in bytes, 0 if the source does not say."""
        ...


class SymbolTable:
    """The symbols of one build; everything but `rows` is computed when first asked for.

    `ranges` are the (start, end) that symbols describe: the image's sections, or its whole extent.
    `note_address` is the virtual address of the build-id note. `image` is None for a `.map`.
    """

    def __init__(
        self,
        path: str,
        source: str,
        rows: Rows,
        ranges: Sequence[tuple[int, int]],
        build_id: bytes | None = None,
        note_address: int | None = None,
        image: Image | None = None,
        text_only: bool = False,
    ) -> None:
        self.path, self.source = path, source
        self.rows, self.ranges = rows, ranges
        self.build_id, self.note_address = build_id, note_address
        self.image = image
        self.text_only = text_only  # the source holds functions and no variables
        self.aliases: Mapping[str, str] = {}  # by the name that is asked for, what this build calls it
        self._remember()

    def _remember(self) -> None:
        self.lookup = lru_cache(_PLACES)(self._lookup)  # thousands of CPUs are in the same few places
        # Every look at a live machine asks for the same names, and file#name may go through all of them.
        self._resolve = lru_cache(_NAMES)(self._find_row)

    def with_aliases(self, aliases: Mapping[str, str]) -> SymbolTable:
        """The same symbols, in which some names stand for those that a build has in their place.

        What lies at such a symbol is called by the name that it stands for. Raises Undecidable for what is not there.
        """
        if aliases == self.aliases:
            return self
        for name, actual in aliases.items():
            if not self._named(actual):
                raise Undecidable(f"--alias {name}={actual}: {self.path} has no {actual}")
        table = SymbolTable(
            self.path, self.source, self.rows, self.ranges, self.build_id, self.note_address, self.image, self.text_only
        )
        table.aliases = dict(aliases)
        return table

    # -- by name ------------------------------------------------------------------------------

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """The last row of each name."""
        names = self.rows.names()
        index = dict(zip(names, range(len(names)), strict=True))
        index.pop("", None)
        return index

    @cached_property
    def _earlier(self) -> dict[str, list[int]]:
        """The rows before the last one, for the few names that have several."""
        names = self.rows.names()
        earlier: dict[str, list[int]] = {}
        for row, last in enumerate(map(self._by_name.get, names)):
            if last != row and last is not None:  # None: a row without a name
                earlier.setdefault(names[row], []).append(row)
        return earlier

    def _named(self, name: str) -> list[int]:
        name = self.aliases.get(name, name)
        last = self._by_name.get(name)
        return [] if last is None else [*self._earlier.get(name, ()), last]

    def _statics(self, bare: str) -> list[int]:
        """Rows of a variable that is static inside a function, as compilers name it."""
        alike = [name for name in self._by_name if bare in name]  # quickly, as there may be thousands
        return [row for name in alike if _is_static(name, bare) for row in self._named(name)]

    def _rows_of(self, name: str) -> list[int]:
        file, _, bare = name.rpartition("#")
        rows = self._named(bare)
        if not file:
            return rows
        return self._in_file(rows, file) or self._in_file(self._statics(bare), file)

    def _in_file(self, rows: list[int], file: str) -> list[int]:
        return [row for row in rows if _same_file(self.rows.symbol(row).file, file)]

    def _find_row(self, name: str, kinds: str | None) -> int | None:
        rows = self._rows_of(name)
        if kinds is not None:
            rows = [row for row in rows if self.rows.symbol(row).kind in kinds]
        addresses = self.rows.addresses()
        if len({addresses[row] for row in rows}) > 1:
            raise SymbolAmbiguous(name, tuple(map(self.rows.symbol, rows)))
        return rows[0] if rows else None

    def _require(self, name: str, kinds: str | None) -> int:
        row = self._resolve(name, kinds)
        if row is None:
            raise SymbolNotFound(self._why_not(name))
        return row

    def _why_not(self, name: str) -> str:
        where = f"the {self.source} ({self.path})"
        others = self._rows_of(name) or self._named(name.rpartition("#")[2])
        reason = f"{name} is not in {where}"
        if self.text_only:
            reason += ", which holds text symbols only"
        if others:
            reason += "; it has " + ", ".join(f"{s.qualified} ({s.kind})" for s in map(self.rows.symbol, others))
        return reason

    def candidates(self, name: str) -> tuple[Symbol, ...]:
        """Every symbol that `name` or `file#name` stands for.

        `file` may be any tail of the path that the build recorded, or longer than it. Where
        `file#name` has no exact match, that file's variables which are static inside a function are the candidates.
        """
        return tuple(map(self.rows.symbol, self._rows_of(name)))

    def find(self, name: str, kinds: str | None = None) -> Symbol:
        """The one symbol of that name; `kinds` (nm letters) restricts the candidates.

        Raises SymbolNotFound or SymbolAmbiguous. Aliases at one address are not ambiguous.
        """
        return self.rows.symbol(self._require(name, kinds))

    def address(self, name: str, kinds: str | None = None) -> int:
        """The address of `find`'s symbol. Raises as it does."""
        return self.rows.addresses()[self._require(name, kinds)]

    def get(self, name: str, kinds: str | None = None) -> int | None:
        """As `address`, but None if the build has no such symbol.

        A table of text symbols only cannot say that of a variable: SymbolNotFound then too.
        """
        row = self._resolve(name, kinds)
        if row is None:
            self._require_complete(name, kinds)
            return None
        return self.rows.addresses()[row]

    def size(self, name: str, kinds: str | None = None) -> int:
        """The size in bytes of what the name stands for; 0 if the source does not say."""
        return self.rows.size(self._require(name, kinds))

    def has(self, name: str, kinds: str | None = None) -> bool:
        """Whether the build has any symbol of that name, one or several. Raises as `get` does."""
        found = any(kinds is None or self.rows.symbol(row).kind in kinds for row in self._rows_of(name))
        if not found:
            self._require_complete(name, kinds)
        return found

    def _require_complete(self, name: str, kinds: str | None) -> None:
        if self.text_only and (kinds is None or not set(kinds) <= set(TEXT)):
            raise SymbolNotFound(self._why_not(name))

    def complete(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, sorted."""
        return sorted(name for name in self._by_name if name.startswith(prefix))

    # -- by address ---------------------------------------------------------------------------

    @cached_property
    def _by_address(self) -> tuple[list[int], list[int]]:
        """(addresses ascending, the row at each)."""
        addresses = self.rows.addresses()
        rows = sorted(self.rows.placed(), key=addresses.__getitem__)
        return [addresses[row] for row in rows], rows

    def _range(self, address: int) -> tuple[int, int] | None:
        return next(((start, end) for start, end in self.ranges if start <= address < end), None)

    def _lookup(self, address: int) -> tuple[Symbol, int] | None:
        """(symbol, offset into it) for an address inside the image; None if no symbol covers it.

        Among aliases the plainest wins: text, then no section or linker-script name, then global.
        """
        bounds = self._range(address)
        if bounds is None:
            return None
        addresses, rows = self._by_address
        after = bisect_right(addresses, address)
        if after == 0 or addresses[after - 1] < bounds[0]:
            return None
        start = addresses[after - 1]
        first = after
        while first > 0 and addresses[first - 1] == start:
            first -= 1
        # A row without a name is one of the end entries that 4.21+ puts behind functions (d3b637fba3).
        aliases = [s for s in map(self.rows.symbol, rows[first:after]) if s.name]
        if start < address:
            aliases = [s for s in aliases if s.name not in _END_MARKERS]
        if not aliases:
            return None
        symbol = min(aliases, key=_plainness)
        stands_for = next((name for name, actual in self.aliases.items() if actual == symbol.name), symbol.name)
        return symbol._replace(name=stands_for), address - start

    def describe(self, address: int) -> str:
        """`name`, `name+0x51`, or the address in hex."""
        found = self.lookup(address)
        if found is None:
            return f"{address:#x}"
        symbol, offset = found
        return f"{symbol.name}+{offset:#x}" if offset else symbol.name

    def function_at(self, address: int) -> str | None:
        """The function there, without what a compiler adds to the name of a part of it (`.cold`, `.part.0`)."""
        found = self.lookup(address)
        return found[0].name.partition(".")[0] if found and found[0].kind in TEXT else None

    def describe_caller(self, address: int) -> str:
        """`name+0x51/0x80` of a return address: of the function that calls, also where the call is its very end.

        The size is as Xen's own traces have it: up to the next symbol, which since 4.21 may be where the function ends.
        """
        found = self.lookup(address - 1)
        if found is None:
            return f"{address:#x}"
        symbol, offset = found
        addresses, _ = self._by_address
        after = bisect_right(addresses, address - 1)
        bounds = self._range(address - 1)
        end = addresses[after] if after < len(addresses) else bounds[1] if bounds else address
        if self._xen_has_ends:
            end = min([end, *self._ends_of(symbol.address, after)])
        return f"{symbol.name}+{offset + 1:#x}/{end - symbol.address:#x}"

    @cached_property
    def _xen_has_ends(self) -> bool:
        """Whether the table in Xen's image has entries that end functions (d3b637fba3, 4.21): its count is renamed."""
        return bool(self._named("symbols_num_addrs"))

    def _ends_of(self, start: int, after: int) -> list[int]:
        """Where the symbols at `start` end, of those whose size is known; they come before `after`, by address."""
        addresses, rows = self._by_address
        first = bisect_left(addresses, start, 0, after)
        sizes = [self.rows.size(row) for row in rows[first:after] if self.rows.addresses()[row] == start]
        return [start + max(sizes)] if any(sizes) else []

    def extent(self, name: str) -> tuple[int, int]:
        """(start, end) of a function: by its size, or else up to the next symbol."""
        row = self._require(name, TEXT)
        start = self.rows.addresses()[row]
        if size := self.rows.size(row):
            return start, start + size
        addresses, _ = self._by_address
        after = bisect_right(addresses, start)
        bounds = self._range(start)
        ends = addresses[after : after + 1] + ([bounds[1]] if bounds else [])
        if not ends:
            raise SymbolNotFound(f"where {name} ends is not in the {self.source} ({self.path})")
        return start, min(ends)


def _same_file(recorded: str | None, asked: str) -> bool:
    """Whether one path is the tail of the other: builds record base names or paths."""
    if recorded is None:
        return False
    if recorded == asked or recorded.endswith("/" + asked) or asked.endswith("/" + recorded):
        return True
    return len(recorded) == _CUT_PATH and any(_same_file(recorded + asked[-cut:], asked) for cut in _CUT)


def _is_static(name: str, bare: str) -> bool:
    """Whether it is gcc's `bare.N`, or clang's `function.bare`, of which a second one is `function.bare.N`."""
    match name.split("."):
        case [first, number] if number.isdecimal():
            return first == bare
        case [function, last, *number] if last == bare and (not number or (len(number) == 1 and number[0].isdecimal())):
            return function.isidentifier() and function not in _OWN_NAME
    return False


def _plainness(symbol: Symbol) -> tuple[bool, bool, bool]:
    return symbol.kind not in TEXT, symbol.name.startswith(("_", ".")), symbol.local
