"""Dumps that lost their end: a full disk, a killed writer, a copy that broke off.

Each opens with what it holds, says that it is truncated and where it ends, and never says more than that; or it is
refused in a line. What contradicts itself is refused: test_dump_elf.py, test_dump_kdump.py.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.machines import dumpwriter as writer
from tests.machines import recorded
from tests.machines.syntheticxen import CrashedXen
from xen_symbols import api
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.report.model import Report
from xen_symbols.targets.dump import Dump, open_dump
from xen_symbols.x86.paging import PAGE_SIZE as PAGE
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.locate import locate
from xencrash.cli import main

Made = tuple[bytes, Path]  # a whole dump, and its symbols


def real(name: str, seed: int) -> Callable[[Path], Made]:
    """What one judgement reads of a real vmcore, in another order, so that what is lost first is another thing."""

    def make(folder: Path) -> Made:
        target, symbols = recorded.load(name)
        _, listed = recorded.write_files(folder / "made", target, symbols)
        ranges = list(target.physical_ranges())
        random.Random(seed).shuffle(ranges)
        content = {start: target.read_physical(start, end - start) for start, end in ranges}
        notes = b"".join(writer.note(note.name, note.type, note.desc) for note in target.notes())
        return writer.made(writer.write_elf, ranges, content, notes), listed

    return make


def synthetic(write: Callable[..., None], piece: int = 0, **options: Any) -> Callable[[Path], Made]:
    """The pages that hold something, those of the CPUs last: most of the file is needed for the verdict."""

    def make(folder: Path) -> Made:
        machine = CrashedXen(folder, cpus=12, table=0x108000)
        content = machine.xen.content
        pages = {page for at, data in content.items() for page in range(at // PAGE, (at + len(data) - 1) // PAGE + 1)}
        ranges = [(page * PAGE, (page + 1) * PAGE) for page in sorted(pages)]
        data = writer.made(write, ranges, content, machine.notes, **options)
        return writer.flattened(data, piece) if piece else data, machine.symbols

    return make


SHAPES: dict[str, Callable[[Path], Made]] = {
    "vmcore of 4.17": real("4.17-crashed-vmcore", 5),
    "vmcore of 4.20": real("4.20-crashed-vmcore", 2),
    "kdump": synthetic(writer.write_kdump),
    "kdump, uncompressed": synthetic(writer.write_kdump, compression=0),
    "flattened vmcore": synthetic(writer.write_elf, piece=30_000),
    "flattened kdump": synthetic(writer.write_kdump, piece=1000),
}


def judged(path: Path, symbols: Path) -> Report:
    return api.evaluate(api.open_dump(path, symbols))


def findings(report: Report) -> dict[tuple[str, int | None], tuple[str, object, object]]:
    return {(f.check, f.cpu): (str(f.verdict), f.expected, f.observed) for f in report.findings}


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_at_every_percent_it_never_says_more_than_is_held(shape: str, tmp_path: Path) -> None:
    data, symbols = SHAPES[shape](tmp_path)
    keep, path = tmp_path / "whole", tmp_path / "cut"
    keep.write_bytes(data)
    whole, original = judged(keep, symbols), open_dump(str(keep))
    said, verdicts = findings(whole), set()
    assert str(whole.verdict) == "pass" and "warnings" not in whole.target
    for percent in range(100):
        size = len(data) * percent // 100
        path.write_bytes(data[:size])
        try:
            report = judged(path, symbols)
        except Undecidable as error:
            assert str(path) in str(error) and "\n" not in str(error), percent
            verdicts.add("refused")
        else:
            (warning,) = report.target["warnings"]
            assert f"truncated: it ends at offset {size:#x}" in warning, percent
            for key, finding in findings(report).items():
                assert finding[0] == "unknown" or finding == said[key], f"{percent} %: {key}"
            verdicts.add(str(report.verdict))
        hold_no_more(path, original)
    assert "refused" in verdicts and len(verdicts) > 1, verdicts


def hold_no_more(path: Path, original: Dump) -> None:
    """What can be read of a cut dump is what the whole one has there, and what its ranges say."""
    try:
        dump = open_dump(str(path))
    except Undecidable:
        return
    ranges = list(dump.physical_ranges())
    for start, end in [*ranges[:3], *ranges[-3:]]:
        size = min(end - start, 5000)
        for at in (start, end - size):
            assert dump.read_physical(at, size) == original.read_physical(at, size)
    held = sum(end - start for start, end in ranges)
    assert held <= sum(end - start for start, end in original.physical_ranges())
    if ranges and dump.truncated:
        with pytest.raises(Unreadable):
            dump.read_physical(ranges[-1][1], 1)


RANGES = [(0x0, 0xA000), (0x100000, 0x104000)]
CONTENT = {0x1234: b"hello", 0x9000: bytes(range(256)) * 16, 0x103FF0: b"the last byte is lost"[:16]}
NOTES = writer.xen_notes([{"rip": cpu, "rsp": 8, "cr3": 0x1000} for cpu in (1, 2)], writer.crash_info())
ELF = writer.made(writer.write_elf, RANGES, CONTENT, NOTES)
KDUMP = writer.made(writer.write_kdump, RANGES, CONTENT, NOTES, compression=0)
NOTES_AT = 64 + 3 * 56  # in ELF
BITMAPS_AT, TABLE_AT = 3 * 4096, 5 * 4096  # in KDUMP; its page of zeros comes first, then those of CONTENT
PAGES_AT = TABLE_AT + 24 * 14


def changed(data: bytes, at: int, form: str, *values: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(form, out, at, *values)
    return bytes(out)


def record(number: int, data: bytes = b"", piece: int = 4096) -> int:
    """Where a record of a flattened file begins, and some of it."""
    return 4096 + number * (16 + piece) + len(data)


# The input -> how it is truncated, what of CONTENT (address) is held and what is lost, with the reason, and the CPUs.
HELD: dict[str, tuple[bytes, str, tuple[int, ...], dict[int, str], int]] = {
    "the last bytes of an ELF core": (
        ELF[:-16], f"it ends at offset {len(ELF) - 16:#x}, its memory at {len(ELF):#x}",
        (0x1234, 0x9000), {0x103FF0: "is lost: the file is truncated: it ends at offset"}, 2),
    "all of its last segment": (
        ELF[:-0x4000], "its memory at", (0x1234, 0x9000), {0x103FF0: "is lost"}, 2),
    "more than its last segment": (
        ELF[:-0x5000], "its memory at", (0x1234,), {0x9000: "is lost", 0x103FF0: "lost"}, 2),
    "all of its memory": (ELF[: NOTES_AT + len(NOTES)], "its memory at", (), {0x1234: "lost", 0x103FF0: "lost"}, 2),
    "some of its notes": (ELF[: NOTES_AT + 500], "its memory at", (), {0x1234: "lost"}, 1),
    "all of its notes": (ELF[:NOTES_AT], "its memory at", (), {0x1234: "lost"}, 0),
    "a segment that lies beyond the end": (
        changed(ELF, 64 + 56 + 8, "<Q", 1 << 40), "its memory at 0x1000000a000", (0x103FF0,), {0x1234: "lost"}, 2),
    "notes that lie beyond the end": (
        changed(ELF, 64 + 8, "<Q", 1 << 40), "its memory at 0x100000", (0x1234, 0x9000, 0x103FF0), {}, 0),
    "program headers that were never written": (
        changed(ELF, 64 + 56, "<7Q", *bytes(7)), "1 of its 3 program headers were never written",
        (0x103FF0,), {0x1234: "is not in the dump"}, 2),
    "the last byte of a kdump": (
        KDUMP[:-1], f"it ends at offset {len(KDUMP) - 1:#x}, its last page at {len(KDUMP):#x}",
        (0x1234, 0x9000), {0x103FF0: "the file ends at 0x"}, 2),
    "all of its pages": (
        KDUMP[:PAGES_AT], "its last page at", (), {0x1234: "the file ends at", 0x5000: "the file ends at"}, 2),
    "its pages but that of zeros": (
        KDUMP[: PAGES_AT + 4096], "its last page at", (0x5000,), {0x1234: "the file ends at"}, 2),
    "some of its page descriptors": (
        KDUMP[: TABLE_AT + 30], "its page descriptors at", (), {0x1234: "the file ends at"}, 2),
    "some of its second bitmap": (
        KDUMP[: BITMAPS_AT + 4100], "its bitmaps at", (), {0x1234: "not known whether the dump has it: the file"}, 2),
    "all of its bitmaps": (
        KDUMP[:BITMAPS_AT], "its bitmaps at", (), {0x1234: "not known", 0x103FF0: "not known"}, 2),
    "some of its sub header": (KDUMP[: 2 * 4096 + 500], "its bitmaps at", (), {0x1234: "not known"}, 1),
    "pages that were never written": (
        changed(KDUMP, TABLE_AT + 24 * 13, "<3Q", 0, 0, 0), "its last pages were never written",
        (0x1234, 0x9000), {0x103FF0: "its writer never wrote this page"}, 2),
    "the end mark of a flattened ELF core": (
        writer.flattened(ELF)[:-16], "without its end mark", (0x1234, 0x9000, 0x103FF0), {}, 2),
    "some of a flattened ELF core's last record": (
        writer.flattened(ELF)[:-50], "without its end mark", (0x1234, 0x9000), {0x103FF0: "is lost"}, 2),
    "half of a flattened ELF core": (
        writer.flattened(ELF, 4096)[: record(3)], "without its end mark", (0x1234,), {0x9000: "is lost"}, 2),
    "a flattened kdump in the head of a record": (
        writer.flattened(KDUMP, 4096)[: record(7) + 7], "without its end mark",
        (0x5000,), {0x1234: "the flattened dump has nothing"}, 2),
    "a flattened kdump in its second bitmap": (
        writer.flattened(KDUMP, 4096)[: record(4) + 20], "without its end mark", (), {0x1234: "not known"}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_is_read_and_what_is_lost_says_so(name: str, tmp_path: Path) -> None:
    data, how, held, lost, cpus = HELD[name]
    (tmp_path / "dump").write_bytes(data)
    dump = open_dump(str(tmp_path / "dump"))
    assert dump.truncated is not None and "the file is truncated" in dump.truncated and how in dump.truncated
    for address in held:
        wanted = CONTENT.get(address, bytes(16))
        assert dump.read_physical(address, len(wanted)) == wanted
    for address, why in lost.items():
        with pytest.raises(Unreadable) as raised:
            dump.read_physical(address, 16)
        assert str(raised.value).startswith("physical 0x")
        assert why in str(raised.value)
    assert len(dump.cpus()) == cpus
    readable = [any(start <= at < end for start, end in dump.physical_ranges()) for at in (*held, *lost)]
    assert readable == [True] * len(held) + [False] * len(lost)


REFUSED = {
    "an ELF core in its header": (ELF[:60], "ELF header: the file ends at 0x3c"),
    "an ELF core in its program headers": (ELF[:100], "3 program headers: the file ends at 0x64"),
    "a kdump in its header": (KDUMP[:400], "kdump header: the file ends at 0x190"),
    "a kdump in its sub header": (KDUMP[:4150], "kdump sub header: the file ends at 0x1036"),
    "a flattened file before its first record": (
        writer.flattened(ELF)[:4100], "a flattened dump that ends at offset 0x1004, before its first record"),
    "a flattened file in its first record": (
        writer.flattened(KDUMP)[: record(0) + 20], "a flattened file with neither"),
    "a record larger than any": (
        changed(writer.flattened(ELF), 4096 + 8, ">q", 1 << 40), "the flattened piece at 0x1000 claims 1099511627776"),
    "a segment beyond all files": (
        changed(ELF, 64 + 56 + 8, "<Q", (1 << 63) - 1), "program header 1: its memory ends at offset 0x8"),
    "bitmaps that do not fit the frames": (
        changed(KDUMP, 0x1B4, "<I", 4000), "kdump header +0x1b4: the bitmaps end at offset"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_without_a_header_or_with_one_that_cannot_be_it_is_refused(name: str, tmp_path: Path) -> None:
    data, says = REFUSED[name]
    (tmp_path / "dump").write_bytes(data)
    with pytest.raises(Undecidable) as raised:
        open_dump(str(tmp_path / "dump"))
    assert str(raised.value).startswith(f"{tmp_path / 'dump'}: {says}")


def test_the_command_says_where_a_dump_ends_and_judges_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page that no verdict needs is lost: the verdict stands. Then the gates of one CPU: they are unknown."""
    target, symbols = recorded.load("4.17-crashed-vmcore")
    dump, listed = recorded.write_files(tmp_path / "made", target, symbols)
    xen = api.open_dump(dump, listed)
    gates = xen.physical(idt_address(xen, 2)) & -PAGE
    spare = (1 << 40, (1 << 40) + PAGE)
    ranges = [each for each in target.physical_ranges() if each[0] & -PAGE != gates]
    last = [each for each in target.physical_ranges() if each[0] & -PAGE == gates]
    content = {start: target.read_physical(start, end - start) for start, end in [*ranges, *last]}
    notes = b"".join(writer.note(note.name, note.type, note.desc) for note in target.notes())
    data = writer.made(writer.write_elf, [*ranges, *last, spare], content, notes)
    cut = tmp_path / "cut"

    cut.write_bytes(data[:-100])
    assert main(["check", str(cut), "--symbols", str(listed)]) == 0
    assert f"the file is truncated: it ends at offset {len(data) - 100:#x}, its" in capsys.readouterr().out
    assert main(["info", str(cut), "--symbols", str(listed)]) == 0
    assert f"the file is truncated: it ends at offset {len(data) - 100:#x}, its" in capsys.readouterr().out

    cut.write_bytes(data[: -PAGE - 1])
    report = judged(cut, listed)
    assert main(["check", str(cut), "--symbols", str(listed)]) == 3
    unknown = {(f.check, f.cpu): f.reason for f in report.findings if str(f.verdict) == "unknown"}
    assert {cpu for _, cpu in unknown} == {2} and {"nmi-gate-handler", "mc-gate-ist"} <= {check for check, _ in unknown}
    assert all("is lost: the file is truncated: it ends at offset" in (why or "") for why in unknown.values())


