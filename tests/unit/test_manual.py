"""The manual page and the completions, which a wheel has (setup.py)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from xencrash import commands, manual
from xencrash.subcommands import every


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("xencrash lab ru", ["run"]),
        ("xencrash pre", ["preflight"]),
        ("xencrash lab run --lapic x2", ["x2apic", "x2apic-firmware"]),
        ("xencrash check --format h", ["html"]),
        ("xencrash check vmc", ["vmcore", "vmcore.old"]),
    ],
)
def test_bash_completes(tmp_path: Path, typed: str, offered: list[str]) -> None:
    for name in ("vmcore", "vmcore.old", "other"):
        (tmp_path / name).touch()
    (tmp_path / "completion").write_text(manual.completion("bash"))
    script = """
        source ./completion
        read -ra COMP_WORDS <<<"$1"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_LINE=$1; COMP_POINT=${#1}
        [[ $(complete -p xencrash) =~ -F\\ ([^ ]+) ]]
        "${BASH_REMATCH[1]}" xencrash "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", typed], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("shell", manual.COMPLETIONS)
def test_every_option_can_be_completed(shell: str) -> None:
    text = manual.completion(shell)
    options = {word for parser in every(commands, "xencrash") for word in parser._option_string_actions}
    assert {option for option in options if option.lstrip("-") not in text} == set()


def test_the_manual_page_has_every_command_and_the_exit_status() -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou"], input=manual.page(), capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert done.stderr == ""  # no warnings
    for parser in list(every(commands, "xencrash"))[1:]:
        assert re.search(rf"^ +{parser.prog}$", done.stdout, re.M), parser.prog
    assert re.search(r"^COMMANDS$", done.stdout, re.M)
    assert re.search(r"^ +1  at least one check failed +3  could not be decided", done.stdout, re.M)
    assert re.search(r"^NAME\n +xencrash +- +\w", done.stdout, re.M)
