"""What every target promises (xen_symbols/targets/__init__.py), as assertions that are the same for each kind.

The standard library and xen_symbols only: for a live machine, and for a dump that is served to gdb, they run in gdb.
"""

from __future__ import annotations

import bisect
import mmap
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.symbols import buildid
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import Lapic, PhysicalCpu, Target
from xen_symbols.xen.locate import locate

Request = tuple[int, int]  # physical address, size

# Around what QEMU's stub returns for one packet, and the size of a page.
SIZES = (1, 2, 8, 16, 404, 2047, 2048, 2049, 4095, 4096, 4097, 12345)
# No machine has memory there, and no arithmetic may wrap there.
NOWHERE = ((1 << 51, 8), (1 << 63, 8), ((1 << 64) - 4096, 4096), ((1 << 64) - 4096, 8192), ((1 << 64) - 8, 8),
           ((1 << 64) - 8, 16), ((1 << 64) - 1, 1), (1 << 64, 8), (1 << 65, 1), (1 << 32, 1 << 64))  # fmt: skip


class Truth:
    """The same machine's memory from an independent source: stretches by physical address."""

    def __init__(self, stretches: Mapping[int, bytes | memoryview]) -> None:
        self.starts = sorted(stretches)
        self._stretches = stretches

    def read(self, address: int, size: int) -> bytes | None:
        """None for what is not known."""
        at = bisect.bisect_right(self.starts, address) - 1
        if at < 0:
            return None
        start = self.starts[at]
        data = bytes(self._stretches[start][address - start : address - start + size])
        return data if len(data) == size else None


# Between these a PC has no RAM, or RAM that is not the machine's own (the firmware's).
_HOLE = (0xA0000, 0x100000)


