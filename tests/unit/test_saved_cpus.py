"""Whose registers a dump's pairs of notes are, where pairs are missing, copied, exchanged or halved.

A table: what was done to a real vmcore's notes, which CPUs then have registers from where, what is said of the file,
and what its own notes are found to be. Registers are always the CPU's own, or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.machines import recorded
from tests.machines.stacks import BASE, TSS_PAGE, Stacks
from xen_symbols import api
from xen_symbols.absence import Absent, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.targets import PhysicalCpu
from xen_symbols.xen.backtrace import backtrace
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.savedcpus import NO_PAIR, OF_MEMORY, StackOwners, match
from xen_symbols.xen.state import State, read_state
from xencrash.cli import main
from xencrash.serve import served

FILE = "Xen's crash notes"
SAVED = ["file", "file", "file", "file"]
Notes = list[Note]


def status(notes: Notes) -> list[int]:
    return [at for at, note in enumerate(notes) if note.name == "CORE"]


def pair(notes: Notes, cpu: int) -> list[int]:
    """Where a CPU's NT_PRSTATUS and CRASH_REGS are."""
    at = status(notes)[cpu]
    return [at, next(n for n in range(at, len(notes)) if notes[n].type == 0x1000002)]


def without(*cpus: int, halves: slice = slice(None)) -> Callable[[Notes], Notes]:
    def change(notes: Notes) -> Notes:
        lost = {at for cpu in cpus for at in pair(notes, cpu)[halves]}
        return [note for at, note in enumerate(notes) if at not in lost]

    return change


def ordered(*cpus: int) -> Callable[[Notes], Notes]:
    """The pairs of these CPUs in this order, one of them perhaps twice; other notes after them."""

    def change(notes: Notes) -> Notes:
        paired = [pair(notes, cpu) for cpu in range(4)]
        rest = [note for at, note in enumerate(notes) if not any(at in each for each in paired)]
        return [notes[at] for cpu in cpus for at in paired[cpu]] + rest

    return change


def zeroed(cpu: int) -> Callable[[Notes], Notes]:
    def change(notes: Notes) -> Notes:
        for at in pair(notes, cpu):
            notes[at] = notes[at]._replace(desc=bytes(len(notes[at].desc)))
        return notes

    return change


class Case(NamedTuple):
    """`sources`: where each CPU's registers come from; `says`: in the warning, "" for none; `failing`: dump-notes."""

    change: Callable[[Notes], Notes]
    sources: Sequence[str]
    says: str
    failing: dict[int, str]


def lacking(*cpus: int) -> list[str]:
    return ["memory" if cpu in cpus else "file" for cpu in range(4)]


NONE = "no notes"
CASES = {
    "as it was": Case(lambda notes: notes, SAVED, "", {}),
    "without CPU 0's": Case(without(0), lacking(0), "3 pairs for 4 CPUs", {
        0: NONE, 1: "at the place of CPU 0", 2: "at the place of CPU 1", 3: "at the place of CPU 2"}),
    "without CPU 1's": Case(without(1), lacking(1), "3 pairs for 4 CPUs", {
        1: NONE, 2: "at the place of CPU 1", 3: "at the place of CPU 2"}),
    "without CPU 2's": Case(without(2), lacking(2), "3 pairs for 4 CPUs", {2: NONE, 3: "at the place of CPU 2"}),
    "without the last": Case(without(3), lacking(3), "3 pairs for 4 CPUs", {3: NONE}),
    "without two": Case(without(0, 2), lacking(0, 2), "2 pairs for 4 CPUs", {
        0: NONE, 1: "at the place of CPU 0", 2: NONE, 3: "at the place of CPU 1"}),
    "all but one": Case(without(0, 1, 3), lacking(0, 1, 3), "1 pair for 4 CPUs", {
        0: NONE, 1: NONE, 2: "at the place of CPU 0", 3: NONE}),
    "without any": Case(without(0, 1, 2, 3), lacking(0, 1, 2, 3), "0 pairs for 4 CPUs", dict.fromkeys(range(4), NONE)),
    "two exchanged": Case(ordered(0, 2, 1, 3), SAVED, "CPUs 1-2's at the place of another CPU", {
        1: "at the place of CPU 2", 2: "at the place of CPU 1"}),
    "reversed": Case(ordered(3, 2, 1, 0), SAVED, "CPUs 0-3's at the place of another CPU", {
        cpu: f"at the place of CPU {3 - cpu}" for cpu in range(4)}),
    "one twice, in between": Case(ordered(0, 1, 1, 2, 3), SAVED, "5 pairs for 4 CPUs", {
        2: "at the place of CPU 3", 3: "at the place of CPU 4"}),
    "one twice, at the end": Case(ordered(0, 1, 2, 3, 1), SAVED, "pair 4 is a copy of CPU 1's", {}),
    "one instead of another": Case(ordered(0, 1, 1, 3), lacking(2), "pair 2 is a copy of CPU 1's", {2: NONE}),
    "one twice and one missing, moved": Case(ordered(1, 1, 2, 3), lacking(0), "pair 0 is a copy of CPU 1's", {0: NONE}),
    "without CPU 2's control registers": Case(without(2, halves=slice(1, 2)), SAVED, "", {2: "no cr0"}),
    "without CPU 2's general registers": Case(without(2, halves=slice(0, 1)), SAVED, "", {2: "no r15"}),
    "zeros for CPU 2": Case(zeroed(2), lacking(2), "", {2: "empty"}),
}  # fmt: skip