@pytest.mark.parametrize("level", [1, 2, 3])
def test_without_the_page_tables_of_the_image_its_place_is_known(level: int, tmp_path: Path) -> None:
    """Xen's image is one piece: a page of its page tables at the end of the file is no reason to refuse all of it."""
    target, symbols = recorded.load("4.17-crashed-vmcore")
    walked = [locate(target, symbols).walk(symbols.address(name)).entries for name in ("idle_pg_table", "kexecing")]
    lost = {entries[level][1] & -PAGE for entries in walked if level < len(entries)}
    ranges = sorted(target.physical_ranges(), key=lambda each: each[0] & -PAGE in lost)
    content = {start: target.read_physical(start, end - start) for start, end in ranges}
    notes = b"".join(writer.note(note.name, note.type, note.desc) for note in target.notes())
    data = writer.made(writer.write_elf, ranges, content, notes)
    cut = tmp_path / "cut"
    cut.write_bytes(data[: len(data) - sum(end - start for start, end in ranges if start & -PAGE in lost)])
    report = api.evaluate(locate(open_dump(str(cut)), symbols))
    whole = findings(api.evaluate(locate(target, symbols)))
    said = findings(report)
    assert {key for key in said if said[key][0] != "unknown" and said[key] != whole[key]} == set()
    assert level == 1 or str(report.verdict) == "pass"  # that of level 1 maps more than the image
