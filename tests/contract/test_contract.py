"""One suite of the Target protocol's promises, on every kind of target. Real Xen is here as recorded examples; whole
dumps of real Xen, by every producer, are tested in tests/live/test_dumps.py.

The reference guest is stopped at the handover in both QEMUs: live through gdb, with QMP and without, in each of QEMU's
dumps, in one that is served to gdb, and as a raw image of its RAM, with which each is compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract import promises
from tests.contract.promises import PROMISES, Subject, Truth, broken
from tests.live.machines import build_id, guest, run_gdb, target
from tests.machines import dumpwriter as writer
from tests.machines.recorded import load, parsed
from tests.machines.syntheticxen import BUILD_ID, HEAP, PHYS_START, SyntheticXen
from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.load import load_symbols
from xen_symbols.targets.dump import open_dump
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import BLOCK
from xencrash.gdbprogram import plugin_script
from xencrash.serve import GDB_SETTINGS, served, serving
from xencrash.trace import trace

CPUS = 4
QEMUS_NOTES = frozenset({"CORE", "QEMU"})
# QEMU → its dumps by name: the arguments of dump-guest-memory.
DUMPS: dict[str, dict[str, dict[str, Any]]] = {
    "7.2": {"elf": {}, "elf-paging": {"paging": True}, "kdump-zlib-flattened": {"format": "kdump-zlib"}},
    "10.0": {"elf": {}, "kdump-zlib-flattened": {"format": "kdump-zlib"},
             "kdump-zlib-raw": {"format": "kdump-raw-zlib"}},
}  # fmt: skip
IN_GDB = ("live", "live-without-qmp", "served")

Answers = dict[str, dict[str, str | None]]  # by kind of target: each promise, and how it is broken if it is


@dataclass(frozen=True)
class Stopped:
    """What one machine left: the folder with its dumps, and its gdb's output."""

    folder: Path
    symbols: str
    in_gdb: Answers

    def subject(self, kind: str) -> Subject:
        raw = kind == "raw"
        return Subject(
            open_dump(str(self.folder / kind), base=0 if raw else None),
            load_symbols(self.symbols),
            promises.ram(str(self.folder / "raw")),
            build_id(self.symbols),
            CPUS,
            promises.NONE if raw else promises.QEMUS_NOTES,
            frozenset() if raw else QEMUS_NOTES,
        )


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stopped]]:
    """The machine of one QEMU, booted when it is first asked for."""
    made: dict[str, Stopped] = {}
    folder = tmp_path_factory.mktemp("contract")

    def machine(qemu: str) -> Stopped:
        if qemu not in made:
            made[qemu] = stopped(qemu, folder / qemu)
        return made[qemu]

    yield machine
    shutil.rmtree(folder)


def stopped(qemu: str, folder: Path) -> Stopped:
    folder.mkdir()
    with guest(cpus=CPUS, qemu=qemu) as lab:
        report = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=30, leave_stopped=True,
                       trigger=lambda: lab.serial.send(b"C"))  # fmt: skip
        assert (report["verdict"], report["stages"][-1]["stage"]) == ("pass", "handover")
        for name, options in DUMPS[qemu].items():
            lab.dumps.qemu(folder / name, **options)
        shutil.copyfile(lab.ram_file, folder / "raw")
        symbols = str(lab.symbols)
        ways = {"live": (str(lab.qmp_socket), "DEVICE_STATE"), "live-without-qmp": (None, "MONITOR")}
        in_gdb = examined(folder, symbols, str(lab.gdb_socket), ways, [])
    memory = locate(open_dump(str(folder / "elf")), load_symbols(symbols))
    with serving(served(memory)) as path:
        in_gdb |= examined(folder, symbols, path, {"served": (None, "QEMUS_NOTES")}, sorted(QEMUS_NOTES))
    return Stopped(folder, symbols, in_gdb)


def examined(folder: Path, symbols: str, socket: str, ways: dict[str, tuple[str | None, str]],
             notes: list[str]) -> Answers:  # fmt: skip
    """The promises kept and broken in gdb attached to a socket: the same suite, run inside gdb."""
    same = {"symbols": symbols, "ram": str(folder / "raw"), "build_id": build_id(symbols).hex(), "cpus": CPUS,
            "notes": notes}  # fmt: skip
    cases = folder / "cases.json"
    cases.write_text(json.dumps([{"qmp": qmp, "registers": registers, **same} for qmp, registers in ways.values()]))
    output = run_gdb(
        *GDB_SETTINGS, f"source {plugin_script()}", f"file {symbols}", f"target remote {socket}",
        f'set $cases = "{cases}"', "echo \\n=== begin\\n", f"source {Path(promises.__file__).with_name('in_gdb.py')}",
        timeout=120,
    )  # fmt: skip
    found = next((line for line in output.splitlines() if line.startswith("[{")), None)
    assert found is not None, output
    return dict(zip(ways, json.loads(found), strict=True))


@pytest.mark.live
@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize(("qemu", "kind"), [(q, k) for q in DUMPS for k in (*IN_GDB, *DUMPS[q], "raw")])
def test_a_guest_keeps(promise: str, qemu: str, kind: str, machines: Callable[[str], Stopped]) -> None:
    machine = machines(qemu)
    if kind in IN_GDB:
        assert machine.in_gdb[kind][promise] is None
    else:
        PROMISES[promise](machine.subject(kind))


# Targets without a machine: dumps that the tests write of a made-up Xen, and examples recorded from real ones.