def ram(path: str) -> Truth:
    """A copy of a PC's RAM, or the RAM itself: the offset is the physical address."""
    with open(path, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return Truth({0: memory[: _HOLE[0]], _HOLE[1]: memory[_HOLE[1] :]})


@dataclass(frozen=True)
class Registers:
    """What one source knows of each CPU: the fields of PhysicalCpu and Lapic that it fills in."""

    cpus: bool = True
    named: frozenset[str] = frozenset("rip rsp rflags cs cr0 cr3 cr4".split())
    fields: frozenset[str] = frozenset()
    lapic: frozenset[str] = frozenset()
    current: bool = True
    xens: bool = False  # its numbers are Xen's


_OF_THE_CPU = frozenset("idtr tr_base".split())
_LAPIC = frozenset(Lapic._fields) - {"source"}
_ABSENT_OR_NOT = frozenset(name for name, kind in PhysicalCpu.__annotations__.items() if "Absent" in str(kind))

DEVICE_STATE = Registers(fields=_ABSENT_OR_NOT, lapic=_LAPIC)
MONITOR = Registers(fields=_OF_THE_CPU | {"apic_id", "halted", "lapic"}, lapic=_LAPIC - {"apic_base"})
QEMUS_NOTES = Registers(fields=_OF_THE_CPU)
XENS_NOTES = Registers(current=False, xens=True)
NONE = Registers(cpus=False)


@dataclass(frozen=True)
class Subject:
    """One target, and what is known of its machine independently."""

    target: Target
    symbols: SymbolTable
    truth: Truth
    build_id: bytes
    cpus: int
    registers: Registers
    notes: frozenset[str] = frozenset()
    selections: Sequence[Callable[[], Any]] = (lambda: None,)  # each selects another CPU, where such a thing exists


def _read(target: Target, address: int, size: int) -> bytes | None:
    """Exactly this many bytes, or None if they are refused with a reason."""
    try:
        data = target.read_physical(address, size)
    except Unreadable as error:
        assert error.absent.reason.strip(), f"{address:#x} + {size:#x} is refused without a reason"
        return None
    assert isinstance(data, bytes), f"{address:#x} + {size:#x} gives {type(data).__name__}"
    assert len(data) == size, f"{address:#x} + {size:#x} gives {len(data)} bytes"
    return data


def _some(items: Sequence[Any], count: int = 12) -> list[Any]:
    """The first, the last, and some in between."""
    step = max(1, len(items) // count)
    return [*(items[i] for i in range(0, len(items), step)), items[-1]] if len(items) else []


def _held(target: Target) -> Callable[[int, int], bool]:
    """Whether the ranges hold a stretch from end to end; those that touch are one."""
    starts: list[int] = []
    ends: list[int] = []
    for start, end in target.physical_ranges():
        if ends and ends[-1] == start:
            ends[-1] = end
        else:
            starts.append(start)
            ends.append(end)

    def held(address: int, size: int) -> bool:
        at = bisect.bisect_right(starts, address) - 1
        return at >= 0 and address + size <= ends[at]

    return held


def _requests(subject: Subject) -> list[Request]:
    """At the borders of ranges and of known memory, at borders of pages and packets, and at random."""
    chance = random.Random(1)
    ranges = _some(subject.target.physical_ranges())
    places = {border for pair in ranges for border in pair}
    places |= {(start + end) // 2 & -4096 for start, end in ranges}
    places |= set(_some(subject.truth.starts, 24))
    found = []
    for place in sorted(places):
        for size in SIZES:
            found += [(place, size), (place - 1, size), (place - size, size), (place - size // 2, size)]
            found.append((place + chance.randrange(1 << 14), size))
    return [(address, size) for address, size in found if address >= 0]


# The promises. Each takes a Subject and raises AssertionError.


def says_what_it_is(subject: Subject) -> None:
    target = subject.target
    assert target.kind in ("live", "dump"), f"the kind is {target.kind!r}"
    assert target.format.strip(), "the format is not named"
    assert target.location.strip(), "the location is not named"


def bytes_are_exact_or_refused(subject: Subject) -> None:
    compared = 0
    held = _held(subject.target)
    for address, size in _requests(subject):
        data = _read(subject.target, address, size)
        assert (data is not None) is held(address, size), (
            f"{address:#x} + {size:#x} is {'refused' if data is None else 'read'}, and the ranges say otherwise"
        )
        known = subject.truth.read(address, size)
        if data is not None and known is not None:
            assert data == known, f"{address:#x} + {size:#x} differs"
            compared += any(known)
    assert compared > 10, f"only {compared} stretches that are not zero were compared"


def ranges_ascend_and_are_true(subject: Subject) -> None:
    ranges = subject.target.physical_ranges()
    last = -1
    for start, end in ranges:
        assert 0 <= start < end <= 1 << 64, f"{start:#x}-{end:#x} is not a range"
        assert start >= last, f"{start:#x} comes after {last:#x}"
        last = end
    assert last > 0, "there is no memory at all"
    for start, end in _some(ranges):
        for address in (start, end - 1):
            assert _read(subject.target, address, 1) is not None, f"{address:#x} cannot be read"
    assert _read(subject.target, last, 1) is None, f"{last:#x} is past the end and is read"
    assert _read(subject.target, last - 1, 2) is None, f"a read over the end, {last:#x}, is made up or short"


def nothing_is_past_2_64(subject: Subject) -> None:
    start, _ = subject.target.physical_ranges()[0]
    for address, size in (*NOWHERE, (start + (1 << 64), 8)):
        assert _read(subject.target, address, size) is None, f"{address:#x} + {size:#x} is read"
    many = subject.target.read_physical_many(NOWHERE)
    assert [type(answer) for answer in many] == [Absent] * len(NOWHERE), "among many, one is answered"
    assert _read(subject.target, start, 1 << 64) is None, "a read of 2^64 bytes is answered"


def many_reads_are_the_single_ones_in_order(subject: Subject) -> None:
    requests = _requests(subject)
    random.Random(2).shuffle(requests)
    requests += requests[:7]  # asked for twice
    answers = subject.target.read_physical_many(requests)
    assert len(answers) == len(requests), f"{len(answers)} answers to {len(requests)} requests"
    for (address, size), answer in zip(requests, answers, strict=True):
        single = _read(subject.target, address, size)
        if isinstance(answer, Absent):
            assert answer.reason.strip(), f"{address:#x} is absent without a reason"
            assert single is None, f"{address:#x} + {size:#x} is absent among many and read alone"
        else:
            assert answer == single, f"{address:#x} + {size:#x} differs among many"
    assert list(subject.target.read_physical_many([])) == [], "no request is answered"


def a_bad_read_among_many_leaves_the_others(subject: Subject) -> None:
    end = max(end for start, end in subject.target.physical_ranges() if end - start >= 16)
    good = end - 16
    answers = subject.target.read_physical_many([(good, 8), (end, 8), (good + 8, 8), (good + 8, 16), (good, 16)])
    whole = _read(subject.target, good, 16)
    assert whole is not None, f"{good:#x} cannot be read"
    absent = [isinstance(answer, Absent) for answer in answers]
    assert absent == [False, True, False, True, False], f"of good, bad, good, bad, good these are absent: {absent}"
    assert [answers[0], answers[2], answers[4]] == [whole[:8], whole[8:], whole], "the good ones differ"


def cpus_have_what_their_source_knows(subject: Subject) -> None:
    wanted = subject.registers
    cpus = subject.target.cpus()
    numbers = [cpu.index for cpu in cpus]
    assert numbers == list(range(subject.cpus if wanted.cpus else 0)), f"the CPUs are {numbers}"
    for cpu in cpus:
        where = f"CPU {cpu.index}"
        assert cpu.source.strip(), f"{where} has no source"
        assert wanted.named <= set(cpu.registers), f"{where} has no {wanted.named - set(cpu.registers)}"
        for name, value in cpu.registers.items():
            assert name == name.lower() and 0 <= value < 1 << 64, f"{where}: {name} is {value}"
        assert cpu.current is wanted.current, f"{where}: current is {cpu.current}"
        assert cpu.xen_cpu == (cpu.index if wanted.xens else None), f"{where} is said to be Xen's {cpu.xen_cpu}"
        _held_or_absent(cpu, _ABSENT_OR_NOT, wanted.fields, subject.target.kind, where)
        if isinstance(cpu.lapic, Lapic):
            assert cpu.lapic.source.strip(), f"the LAPIC of {where} has no source"
            _held_or_absent(cpu.lapic, _LAPIC, wanted.lapic, subject.target.kind, f"the LAPIC of {where}")


def _held_or_absent(of: Any, names: frozenset[str], held: frozenset[str], kind: str, where: str) -> None:
    for name in sorted(names):
        value = getattr(of, name)
        if name in held:
            assert not isinstance(value, Absent), f"{where}: {name} is absent: {value}"
        else:
            assert isinstance(value, Absent) and value.reason.strip(), f"{where}: {name} is {value}, from nowhere"
            # A live machine may have another source; a file will never hold it.
            assert value.kind is Kind.NOT_HELD or kind == "live", f"{where}: {name}: {value.kind}"


def xens_memory_is_the_same_whichever_cpu_is_selected(subject: Subject) -> None:
    symbols = subject.symbols
    assert symbols.note_address is not None, "the symbols name no build-id"
    wanted = [(symbols.note_address, buildid.NOTE_SIZE), (symbols.address("nr_cpu_ids"), 4),
              (symbols.address("__per_cpu_offset"), 8 * subject.cpus)]  # fmt: skip
    seen = set()
    for select in subject.selections:
        select()
        memory = locate(subject.target, symbols)
        values = tuple(memory.read(*request) for request in wanted)
        assert values == tuple(memory.read_many(wanted)), "many reads of virtual memory differ from single ones"
        seen.add((memory.root, values))
        for (address, size), value in zip(wanted, values, strict=True):
            known = subject.truth.read(memory.physical(address), size)
            assert known in (None, value), f"{address:#x} differs from what is known to be there"
    assert len(seen) == 1, f"{len(seen)} different answers"
    ((_, (note, count, offsets)),) = seen
    assert buildid.parse_note(note) == subject.build_id, f"the build-id is {note.hex()}"
    assert int.from_bytes(count, "little") == subject.cpus, f"nr_cpu_ids is {count.hex()}"
    areas = {offsets[i : i + 8] for i in range(0, len(offsets), 8)}
    assert len(areas) == subject.cpus, f"{len(areas)} per-CPU areas"


def notes_are_those_of_the_file(subject: Subject) -> None:
    notes = subject.target.notes()
    for note in notes:
        assert isinstance(note, Note), f"{note!r} is not a note"
        assert isinstance(note.desc, bytes) and 0 <= note.type < 1 << 32, f"{note.name}, {note.type:#x}"
        assert "\0" not in note.name, f"{note.name!r} has its NUL"
    names = {note.name for note in notes}
    assert names == subject.notes, f"the notes are {sorted(names)}"


def asking_again_gives_the_same(subject: Subject) -> None:
    target = subject.target

    def everything() -> tuple[Any, ...]:
        return list(target.physical_ranges()), list(target.cpus()), list(target.notes())

    assert everything() == everything(), "the second answer differs from the first"


PROMISES: Mapping[str, Callable[[Subject], None]] = {
    promise.__name__: promise
    for promise in (
        says_what_it_is,
        bytes_are_exact_or_refused,
        ranges_ascend_and_are_true,
        nothing_is_past_2_64,
        many_reads_are_the_single_ones_in_order,
        a_bad_read_among_many_leaves_the_others,
        cpus_have_what_their_source_knows,
        xens_memory_is_the_same_whichever_cpu_is_selected,
        notes_are_those_of_the_file,
        asking_again_gives_the_same,
    )
}


def broken(subject: Subject) -> dict[str, str]:
    """The promises that this target breaks, and how."""
    return {name: what for name, what in tried(subject).items() if what is not None}


def tried(subject: Subject) -> dict[str, str | None]:
    """Every promise: None if it is kept, or how it is broken."""
    found: dict[str, str | None] = {}
    for name, promise in PROMISES.items():
        try:
            promise(subject)
            found[name] = None
        except Exception as error:  # whatever else a target raises is a promise broken as well
            found[name] = f"{type(error).__name__}: {error}"
    return found
