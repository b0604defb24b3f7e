"""The Python API: the examples of docs/api.md are run, and its other promises tested."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import xen_symbols
from tests.machines.recorded import load, write_files
from xen_symbols import evaluate, open_dump
from xen_symbols.absence import Undecidable
from xen_symbols.report.model import Verdict

ROOT = Path(__file__).parents[2]
VMCORE = "4.17-crashed-vmcore"
EXAMPLES = re.findall(r"^```pycon\n(.*?)^```$", (ROOT / "docs" / "api.md").read_text(), re.S | re.M)


def test_the_documentations_examples_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, *load(VMCORE))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for number, text in enumerate(EXAMPLES):
        example = doctest.DocTestParser().get_doctest(text, names, f"example {number}", "docs/api.md", 0)
        runner.run(example, out=said.append, clear_globs=False)
        names = example.globs
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
    assert runner.tries > 20


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys, xen_symbols; print([name for name in sys.modules if name.startswith('xen_symbols.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="module 'xen_symbols' has no attribute 'nothing'"):
        xen_symbols.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    vmcore, symbols = write_files(tmp_path, *load(VMCORE))
    assert evaluate(open_dump(vmcore, symbols)).verdict is Verdict.PASS


def test_a_dump_whose_state_cannot_be_read_is_undecidable(tmp_path: Path) -> None:
    vmcore, symbols = write_files(tmp_path, *load(VMCORE))
    text = symbols.read_text()
    symbols.write_text(re.sub(r"^\S+ \S nr_cpu_ids\n", "", text, flags=re.M))
    xen = open_dump(vmcore, symbols)
    with pytest.raises(Undecidable, match=rf"^{re.escape(str(vmcore))}: .*nr_cpu_ids"):
        evaluate(xen)
