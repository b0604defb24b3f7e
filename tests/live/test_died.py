"""A real Xen that dies on its crash path, of a page fault planted where it would leave: by a trace, and by a dump."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.live.machines import named, ready, target
from xen_symbols import evaluate, open_dump
from xencrash.lab.planted import plant
from xencrash.trace import trace

PATIENCE = 600  # seconds: its end is seen, and not waited for


def test_what_killed_it_is_named(tmp_path: Path) -> None:
    with ready(xen="4.17") as lab:
        plant("page-fault", lab.gdb_socket, lab.symbols, lab.state.cpus, "machine_kexec")
        lab.qmp("cont")
        traced: Any = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=PATIENCE, stall=PATIENCE,
                            trigger=lab.crash)  # fmt: skip
        dumped: Any = evaluate(open_dump(lab.dumps.qemu(tmp_path / "dump"), lab.symbols)).to_json()
    crashing = traced["crashing_cpu"]
    assert named(traced["findings"]) == [("trace-complete", crashing), ("fatal-trap", crashing)]
    assert named(dumped["findings"]) == [("fatal-trap", crashing)]
    assert [report["verdict"] for report in (traced, dumped)] == ["fail", "fail"]
    assert "undecided" not in traced and "undecided" not in dumped
    assert [stage["stage"] for stage in traced["stages"]][-2:] == ["exec-entry", "crashing"]
    assert [stage["stage"] for stage in dumped["stages"]] == ["crashing"]
    for report in (traced, dumped):
        death = next(finding for finding in report["findings"] if finding["check"] == "fatal-trap")
        assert death["observed"] == "#PF at machine_kexec"
        assert death["reason"].startswith("Xen said: FATAL PAGE FAULT; [error_code=0000]; Faulting linear address: ")
    complete = next(finding for finding in traced["findings"] if finding["verdict"] == "fail")
    assert (complete["follows"], complete["observed"]) == ("fatal-trap", "exec-entry")