class Dump(NamedTuple):
    path: Path
    symbols: Path
    memory: XenMemory
    state: State
    saved: dict[int, dict[str, int]]  # what each CPU saved, by Xen's memory


def dump(name: str, folder: Path, change: Callable[[Notes], Notes]) -> Dump:
    target, symbols = recorded.load(name)
    target.notes_of_file = change(list(target.notes()))
    path, listed = recorded.write_files(folder, target, symbols)
    memory = api.open_dump(path, listed)
    state = read_state(memory)
    return Dump(path, listed, memory, state, {n: cpu.notes.value.saved for n, cpu in state.cpus.items()})


@pytest.mark.parametrize("release", ["4.14", "4.17", "4.20"])
@pytest.mark.parametrize("what", CASES)
def test_each_cpu_has_its_own_registers_or_none(what: str, release: str, tmp_path: Path) -> None:
    case = CASES[what]
    made = dump(f"{release}-crashed-vmcore", tmp_path, case.change)
    report = api.evaluate(made.memory)

    warnings = report.target.get("warnings", [])
    assert [case.says in warning for warning in warnings] == [True] * bool(case.says)
    failing = {f.cpu: f.observed for f in report.findings if f.check == "dump-notes" and str(f.verdict) == "fail"}
    assert failing.keys() == case.failing.keys()
    assert all(str(failing[cpu]).startswith(says) for cpu, says in case.failing.items()), failing
    others = {(f.check, f.cpu, str(f.verdict)) for f in report.findings if str(f.verdict) in ("fail", "unknown")}
    assert {check for check, _, _ in others} == ({"dump-notes"} if case.failing else set())

    threads = served(made.memory).threads
    for cpu, source in enumerate(case.sources):
        physical = made.state.of(cpu).physical
        assert not isinstance(physical, Absent)
        assert (physical.source, physical.current) == (FILE if source == "file" else OF_MEMORY, False)
        assert physical.registers.items() <= made.saved[cpu].items()
        assert threads[cpu].cpu == cpu and threads[cpu].registers == physical.registers
        if "rip" in physical.registers:
            (step, *_) = backtrace(made.memory, made.state, made.state.of(cpu)).steps
            assert (step.rip, step.rsp) == (made.saved[cpu]["rip"], made.saved[cpu]["rsp"])
    assert len(threads) == 4


