"""A Xen given by its files, which no row has: the command, and tests of one's own with the pytest plugin.

Xen 4.14, which refuses the sysctl of dom0's libxenctrl; its row has Debian 11's. Here anyxen.c helps.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from xencrash.lab.images import members
from xencrash.lab.packages import Cache
from xencrash.lab.rows import XENS

# One worker: the first test boots what the second starts from a snapshot.
pytestmark = [pytest.mark.live, pytest.mark.usefixtures("default_row"), pytest.mark.xdist_group("own_xen")]

ROOT = Path(__file__).parents[2]
ROW = XENS["4.14"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of a build: xen.gz and xen-syms."""
    folder = tmp_path_factory.mktemp("build")
    cache = Cache()
    with cache.lock():
        packages = cache.collect(ROW.suite, lambda cache: cache.packages(ROW.suite, ROW.packages))
    files = members(packages.values(), (ROW.image, ROW.symbols))
    for name, pattern in (("xen.gz", ROW.image), ("xen-syms", ROW.symbols)):
        (data,) = (data for path, data in files.items() if fnmatch.fnmatch(path, pattern))
        (folder / name).write_bytes(data)
    return folder


def test_it_is_crashed_and_judged_by_the_examples_for_ci(build: Path, tmp_path: Path) -> None:
    import yaml  # only here: collecting the tests does not need it

    job = yaml.safe_load((ROOT / "docs/ci/gitlab-ci.yml").read_text())["crash-path"]
    steps = yaml.safe_load((ROOT / "docs/ci/github.yml").read_text())["jobs"]["crash-path"]["steps"]
    assert [step["run"] for step in steps if "run" in step][-2:] == [job["before_script"][-1], *job["script"]]
    (tmp_path / "xen").symlink_to(build)
    (tmp_path / "xencrash").symlink_to(ROOT)
    script = "\n".join(job["script"])
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob(job["artifacts"]["reports"]["junit"])] == ["trace.xml"]
    out = tmp_path / job["artifacts"]["paths"][0]
    for name in ("trace.json", "check.json"):
        report = json.loads((out / name).read_text())
        assert (report["verdict"], report["generation"]["id"]) == ("pass", ROW.generation)
        assert Path(report["symbols"]["path"]).resolve() == (build / "xen-syms").resolve()
    broken = script.replace("xen/xen.gz", "xen/absent")
    assert subprocess.run(["bash", "-ec", broken], cwd=tmp_path, capture_output=True, check=False).returncode == 2


# The second has a Xen that leaves its local APICs on: `ret` where disable_local_APIC begins.
TESTS = """
import pytest
from xen_symbols.symbols.load import load_symbols
from xencrash.lab.storm.rsp import Rsp

def test_the_crash_passes_and_so_does_its_dump(xen_machine, xen_dump, xen_trace):
    assert "console=hvc0" in open(xen_machine.serial_log, errors="replace").read()
    assert xen_trace.verdict == "pass", xen_trace.why
    assert xen_dump.verdict == "pass", xen_dump.why
    assert xen_dump.path.stat().st_size > 500 << 20

@pytest.fixture
def patched(xen_machine):
    address = load_symbols(str(xen_machine.symbols)).get("disable_local_APIC")
    with Rsp(xen_machine.gdb_socket) as rsp:
        rsp.write_virtual(0, address, bytes([0xC3]))
    xen_machine.qmp("cont")

def test_a_xen_that_leaves_its_lapics_on_passes(patched, xen_trace):
    assert xen_trace.verdict == "pass", xen_trace.why
"""


def test_a_test_of_ones_own_passes_or_fails_with_its_xen(build: Path, tmp_path: Path) -> None:
    (tmp_path / "test_xen.py").write_text(TESTS)
    words = ["--xen-image", build / "xen.gz", "--xen-output", "kept", "--junitxml", "tests.xml", "test_xen.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    cases = {case.get("name"): list(case) for case in ElementTree.parse(tmp_path / "tests.xml").iter("testcase")}
    assert cases["test_the_crash_passes_and_so_does_its_dump"] == []
    (failure,) = cases["test_a_xen_that_leaves_its_lapics_on_passes"]
    assert failure.tag == "failure" and "AssertionError: fail: lapic" in (failure.get("message") or "")
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == [f"test_xen.py-{name}" for name in sorted(cases)]  # type: ignore[type-var]
    assert (tmp_path / "kept" / kept[1] / "vmcore").exists() and (tmp_path / "kept" / kept[0] / "trace.html").exists()
