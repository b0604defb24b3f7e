"""What all tests share: a package that its source no longer has is not our failure, and is reported.

Old suites leave the mirrors one day. A test that needs such a package is skipped, and a section at the end of the run
says which and why. This applies to that error only: not to one caused by another, and not to its consequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel import pytest_collection_modifyitems  # noqa: F401 # a hook
from xencrash.lab.errors import PackageGone
from xencrash.lab.images import qemu_words, xen_images
from xencrash.lab.packages import Cache
from xencrash.lab.rows import DEFAULT_QEMU, DEFAULT_XEN, QEMUS, XENS

_GONE = "ITS PACKAGE IS GONE: "


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-rows", action="store_true",
        help="the changes of memory in every row of the lab, not in a few; each crash under KVM with both irqchips",
    )  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_kvm_too.py" and not config.getoption("all_rows") else None


_LONGEST_ID = 80


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Contents of files by their size: some have megabytes, and not the same bytes in each process."""
    return f"{argname} of {len(val)}" if isinstance(val, (bytes, str)) and len(val) > _LONGEST_ID else None


@pytest.fixture(scope="session")
def default_row() -> None:
    """The packages of the Xen and the QEMU that the lab takes by default, for a test that starts a command which
    needs them, or looks at how a boot fails."""
    cache = Cache()
    xen_images(cache, XENS[DEFAULT_XEN])
    qemu_words(cache, QEMUS[DEFAULT_QEMU])


def _skip_where_gone(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    error = outcome.exception  # type: ignore[attr-defined] # pluggy's Result
    if isinstance(error, PackageGone) and error.__context__ is None:
        outcome.force_exception(pytest.skip.Exception(f"{_GONE}{error}"))  # type: ignore[attr-defined]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield from _skip_where_gone(item)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from _skip_where_gone(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    not_run: dict[str, str] = {}  # why, by test; the reports may come from other processes
    for report in terminalreporter.getreports("skipped"):
        words = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if _GONE in words:
            not_run[report.nodeid] = words.partition(_GONE)[2]
    if not_run:
        terminalreporter.section(f"{len(not_run)} NOT RUN, THEIR PACKAGES ARE GONE", red=True, bold=True)
    for reason in dict.fromkeys(not_run.values()):
        terminalreporter.write_line(reason)
        for test in (test for test, why in not_run.items() if why == reason):
            terminalreporter.write_line(f"    {test}")
