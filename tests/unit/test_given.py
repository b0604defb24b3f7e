"""A patched crash path: its generation and its names are given, and the report says that they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.machines.syntheticxen import CrashedXen
from tests.schema import SCHEMA
from xen_symbols import evaluate, open_dump
from xen_symbols.absence import Undecidable
from xen_symbols.report.model import Verdict
from xen_symbols.symbols.load import load_symbols
from xen_symbols.xen.given import NOTHING_GIVEN, Given
from xencrash.cli import main
from xencrash.gdbprogram import plugin_settings

ALIAS = "do_nmi_crash=my_nmi_crash"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> CrashedXen:
    return CrashedXen(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def renamed(machine: CrashedXen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The symbols of a build whose patch renamed do_nmi_crash."""
    path = tmp_path_factory.mktemp("symbols") / "xen-syms.map"
    path.write_text(Path(machine.symbols).read_text().replace(" do_nmi_crash\n", " my_nmi_crash\n"))
    return path


def report(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    status = main(["check", "--format", "json", *words])
    made = json.loads(capsys.readouterr().out)
    jsonschema.validate(made, SCHEMA)
    return status, made


def test_a_renamed_function_is_judged_by_its_alias(
    machine: CrashedXen, renamed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump, symbols = str(machine.elf()), ("--symbols", str(renamed))
    status, without = report(capsys, dump, *symbols)
    assert status == 3 and without["generation"] is None
    assert "The nearest: 4.17.0 (11 of 13 statements hold; not so: symbol do_nmi_crash" in without["undecided"]
    status, found = report(capsys, dump, *symbols, "--alias", ALIAS)
    assert status == 0 and found["verdict"] == "pass"
    assert found["symbols"]["aliases"] == {"do_nmi_crash": "my_nmi_crash"}
    assert "given" not in found["generation"]  # which was recognised
    plain = evaluate(open_dump(machine.elf(), machine.symbols)).to_json()
    assert found["findings"] == plain["findings"] and "aliases" not in plain["symbols"]
    assert main(["check", dump, *symbols, "--alias", ALIAS]) == 0
    assert "do_nmi_crash is my_nmi_crash" in capsys.readouterr().out


def test_a_generation_that_was_given_is_not_recognised(machine: CrashedXen, capsys: pytest.CaptureFixture[str]) -> None:
    dump, symbols = str(machine.elf()), ("--symbols", str(machine.symbols))
    _, found = report(capsys, dump, *symbols, "--generation", "4.21.2")
    assert found["generation"]["id"] == "4.21.2" and found["generation"]["given"] is True
    assert "symbol do_nmi_crash" in found["generation"]["evidence"]
    assert "not so: no symbol idt_tables" in found["generation"]["evidence"]
    assert main(["check", dump, *symbols, "--generation", "4.17.0"]) == 0
    assert "crash path  as in Xen 4.17 - 4.20 (e7f147bf4a), given, not recognised: " in capsys.readouterr().out
    assert main(["info", dump, *symbols, "--generation", "4.17.0", "--alias", "nmi_crash_=nmi"]) == 0
    said = capsys.readouterr().out
    assert "given, not recognised" in said and "nmi_crash_ is nmi, as given" in said


def test_in_python(machine: CrashedXen, renamed: Path) -> None:
    aliases = {"do_nmi_crash": "my_nmi_crash"}
    memory = open_dump(machine.elf(), renamed, generation="4.17.0", aliases=aliases)
    assert evaluate(memory).verdict is Verdict.PASS
    with pytest.raises(Undecidable, match=r"--generation 4\.99: the generations are 4\.2\.0, rfc-v1"):
        evaluate(open_dump(machine.elf(), machine.symbols, generation="4.99"))


def test_names_and_addresses(renamed: Path) -> None:
    plain = load_symbols(str(renamed))
    assert plain.with_aliases({}) is plain
    table = plain.with_aliases({"do_nmi_crash": "my_nmi_crash"})
    address = plain.address("my_nmi_crash")
    assert table.address("do_nmi_crash") == table.address("my_nmi_crash") == address
    assert (table.describe(address + 4), plain.describe(address + 4)) == ("do_nmi_crash+0x4", "my_nmi_crash+0x4")
    assert table.has("do_nmi_crash") and not plain.has("do_nmi_crash")


def test_as_settings_of_the_plugin() -> None:
    plain = {"allow-build-id-mismatch": "off"}
    assert plugin_settings(None, None, NOTHING_GIVEN) == plain
    given = Given("4.17.0", {"do_nmi_crash": "mine", "nmi": "mine2"}, allow_mismatch=True)
    assert plugin_settings("/xen-syms", "localhost:4444", given) == {
        "symbols": "/xen-syms",
        "qmp-socket": "localhost:4444",
        "allow-build-id-mismatch": "on",
        "generation": "4.17.0",
        "aliases": "do_nmi_crash=mine nmi=mine2",
    }


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--alias", "do_nmi_crash"], "'do_nmi_crash' is not an alias: that is NAME=ACTUAL"),
        (["--generation", "4.99"], "invalid choice: '4.99'"),
        (["--alias", "do_nmi_crash=nothing"], "has no nothing"),
    ],
)
def test_what_cannot_be(machine: CrashedXen, words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", str(machine.elf()), "--symbols", str(machine.symbols), *words]
    try:
        assert main(command) == 3
    except SystemExit as error:
        assert error.code == 2
    assert why in capsys.readouterr().err
