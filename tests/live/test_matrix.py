"""The default selection of the matrix: every Xen, QEMU, gdb and LAPIC mode, in pairs, crashed and judged for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from xencrash.lab.cells import cells, covering, settled
from xencrash.lab.crashes import crash_all
from xencrash.lab.errors import PackageGone
from xencrash.lab.rows import XENS

pytestmark = pytest.mark.live


@pytest.mark.timeout(1200)
def test_the_default_selection(tmp_path: Path) -> None:
    first, *others = covering(settled(cells()))
    assert first.name == "4.17-7.2-debian-xapic"  # tests/live/test_main_job.py runs it
    outcomes = crash_all(others, tmp_path, jobs=2)
    bad = [(outcome["name"], outcome["verdict"], outcome["reason"]) for outcome in outcomes
           if outcome["verdict"] != "pass" and not outcome["gone"]]  # fmt: skip
    assert bad == []
    for cell, outcome in zip(others, outcomes, strict=True):
        if outcome["gone"]:
            continue
        assert (outcome["lapic_modes"], outcome["generation"]) == ([cell.lapic], XENS[cell.xen].generation), cell
        assert outcome["crashing_cpu"] == cell.cpu or (cell.how == "key" and outcome["crashing_cpu"] in range(4)), cell
        console = (tmp_path / cell.name / "serial.log").read_text(errors="replace")
        assert f"Xen version {XENS[cell.xen].version}." in console
        assert not (tmp_path / cell.name / "vmcore").exists()
    if gone := [f"{outcome['name']}: {outcome['reason']}" for outcome in outcomes if outcome["gone"]]:
        raise PackageGone("; ".join(gone))  # all the others passed
