"""What users see, word for word (tests/texts.py)."""

from __future__ import annotations

import pytest

from tests.texts import BY_NAME, FOLDER, TEXTS, path_of, shown
from xen_symbols.report.blocks import report_blocks


@pytest.mark.parametrize("name", TEXTS)
def test_each_text_is_shown_as_reviewed(name: str) -> None:
    assert shown(name) == path_of(name).read_text(), "if it is as it should be: python -m tests.texts"


def test_every_text_is_used_and_every_command_has_one() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(TEXTS)
    # Some show a report; its wording is in the texts of reports.
    commands = [name for name, command in BY_NAME.items() if command.blocks is not report_blocks]
    assert [name for name in commands if f"gdb-{'-'.join(name.split()[1:])}" not in TEXTS] == []
