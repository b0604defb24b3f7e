"""The gdbs that the lab can drive."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from xencrash.lab.errors import LabError
from xencrash.lab.packages import Cache
from xencrash.lab.rows import GdbRow

_PYTHON = "/usr/bin/python3"  # gdb-for-pwndbg needs a Python with a shared library; Debian's gdb brings Debian's


def gdb_words(cache: Cache, row: GdbRow) -> tuple[str, ...]:
    """The command for a row's gdb; one from PyPI is installed by pip, which checks what it fetches, at first use."""
    if not row.requirement:
        found = shutil.which("gdb", path="/usr/bin:/bin") or shutil.which("gdb")
        if not found:
            raise LabError("finding gdb: it is not installed: run scripts/setup")
        return (found,)
    environment = cache.root / "made" / f"gdb-{row.requirement}"
    gdb = environment / "bin" / "gdb"
    with cache.lock():
        if not _answers(gdb):
            cache.progress(f"installing {row.requirement}")
            shutil.rmtree(environment, ignore_errors=True)
            _install(environment, row)
    # It would ask about debuginfod, with nobody there to answer.
    return (str(gdb), "-iex", "set debuginfod enabled off")


def _install(environment: Path, row: GdbRow) -> None:
    environment.parent.mkdir(parents=True, exist_ok=True)
    pip = (str(environment / "bin" / "pip"), "--disable-pip-version-check", "install", "--quiet", row.requirement)
    for command in ((_PYTHON, "-m", "venv", str(environment)), pip):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(environment, ignore_errors=True)
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
            raise LabError(f"installing {row.requirement}: {reason}; check the network, then try again")
    if not _answers(environment / "bin" / "gdb"):
        shutil.rmtree(environment, ignore_errors=True)
        raise LabError(f"installing {row.requirement}: its gdb does not start with {_PYTHON}; is libpython3 installed?")


def _answers(gdb: Path) -> bool:
    """Whether this gdb starts and runs Python: an incomplete installation does not."""
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            done = subprocess.run(
                [gdb, "-nx", "--batch", "-iex", "set debuginfod enabled off", "-ex", "python print(6 * 7)"],
                capture_output=True,
                text=True,
                check=False,
                cwd=elsewhere,
                stdin=subprocess.DEVNULL,
            )
        except OSError:
            return False
    return done.returncode == 0 and done.stdout.strip() == "42"
