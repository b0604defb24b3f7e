"""Recorded examples as targets: `load` returns one and its symbols, with memory that a test may change.

An example holds the bytes, registers and symbols of a real Xen that one judgement reads, and nothing else; it is a text
(exampletext.py) that tests/recording.py writes.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.machines import dumpwriter, exampletext
from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import Lapic, PhysicalCpu, Target

RECORDED = Path(__file__).parent.parent / "recorded"


class Example(Target):
    """A recorded machine as a target. `write` changes its memory."""

    def __init__(self, kind: str, format: str, location: str, memory: dict[int, bytes], cpus: Sequence[PhysicalCpu],
                 notes: Sequence[Note]) -> None:  # fmt: skip
        self.kind, self.format, self.location = kind, format, location
        self._starts = sorted(memory)
        self._memory = {start: bytearray(memory[start]) for start in self._starts}
        self.physical_cpus = list(cpus)
        self.notes_of_file = notes

    def _find(self, address: int, size: int) -> tuple[bytearray, int]:
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            start = self._starts[at]
            stretch = self._memory[start]
            if address + size <= start + len(stretch):
                return stretch, address - start
        raise Unreadable(f"physical {address:#x} was not recorded")

    def read_physical(self, address: int, size: int) -> bytes:
        stretch, offset = self._find(address, size)
        return bytes(stretch[offset : offset + size])

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        answers: list[bytes | Absent] = []
        for request in requests:
            try:
                answers.append(self.read_physical(*request))
            except Unreadable as error:
                answers.append(error.absent)
        return answers

    def hold(self, address: int, data: bytes) -> None:
        """Memory that was not recorded."""
        bisect.insort(self._starts, address)
        self._memory[address] = bytearray(data)

    def write(self, address: int, data: bytes) -> None:
        stretch, offset = self._find(address, len(data))
        stretch[offset : offset + len(data)] = data

    def physical_ranges(self) -> list[tuple[int, int]]:
        return [(start, start + len(data)) for start, data in self._memory.items()]

    def cpus(self) -> Sequence[PhysicalCpu]:
        return self.physical_cpus

    def notes(self) -> Sequence[Note]:
        return self.notes_of_file


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and "absent" in value:
        return Absent(value["absent"], Kind[value["kind"]])
    return tuple(value) if isinstance(value, list) else value


def _cpu(data: dict[str, Any]) -> PhysicalCpu:
    fields = {name: _from_json(value) for name, value in data.items()}
    if isinstance(fields["lapic"], dict):
        fields["lapic"] = Lapic(**{name: _from_json(value) for name, value in fields["lapic"].items()})
    return PhysicalCpu(**fields)


@functools.cache
def parsed(name: str) -> dict[str, Any]:
    """The content of an example's file; not to be changed."""
    return exampletext.parse(path_of(name).read_text())


def path_of(name: str) -> Path:
    return RECORDED / f"{name}.txt"


def load(name: str, renamed: Mapping[str, str] = MappingProxyType({})) -> tuple[Example, SymbolTable]:
    """A recorded example by its file's name, without `.txt`; `renamed`: what its symbols are called instead."""
    data = parsed(name)
    addresses, kinds, names = zip(*data["symbols"], strict=True)
    names = tuple(renamed.get(each.rpartition("#")[2], each) for each in names)
    rows = ListedRows([int(address, 16) for address in addresses], kinds, names)
    build_id = bytes.fromhex(data["build_id"] or "") or None
    symbols = SymbolTable(path_of(name).name, "recorded example", rows, [], build_id)
    symbols.note_address = symbols.get("__note_gnu_build_id_start")
    symbols.ranges = [(symbols.address("_start"), symbols.address("_end"))]
    memory = {int(address, 16): bytes.fromhex(content) for address, content in data["memory"].items()}
    notes = [Note(name, kind, bytes.fromhex(desc)) for name, kind, desc in data["notes"]]
    return Example(data["kind"], data["format"], name, memory, [_cpu(cpu) for cpu in data["cpus"]], notes), symbols


def write_files(folder: Path, target: Example, symbols: SymbolTable) -> tuple[Path, Path]:
    """An example as files again: an ELF core of what one judgement reads, its notes with it, and the symbols."""
    folder.mkdir(exist_ok=True)
    ranges = target.physical_ranges()
    content = {start: target.read_physical(start, end - start) for start, end in ranges}
    notes = b"".join(dumpwriter.note(note.name, note.type, note.desc) for note in target.notes())
    with (folder / "vmcore").open("wb") as file:
        dumpwriter.write_elf(file, ranges, content, notes)
    listed = (symbols.rows.symbol(row) for row in range(len(symbols.rows.addresses())))
    lines = (f"{s.address:016x} {s.kind} {f'{s.file}#' if s.file else ''}{s.name}\n" for s in listed)
    (folder / "xen-syms.map").write_text("".join(lines))
    return folder / "vmcore", folder / "xen-syms.map"


def crashed(name: str) -> int | None:
    """The CPU that crashed, as known when the example was recorded; None if none had."""
    cpu: int | None = parsed(name)["crashing_cpu"]
    return cpu


def names(folder: str = "") -> list[str]:
    """The recorded examples: those that pass, or with the folder `died` those of machines that died on the path."""
    return sorted(str(path.relative_to(RECORDED).with_suffix("")) for path in (RECORDED / folder).glob("*.txt"))
