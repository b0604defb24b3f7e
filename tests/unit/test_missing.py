"""What a build's symbols lack, and how it is reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.machines.recorded import load, write_files
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.crashpath.missing import missing
from xen_symbols.report.notelines import missing_lines
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.table import SymbolTable
from xencrash.cli import main

EXAMPLE = "4.17-crashed-vmcore"


def table(*names: str, kind: str = "B", text_only: bool = False) -> SymbolTable:
    rows = ListedRows([8 * number for number in range(len(names))], kind * len(names), list(names))
    return SymbolTable("m", ".map", rows, [(0, 8 * len(names))], text_only=text_only)


def names(symbols: SymbolTable, generation: str | None) -> set[str]:
    return {name for row in missing(symbols, BY_ID[generation] if generation else None) for name in row.names}


def test_what_a_generation_never_had_is_not_missing() -> None:
    some = {"waiting_to_crash", "waiting_for_crash_ipi", "kexec.c#crashing_cpu", "exception_table", "opt_fred",
            "per_cpu__crash_save_done", "trap_nop"}  # fmt: skip
    assert names(table(), None) & some == set()
    assert names(table(), "4.2.0") & some == {"waiting_for_crash_ipi"}
    assert names(table(), "4.3.0") & some == {"waiting_for_crash_ipi", "per_cpu__crash_save_done", "trap_nop"}
    mask = {"waiting_to_crash", "kexec.c#crashing_cpu", "per_cpu__crash_save_done", "trap_nop"}
    assert names(table(), "4.3.4") & some == mask | {"exception_table"}
    assert names(table(), "4.17.0") & some == names(table(), "4.21.2") & some == mask


def test_any_of_its_names_will_do_but_not_a_function_for_a_variable() -> None:
    assert names(table("per_cpu__idt", "idt_tables"), None) & {"per_cpu__idt", "idt_tables"} == set()
    assert names(table("idt_tables"), None) & {"per_cpu__idt", "idt_tables"} == set()
    assert names(table("kexecing", kind="t"), None) >= {"kexecing"}
    assert names(table("machine_kexec", "nmi"), None) >= {"machine_kexec", "nmi", "entry_NMI"}
    assert names(table("kexecing", "nmi", kind="T", text_only=True), None) & {"kexecing", "nmi"} == {"kexecing"}


def test_the_lines_for_users() -> None:
    assert missing_lines([]) == []
    rows = [{"names": ["a", "b"], "stage": None}, {"names": ["c"], "stage": None}, {"names": ["d", "e"], "stage": "x"}]
    assert missing_lines(rows) == [
        "a or b, c: what is read through them is unknown", "stages x (d or e): a trace does not stop there",
    ]  # fmt: skip


def test_info_names_all_that_an_incomplete_map_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vmcore, symbols = write_files(tmp_path, *load(EXAMPLE))
    words = ["info", str(vmcore), "--symbols", str(symbols), "--format", "json"]
    assert main(words) == 0
    before = json.loads(capsys.readouterr().out)["missing"]
    assert {row["stage"] is None for row in before} == {False}  # a recording keeps what was read, and no anchors
    symbols.write_text(re.sub(r"^\S+ \S (x86_cpu_to_apicid|kexecing|trap_nop)\n", "", symbols.read_text(), flags=re.M))
    assert main(words) == 3
    said = capsys.readouterr()
    wanted = [{"names": [name], "stage": None} for name in ("x86_cpu_to_apicid", "kexecing", "trap_nop")]
    assert json.loads(said.out)["missing"] == wanted + before
    assert said.err == "xencrash: whether Xen has begun to crash could not be read: the symbols do not name kexecing\n"
    main(words[:-2])
    assert f"{'missing':13}x86_cpu_to_apicid, kexecing, trap_nop: what is" in capsys.readouterr().out
