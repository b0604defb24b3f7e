"""The documentation agrees with the tables, and the README's commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import genterminal
from tests.gendocs import DOCS, PAGES
from xen_symbols.crashpath.generations import GENERATIONS
from xencrash import commands
from xencrash.lab.rows import XENS
from xencrash.subcommands import every, find

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WRITTEN = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_the_generated_pages_are_current(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run python -m tests.gendocs"


def test_the_terminal_in_the_readme_shows_what_a_trace_prints_now() -> None:
    """By its words: another rich draws the same ones in another way."""
    shown = (DOCS / "trace.svg").read_text()
    assert genterminal.words(shown) == genterminal.words(genterminal.picture()), "run python -m tests.gendocs"
    assert "nmis-unblocked" in genterminal.words(shown)
    assert re.findall(r"https?://[^ \"'<]+", shown.replace("http://www.w3.org/2000/svg", "")) == ["https://www.textualize.io"]


def test_where_each_generation_was_seen() -> None:
    page = PAGES["reference.md"]().splitlines()
    shown = {row.split(" | ")[0].removeprefix("| "): row for row in page if row.count(" | ") == 5}
    for generation in GENERATIONS:
        said = shown[generation.id].removesuffix(" |").rpartition(" | ")[2]
        lab = {xen.name for xen in XENS.values() if xen.generation == generation.id}
        assert {name for name in generation.judged_on if name in XENS} == lab
        assert {name.removesuffix(" (lab)") for name in said.split(", ") if name.endswith("(lab)")} == lab
        assert (said == "**the reference guest only**") is (not generation.judged_on)
    assert {row.id for row in GENERATIONS if not row.judged_on} == {"rfc-v1", "rfc-v1-fixed"}  # never released


def test_every_subcommand_that_the_readme_names_has_help() -> None:
    help_text = find(commands, "xencrash", [])[0].format_help()
    named = set(re.findall(r"scripts/xencrash (\w+)", README))
    assert named == {"trace", "check", "preflight", "info", "log", "summary", "gdb", "lab", "render"}
    assert all(re.search(rf"^    {name}\b", help_text, re.M) for name in named)


def test_every_file_that_a_page_links_to_exists() -> None:
    links = [(page, link) for page in WRITTEN for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    assert {ROOT / "README.md", DOCS / "api.md", DOCS / "supporting-another-xen.md"} <= {page for page, _ in links}
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
    linked = {(page.parent / link).resolve() for page, link in links if page.name == "README.md"}
    listed = set((DOCS / "index.md").read_text().split())  # in the site's contents
    unlisted = {page for page in WRITTEN if page.stem not in listed} - linked
    assert {page.name for page in unlisted} == {"README.md", "index.md"}  # each page can be found


def test_every_option_that_a_page_names_exists() -> None:
    """In a command of ours, as `xencrash trace … --qmp SOCKET`, or by itself, as `--qmp`."""
    named = {
        (page.name, option)
        for page in WRITTEN
        for ours in re.findall(r"xencrash (?:check|info|trace|gdb|lab)\b[^`\n#]*|`--[^`\n]*", page.read_text())
        for option in re.findall(r"--[a-z][a-z-]+", ours)
    }
    assert {"--qmp", "--symbols", "--gates", "--output", "--domu-vcpus"} <= {option for _, option in named}
    others = {("benchmarks.md", "--python"), ("README.md", "--all-rows")}  # of the benchmark, of the tests
    known = {word for parser in every(commands, "xencrash") for word in parser._option_string_actions}
    assert {(page, option) for page, option in named if option not in known} - others == set()
