"""Dealing tests to processes works with the pytest and the pytest-xdist that are installed.

What shares a machine shares a process, or every machine would be made once in each.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SOME = """
import pytest

@pytest.fixture(scope="module", params=["a", "b", "c"])
def machine(request):
    return request.param

@pytest.mark.parametrize("change", range(4))
def test_one(machine, change):
    pass

def test_other(machine):
    pass

@pytest.mark.live
@pytest.mark.parametrize("change", range(8))
def test_alone(change):
    pass
"""


def test_what_shares_a_machine_shares_a_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.parallel import pytest_collection_modifyitems\n")
    (tmp_path / "test_some.py").write_text(SOME)
    root = Path(__file__).resolve().parents[2]
    words = ["-v", "-n", "3", "--dist", "loadgroup", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--rootdir", tmp_path, tmp_path / "test_some.py"],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"^\[(gw\d)\] .* PASSED \S*::(\S+?)\[([abc])?[^@\s]*(?:@(\S+))?", done.stdout, re.MULTILINE)
    processes = defaultdict(set)
    for process, name, machine, group in ran:
        assert group == (f"test_some-{machine}" if name != "test_alone" else ""), (name, machine)
        processes[machine].add(process)
    assert len(ran) == 3 * 4 + 3 + 8
    assert [len(processes[machine]) for machine in "abc"] == [1, 1, 1]
