"""Any word that a judgement reads may be damaged: if the verdict is still `pass`, it has as many findings as before.

A hole of zeros or of ones over a word leads to a failure, to `unknown`, to a reason why nothing can be decided, or
changes nothing. Each word of what is small is tried, of page tables and of the console's ring one in sixteen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.machines.recorded import Example, load
from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.model import Report, Verdict
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.xen.locate import locate

# Each build and each stage that is recorded, once.
EXAMPLES = ("4.14-shootdown", "4.17-handover", "4.20-crashed-vmcore")
LARGE = 1024  # bytes of one read
WORD = 8


def judged(target: Example, symbols: SymbolTable) -> Report:
    return evaluate(locate(target, symbols))


def weight(report: Report) -> int:
    """How many findings its verdict rests on."""
    return sum(finding.verdict is not Verdict.SKIP for finding in report.findings)


def words(target: Example, symbols: SymbolTable, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what a judgement reads, in words; the last one of a read may be shorter."""
    reads: dict[int, int] = {}
    read = target.read_physical

    def watched(address: int, size: int) -> bytes:
        data = read(address, size)
        reads[address] = max(size, reads.get(address, 0))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(target, "read_physical", watched)
        judged(target, symbols)
    for address, size in sorted(reads.items()):
        for number, offset in enumerate(range(0, size, WORD)):
            if size < LARGE or number % 16 == address // 2048 % 16:
                yield address + offset, min(WORD, size - offset)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_pass_never_rests_on_less_than_the_clean_machines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, symbols = load(name)
    clean = weight(judged(target, symbols))
    outcomes: Counter[str] = Counter()
    weak = []
    for address, size in words(target, symbols, monkeypatch):
        held = target.read_physical(address, size)
        for damage in (b"\0" * size, b"\xff" * size):
            if damage == held:
                continue
            target.write(address, damage)
            try:
                report = judged(target, symbols)
            except Undecidable:
                outcomes["undecidable"] += 1
                continue
            finally:
                target.write(address, held)
            outcomes[str(report.verdict)] += 1
            if report.verdict is Verdict.PASS and weight(report) < clean:
                weak.append((hex(address), damage))
    assert weak == []
    assert min(outcomes[each] for each in ("fail", "unknown", "undecidable")) > 10
