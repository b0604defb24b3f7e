"""What is released works where nothing else of this checkout is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from xen_symbols.version import VERSION

ROOT = Path(__file__).parents[2]


@pytest.mark.live
def test_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    done = subprocess.run([ROOT / "scripts/release", tmp_path], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"xencrash-{VERSION}.tar.gz", f"xencrash-{VERSION}-py3-none-any.whl",
    }  # fmt: skip
