"""The documentation builds as a site, without a warning: no link leads nowhere, and every page is in its contents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.gendocs import DOCS


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    command = [*build, "-d", tmp_path / "kept", DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= pages.keys()
    assert 'id="xen_symbols.open_dump"' in pages["python-api"]
    for page, words in {"dumps": "check vmcore", "in-gdb": "xen crash status", "kvm": "four hardware breakpoints",
                        "reading-a-report": "it was read, and is not"}.items():  # what one looks for there
        assert words in re.sub("<[^>]+>", "", pages[page]), page
    assert re.search(r'<img[^>]* src="_images/crash-path\.svg"', pages["crash-path"])
    assert (tmp_path / "site/_images/crash-path.svg").read_text() == (DOCS / "crash-path.svg").read_text()
