"""How tests are dealt to several processes (pytest-xdist, as scripts/test runs it): together what shares a machine, and
what takes long first, so that none waits for the last of it at the end."""

from __future__ import annotations

import pytest

# What takes longest, first: real Xens, then all else that starts a machine, then damage at random; the rest is last.
FIRST = (*(f"tests/live/test_{name}.py" for name in ("matrix", "main_job", "dumps", "uneven", "lab")),
         "tests/live/", "tests/contract/", "fuzz")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("dist", "no") != "loadgroup":
        return
    for item in items:
        if group := group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: next((at for at, part in enumerate(FIRST) if part in item.nodeid), len(FIRST)))


def group_of(item: pytest.Item) -> str | None:
    """What runs in one process: tests of a file that share a fixture, with the same parameter if that has any; and the
    tests of a file that start no machine, but for those that damage something at random (None: it goes by itself)."""
    fixtures = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    shared = sorted(name for name, made in fixtures.items() if made[-1].scope == "module")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if shared:
        return "-".join([item.path.stem, *(f"{parameters[name]}" for name in shared if name in parameters)])
    return None if item.get_closest_marker("live") or "fuzz" in item.path.stem else item.path.stem
