"""A test whose package is gone is skipped, visibly; anything else that goes wrong in it is still a failure."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from xencrash.lab.errors import LabError, PackageGone

def gone():
    raise PackageGone("the index of bullseye has no xen")

@pytest.fixture(scope="module")
def row():
    gone()

@pytest.fixture
def left():
    yield
    gone()

def test_in_a_fixture(row): pass
def test_in_a_fixture_again(row): pass
def test_in_the_body(): gone()
def test_another(): raise LabError("no network")
def test_as_it_cleans_up():
    try:
        assert 1 == 2
    finally:
        gone()
def test_what_it_led_to():
    with pytest.raises(LabError, match="booting"):
        gone()
def test_in_a_teardown(left): pass
def test_good(): pass
"""


def test_a_gone_package_is_one_loud_skip_and_hides_no_failure(
    pytester: pytest.Pytester, request: pytest.FixtureRequest
) -> None:
    pytester.makeconftest((request.config.rootpath / "tests/conftest.py").read_text())
    pytester.makepyfile(test_it=TESTS)
    done = pytester.runpytest("-p", "no:cacheprovider")
    done.assert_outcomes(passed=2, failed=3, errors=1, skipped=3)
    output = done.stdout.str()
    assert "3 NOT RUN, THEIR PACKAGES ARE GONE" in output
    section = output[output.index("3 NOT RUN") :].splitlines()[1:5]
    assert section == [
        "the index of bullseye has no xen",
        "    test_it.py::test_in_a_fixture",
        "    test_it.py::test_in_a_fixture_again",
        "    test_it.py::test_in_the_body",
    ]
