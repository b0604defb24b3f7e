"""A pytest plugin: tests of one's own Xen, on a machine of the lab that boots it. Nothing of the lab is imported unless
--xen-image is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from xen_symbols.absence import Undecidable
from xencrash.lazy import load

if TYPE_CHECKING:
    from xencrash.lab.crash import Crash
    from xencrash.lab.machine import Machine
    from xencrash.lab.specification import Specification
    from xencrash.lab.testing import Judged

_LAB = "xencrash.lab.testing"
_MARK = "xen_crash"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xencrash", "a Xen to test (fixtures xen_machine, xen_trace, xen_dump)")
    group.addoption("--xen-image", metavar="FILE", help="the xen.gz or xen of a build: booted in QEMU with a dom0")
    group.addoption("--xen-syms", metavar="FILE", help="its xen-syms; default: the one beside it, or installed")
    group.addoption("--xen-qemu", metavar="ROW", help="the lab's QEMU: 7.2 (default), 10.0 or sid")
    group.addoption("--xen-cpus", metavar="N", type=int, default=4, help="CPUs of the machine; default: 4")
    group.addoption("--xen-args", metavar="WORDS", default="", help="added to Xen's command line")
    group.addoption("--xen-output", metavar="DIR", type=Path, help="keep each test's reports, logs and vmcore in DIR")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{_MARK}(how=None, cpu=None): how xen_trace and xen_dump crash Xen, as --how and --cpu of lab run"
    )
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, whose parent has looked
        return
    if config.getoption("xen_image"):
        try:
            load(_LAB).check(_specification(config, load(_LAB).Crash()))
        except Undecidable as error:
            raise pytest.UsageError(_in_our_words(error)) from None
    elif config.getoption("xen_syms"):
        raise pytest.UsageError("--xen-syms is for --xen-image: give the image too")


def _specification(config: pytest.Config, crash: Crash) -> Specification:
    """The machine that the options ask for. Raises BadSpecification."""
    options = (config.getoption(f"xen_{name}") for name in ("image", "syms", "qemu", "cpus", "args"))
    wanted: Specification = load(_LAB).specification(*options, crash)
    return wanted


def _in_our_words(error: Exception) -> str:
    """The lab's message with the names of this plugin's options."""
    return re.sub(r"--(qemu|cpus)\b", r"--xen-\1", str(error).replace("--symbols", "--xen-syms"))


def _fail(error: Exception) -> NoReturn:
    pytest.fail(_in_our_words(error), pytrace=False)


def _crash_of(request: pytest.FixtureRequest) -> Crash:
    mark = request.node.get_closest_marker(_MARK)
    given: dict[str, Any] = mark.kwargs if mark else {}
    if mark and (mark.args or given.keys() - {"how", "cpu"}):
        pytest.fail(f"@pytest.mark.{_MARK} takes how= and cpu=, nothing else", pytrace=False)
    crash: Crash = load(_LAB).Crash(**given)
    return crash


@pytest.fixture
def xen_output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder where a test leaves its reports, logs and vmcore: one in --xen-output, or pytest's temporary one."""
    output: Path | None = request.config.getoption("xen_output")
    return output.absolute() / re.sub(r"[^\w.\[\]-]+", "-", request.node.nodeid) if output else tmp_path


@pytest.fixture
def xen_machine(request: pytest.FixtureRequest, xen_output: Path) -> Iterator[Machine]:
    """The machine with this Xen, its dom0 and a crash kernel, for this test alone: booted once, then from a snapshot.

    `dom0.run("…")` runs a command in dom0, `crash()` crashes Xen, `qmp("…")` asks QEMU, `gdb_socket` is its gdbstub."""
    if not request.config.getoption("xen_image"):
        pytest.fail("a test of Xen needs an image: give --xen-image FILE", pytrace=False)
    try:
        with load(_LAB).machine(xen_output, _specification(request.config, _crash_of(request))) as machine:
            yield machine
    except Undecidable as error:
        _fail(error)


@pytest.fixture
def xen_trace(request: pytest.FixtureRequest, xen_machine: Machine, xen_output: Path) -> Judged:
    """A crash of this Xen, followed and judged stage by stage. `assert xen_trace.verdict == "pass", xen_trace.why`"""
    try:
        trace: Judged = load(_LAB).traced(xen_machine, _crash_of(request), xen_output)
    except Undecidable as error:
        _fail(error)
    return trace


@pytest.fixture
def xen_dump(xen_machine: Machine, xen_trace: Judged, xen_output: Path) -> Judged:
    """The vmcore that the crash kernel took after `xen_trace`, judged; `path` is the file."""
    try:
        dump: Judged = load(_LAB).dumped(xen_machine, xen_trace, xen_output)
    except Undecidable as error:
        _fail(error)
    return dump
