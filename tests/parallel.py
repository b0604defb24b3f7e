"""How tests are distributed to several processes (pytest-xdist, as scripts/test runs it): tests that share a machine go
together, and long ones go first, so that the run does not wait for them at the end."""

from __future__ import annotations

import pytest

# The longest first: real Xens, then all others that start a machine, then fuzzing; the rest is last.
FIRST = (*(f"tests/live/test_{name}.py" for name in ("matrix", "main_job", "dumps", "uneven", "lab")),
         "tests/live/", "tests/contract/", "fuzz")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not getattr(config.option, "loadgroup", False):  # what xdist sets in each of its processes; `dist` is "no" there
        return
    for item in items:
        if group := group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: next((at for at, part in enumerate(FIRST) if part in item.nodeid), len(FIRST)))


def group_of(item: pytest.Item) -> str | None:
    """What runs in one process: tests of a file that share a fixture, with the same parameter if it has any; and the
    tests of a file that start no machine, except fuzzing (None: the test runs by itself)."""
    fixtures = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    shared = sorted(name for name, made in fixtures.items() if made[-1].scope == "module")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if shared:
        return "-".join([item.path.stem, *(f"{parameters[name]}" for name in shared if name in parameters)])
    return None if item.get_closest_marker("live") or "fuzz" in item.path.stem else item.path.stem