RANGES = [(PHYS_START, PHYS_START + (8 << 20)), (HEAP, HEAP + (1 << 20))]


def synthetic(folder: Path, format: str) -> Subject:
    xen = SyntheticXen(CPUS)
    (folder / "map").write_text(xen.map_file())
    dump = folder / "dump"
    write = writer.write_elf if format == "elf" else writer.write_kdump
    with dump.open("wb") as file:
        write(file, RANGES, xen.content, xen.notes())
    if format == "flattened-kdump":
        dump.write_bytes(writer.flattened(dump.read_bytes()))
    return Subject(open_dump(str(dump)), load_symbols(str(folder / "map")), Truth(xen.content), BUILD_ID,
                   CPUS, promises.XENS_NOTES, frozenset({"CORE", "Xen"}))  # fmt: skip


def recorded(name: str) -> Subject:
    example, symbols = load(name)
    file = parsed(name)
    truth = Truth({int(address, 16): bytes.fromhex(data) for address, data in file["memory"].items()})
    build = bytes.fromhex(file["build_id"])
    if example.kind == "live":
        return Subject(example, symbols, truth, build, CPUS, promises.DEVICE_STATE)
    notes = frozenset({"CORE", "Xen", "VMCOREINFO_XEN"})
    return Subject(example, symbols, truth, build, CPUS, promises.XENS_NOTES, notes)


WRITTEN: dict[str, Callable[[Path], Subject]] = {
    **{f"synthetic-{name}": lambda folder, name=name: synthetic(folder, name)  # type: ignore[misc]
       for name in ("elf", "kdump", "flattened-kdump")},
    **{f"recorded-{name}": lambda folder, name=name: recorded(name)  # type: ignore[misc]
       for name in ("4.17-handover", "4.17-crashed-vmcore")},
}  # fmt: skip


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_made_up_target_keeps(promise: str, kind: str, tmp_path: Path) -> None:
    PROMISES[promise](WRITTEN[kind](tmp_path))


# The suite itself: each promise is broken by some target, and found.


class Liar:
    """A good target, except for what is replaced."""

    def __init__(self, target: Any, **lies: Any) -> None:
        self._target, self._lies = target, lies

    def __getattr__(self, name: str) -> Any:
        return self._lies.get(name) or getattr(self._target, name)


class Shifty(Liar):
    """Another answer each time."""

    def notes(self) -> list[Any]:
        self._lies["asked"] = asked = self._lies.get("asked", 0) + 1
        return list(self._target.notes())[asked % 2 :]


def lies(good: Any) -> dict[str, tuple[str, Liar]]:
    """Targets by what they do wrong, with the promise that this breaks first of all."""
    (start, end), *more = good.physical_ranges()
    first, *rest = good.cpus()

    def without_reason(address: int, size: int) -> Any:
        try:
            return good.read_physical(address, size)
        except Unreadable:
            raise Unreadable("") from None

    def all_or_none(requests: Any) -> list[Any]:
        answers = good.read_physical_many(requests)
        bad = next((answer for answer in answers if isinstance(answer, Absent)), None)
        return [bad] * len(answers) if bad else list(answers)

    def no_page_tables(requests: Any) -> list[Any]:
        answers = zip(requests, good.read_physical_many(requests), strict=True)
        return [bytes(size) if size == BLOCK else answer for (_, size), answer in answers]

    def cpu(**changes: Any) -> Liar:
        return Liar(good, cpus=lambda: [first._replace(**changes), *rest])

    exact, many = "bytes_are_exact_or_refused", "many_reads_are_the_single_ones_in_order"
    ranges, messages = "ranges_ascend_and_are_true", "cpus_have_what_their_source_knows"
    return {
        "short": (exact, Liar(good, read_physical=lambda at, size: good.read_physical(at, size)[:-1])),
        "made up": (exact, Liar(good, read_physical=lambda at, size: bytes(min(size, 1 << 16)))),
        "no reason": (exact, Liar(good, read_physical=without_reason)),
        "wraps": (
            "nothing_is_past_2_64",
            Liar(good, read_physical=lambda at, size: good.read_physical(at % (1 << 64), size)),
        ),
        "all or none": ("a_bad_read_among_many_leaves_the_others", Liar(good, read_physical_many=all_or_none)),
        "another order": (many, Liar(good, read_physical_many=lambda asked: good.read_physical_many(asked)[::-1])),
        "another root": (
            "xens_memory_is_the_same_whichever_cpu_is_selected",
            Liar(good, read_physical_many=no_page_tables),
        ),
        "a range too many": (ranges, Liar(good, physical_ranges=lambda: [(start, end), *more, (1 << 40, 1 << 41)])),
        "ranges descend": (ranges, Liar(good, physical_ranges=lambda: [*more, (start, end)])),
        "a flag from nowhere": (messages, cpu(halted=False)),
        "no registers": (messages, cpu(registers={})),
        "saved, not current": (messages, cpu(current=True)),
        "a note too few": (
            "notes_are_those_of_the_file",
            Liar(good, notes=lambda: [note for note in good.notes() if note.name != "Xen"]),
        ),
        "no location": ("says_what_it_is", Liar(good, location=" ")),
        "shifty": ("asking_again_gives_the_same", Shifty(good)),
    }


def test_a_broken_promise_is_found(tmp_path: Path) -> None:
    subject = synthetic(tmp_path, "elf")
    assert broken(subject) == {}
    met = set()
    for what, (promise, liar) in lies(subject.target).items():
        assert promise in broken(replace(subject, target=liar)), what
        met.add(promise)
    assert met == set(PROMISES)
