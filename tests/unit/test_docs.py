"""The documentation says what the tables say, and the README's commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.gendocs import DOCS, PAGES
from xencrash.cli import _parser

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_the_generated_pages_are_current(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run python -m tests.gendocs"


def test_every_subcommand_that_the_readme_names_has_help() -> None:
    help_text = _parser().format_help()
    named = set(re.findall(r"scripts/xencrash (\w+)", README))
    assert named == {"trace", "check", "info", "gdb", "lab"}
    assert all(re.search(rf"^    {name} ", help_text, re.M) for name in named)


def test_every_file_that_the_readme_links_to_exists() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[2] / link).exists(), link
