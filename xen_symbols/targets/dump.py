"""Opening a dump: the format shows in the file's first bytes, and the rest is the Target protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats.content import Content, File, WrongFile, start_of
from xen_symbols.formats.elfnotes import Note
from xen_symbols.formats.magics import Magic, recognised
from xen_symbols.targets import Map, Opened, PhysicalCpu, Reader, Target, Wrapped
from xen_symbols.targets.notes import cpus_of


class Dump(Target):
    """A dump file as a Target."""

    kind = "dump"

    def __init__(self, location: str, opened: Opened, base: int | None = None) -> None:
        """`base` is that of a raw image."""
        self.location, self.opened, self.base = location, opened, base
        self.memory, self.truncated = opened.memory, opened.truncated
        self._cpus = cpus_of(opened.notes)

    @property
    def format(self) -> str:  # type: ignore[override] # Xen's memory may show more of it
        return self.opened.format + self.opened.memory.says

    def read_physical(self, address: int, size: int) -> bytes:
        return self.opened.memory.read(address, size)

    def physical_ranges(self) -> Sequence[tuple[int, int]]:
        return self.opened.memory.ranges()

    def written_ranges(self) -> Iterable[tuple[int, int]]:
        return self.opened.memory.written()

    def cpus(self) -> Sequence[PhysicalCpu]:
        """Every CPU that the notes name; empty for a raw image."""
        return self._cpus

    def notes(self) -> Sequence[Note]:
        """All notes in file order."""
        return self.opened.notes


def open_dump(path: str, *, base: int | None = None, maps: Sequence[Map] = ()) -> Dump:
    """Open the dump at `path`, whichever program wrote it.

    `base` is the physical address of the first byte of a raw image of memory, or `maps` say what is where in it; both
    are for nothing else. Raises Undecidable: one line that names the file, what is wrong with it and where.
    """
    try:
        return Dump(path, _open(File(path), base, maps), base)
    except OSError as error:
        raise Undecidable(f"{path}: {error.strerror}") from None
    except WrongFile as error:
        raise Undecidable(f"{path}: {error}; give a dump file") from None
    except Undecidable as error:
        raise Undecidable(f"{path}: {error}") from None
    except Unreadable as error:  # bookkeeping that a flattened file does not hold
        raise Undecidable(f"{path}: {error}; the file is truncated or damaged") from None


def _open(file: File, base: int | None, maps: Sequence[Map]) -> Opened:
    kind = recognised(file)
    is_raw = base is not None or bool(maps)
    if kind is None or (kind.weak and is_raw):
        raw: Opened = import_module(f"{__package__}.raw").read_raw(file, base, maps)
        return raw
    if not kind.dump:
        raise Undecidable(f"{kind.what}; {kind.advice}")
    opened = _read(kind, file)
    if isinstance(opened, Wrapped):
        opened = _within(opened)
    if is_raw:
        raise Undecidable(f"the file itself gives its addresses ({opened.format}); a base is for a raw image of memory")
    return opened


def _within(wrapped: Wrapped) -> Opened:
    kind = recognised(wrapped.content)
    inner = _read(kind, wrapped.content) if kind and kind.dump else None
    if not isinstance(inner, Opened):
        start = start_of(wrapped.content, 16).hex(" ")
        raise Undecidable(f"a {wrapped.how} file with neither an ELF core nor a kdump in it, but {start}")
    return inner._replace(format=f"{wrapped.how} {inner.format}")


def _read(kind: Magic, content: Content) -> Opened | Wrapped:
    read_dump: Reader = import_module(f"{__package__}.{kind.dump}").read_dump
    return read_dump(content)