def test_info_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = dump("4.17-crashed-vmcore", tmp_path, without(2))
    assert main(["info", str(made.path), "--symbols", str(made.symbols), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(cpu["cpu"], cpu["source"]) for cpu in said["registers"]] == [
        (0, FILE), (1, FILE), (2, OF_MEMORY), (3, FILE),
    ]  # fmt: skip
    assert [cpu["registers"]["rsp"] for cpu in said["registers"]] == [hex(made.saved[cpu]["rsp"]) for cpu in range(4)]
    assert [(n["pair"], n["cpu"], n["in_memory"]) for n in said["notes"] if n["name"] == "CORE"] == [
        (0, 0, True), (1, 1, True), (2, 3, True),
    ]  # fmt: skip
    assert main(["info", str(made.path), "--symbols", str(made.symbols)]) == 0
    out = capsys.readouterr().out
    assert "the file has 3 pairs for 4 CPUs" in out
    assert f"CPU          2: rip {said['registers'][2]['registers']['rip']}" in out
    assert main(["check", str(made.path), "--symbols", str(made.symbols)]) == 1
    assert "the file has 3 pairs for 4 CPUs" in capsys.readouterr().out


def test_a_cpu_that_saved_nothing_and_has_no_pair(tmp_path: Path) -> None:
    """As one that never stopped: nothing is shown as its registers, and nobody else's."""
    target, symbols = recorded.load("4.17-crashed-vmcore")
    state = read_state(locate(target, symbols))
    address = state.of(2).notes.address
    assert address is not None
    memory = locate(target, symbols)
    target.write(memory.physical(address + 20), bytes(336))
    target.write(memory.physical(address + 372), bytes(32))
    target.notes_of_file = without(2)(list(target.notes()))
    path, listed = recorded.write_files(tmp_path, target, symbols)
    memory = api.open_dump(path, listed)
    state = read_state(memory)
    assert state.of(2).physical == Absent(f"no registers saved: {NO_PAIR}", NO_PAIR.kind)
    trace = backtrace(memory, state, state.of(2))
    assert str(trace.registers).startswith("no registers saved") and trace.steps == []
    assert served(memory).threads[2].registers == {}
    findings = {(f.check, f.cpu): f for f in api.evaluate(memory).findings}
    assert str(findings["dump-notes", 2].verdict) == "skip"
    assert str(findings["crash-notes", 2].verdict) == "fail"
    assert findings["dump-notes", 3].observed == "at the place of CPU 2"


# -- The matching alone: where memory's notes could not be read, by the stack, and where that is not known, not at all


def of(*tops: int) -> list[PhysicalCpu]:
    """Pairs by their RSP; 0 for one that saved nothing."""
    return [PhysicalCpu(n, {"rsp": rsp, "rip": 1} if rsp else {}, n, current=False, source=FILE)
            for n, rsp in enumerate(tops)]  # fmt: skip


STACKS = {100: 0, 200: 1, 300: 2, 400: 3}
UNREAD: dict[int, dict[str, int]] = {}
BY_STACK = {
    "all of them, reversed": (of(400, 300, 200, 100), UNREAD, {0: 3, 1: 2, 2: 1, 3: 0}, [], "CPUs 0-3's at the"),
    "one missing": (of(100, 200, 400), UNREAD, {0: 0, 1: 1, 3: 2}, [], "none that could be determined to be CPU 2's"),
    "one twice": (of(100, 200, 200, 300, 400), UNREAD, {0: 0, 1: 1, 2: 3, 3: 4}, [], "pair 2 is a copy of CPU 1's"),
    "two that differ on one stack": (
        [*of(100, 200), *(pair._replace(index=2, registers={"rsp": 200, "rip": 2}) for pair in of(200))],
        UNREAD, {0: 0}, [1, 2], "pairs 1-2"),
    "one on none": (of(100, 200, 999), UNREAD, {0: 0, 1: 1}, [2], "whose pair 2 is could not be determined"),
    "one on none, of four": (of(100, 200, 999, 400), UNREAD, {0: 0, 1: 1, 2: 2, 3: 3}, [], ""),
    "none on any, of four": (of(9, 8, 7, 6), UNREAD, {0: 0, 1: 1, 2: 2, 3: 3}, [], ""),
    "none on any, of three": (of(9, 8, 7), UNREAD, {}, [0, 1, 2], "3 pairs for 4 CPUs"),
    "two exchanged, and two on none": (of(200, 100, 9, 8), UNREAD, {0: 1, 1: 0}, [2, 3], "whose pairs 2-3 is"),
    "three moved, and the one that is left": (of(200, 300, 100, 9), UNREAD, {0: 2, 1: 0, 2: 1, 3: 3}, [], "CPUs 0-2's"),
    "of a CPU that memory has otherwise": (
        of(100, 300, 400), {2: {"rsp": 300, "rip": 5}}, {0: 0, 2: 1, 3: 2}, [], "CPU 1's"),
    "on a stack, and another in memory": (
        of(100, 300, 300, 400), {1: {"rsp": 300, "rip": 1}}, {0: 0, 1: 1, 3: 3}, [], "pair 2 is a copy of CPU 1's"),
    "zeros, of those that saved nothing": (
        of(100, 0, 400), {1: {}, 2: {}}, {0: 0, 1: 1, 3: 2}, [], "none that could be determined to be CPU 2's"),
}  # fmt: skip


@pytest.mark.parametrize("what", BY_STACK)
def test_by_the_stack_or_by_the_place_of_all(what: str) -> None:
    pairs, saved, wanted, left, says = BY_STACK[what]
    found = match(pairs, range(4), 4, saved, STACKS.get)
    assert {cpu: pair.index for cpu, pair in found.of.items() if not isinstance(pair, Absent)} == wanted
    assert [pair.index for pair in found.left] == left
    assert says in "".join(found.warnings) and bool(says) is bool(found.warnings)


def test_what_a_truncated_file_may_have_had_is_not_known() -> None:
    found = match(of(100, 200), range(4), 4, UNREAD, STACKS.get, "the file is truncated: it ends at offset 0x1")
    assert found.of[3] == Absent(
        "the file may have had notes of this CPU: the file is truncated: it ends at offset 0x1"
    )


class Words:
    """The stacks' memory, as XenMemory reads it."""

    def __init__(self, words: dict[int, int]) -> None:
        self._words = words

    def read_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        answers: list[bytes | Absent] = []
        for start, size in requests:
            try:
                words = [self._words[at] for at in range(start & ~7, start + size, 8)]
            except KeyError:
                answers.append(Unreadable("not mapped").absent)
                continue
            raw = b"".join(word.to_bytes(8, "little") for word in words)
            answers.append(raw[start % 8 : start % 8 + size])
        return answers


@pytest.mark.parametrize("new", [True, False])
def test_whose_stack_an_address_is_on(new: bool) -> None:
    words = Stacks(new=new).memory
    owner = StackOwners(Words(words), {5: TSS_PAGE, 6: Absent("no symbol names the TSS")})  # type: ignore[arg-type]
    assert [owner(at) for at in (BASE + 8, BASE + 0x8000, BASE, BASE + 0x8008, 0)] == [5, 5, None, None, None]
    both = StackOwners(Words(words), {5: TSS_PAGE, 6: TSS_PAGE})  # type: ignore[arg-type]
    assert both(BASE + 8) is None  # two CPUs' stacks are never one
