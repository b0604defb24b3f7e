"""A Xen whose own table has functions only, as it is built without CONFIG_LIVEPATCH, and maps that are so: what the
table lacks is said once, and why; where Xen is, VMCOREINFO says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machines import elfwriter
from tests.machines.syntheticxen import BUILD_ID, PHYS_START, VIRT_START, CrashedXen
from xen_symbols import open_dump
from xen_symbols.absence import Undecidable
from xencrash.cli import main

TABLE = 0x300000
BUILT_WITHOUT = "it was built without CONFIG_LIVEPATCH, or is older than 4.10"
GIVE = "give its xen-syms with --symbols"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> CrashedXen:
    machine = CrashedXen(tmp_path_factory.mktemp("machine"))
    symbols = machine.xen.symbols.items()
    rows = sorted((address - VIRT_START, kind + name) for name, (address, kind) in symbols if kind in "tT")
    machine.xen.content[PHYS_START + TABLE] = elfwriter.embedded_table(rows)
    (machine.folder / "functions.map").write_text(
        "".join(f"{VIRT_START + offset:016x} {text[0]} {text[1:]}\n" for offset, text in rows)
    )
    return machine


def test_where_it_is_vmcoreinfo_says(machine: CrashedXen) -> None:
    for symbols in (None, machine.folder / "functions.map"):
        found = open_dump(machine.elf(), symbols)
        assert (found.root, found.build_id) == (machine.xen.root, BUILD_ID)
        assert found.xen_phys_start == PHYS_START
        assert found.symbols.text_only and found.symbols.describe(VIRT_START + 0x200001) == "_start+0x1"
    assert open_dump(machine.elf(), machine.symbols).root == machine.xen.root


@pytest.mark.parametrize("command", ["check", "info"])
@pytest.mark.parametrize("given", [False, True], ids=["carried", "map"])
def test_what_lacks_is_said_once(
    machine: CrashedXen, command: str, given: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path, symbols = machine.elf(), machine.folder / "functions.map"
    assert main([command, str(path), *(["--symbols", str(symbols)] if given else [])]) == 3
    out, err = capsys.readouterr()
    table = f".map ({symbols})" if given else f"table embedded in Xen ({path})"
    why = "the build of a Xen before 4.15 leaves variables out" if given else BUILT_WITHOUT
    assert err == f"xencrash: the {table} has functions and no variables: {why}; {GIVE}\n"
    assert "text symbols only" not in out
    if command == "info":
        assert f"Xen          at physical {PHYS_START:#x}, found by xen_phys_start in the crash info note\n" in out
        assert f"build-id     {'none' if given else BUILD_ID.hex()}, in memory {BUILD_ID.hex()}\n" in out


def test_without_vmcoreinfo(machine: CrashedXen) -> None:
    path = machine.elf(notes=machine.xen.notes())
    with pytest.raises(Undecidable) as error:
        open_dump(path, machine.folder / "functions.map")
    assert str(error.value) == (
        f"the .map ({machine.folder / 'functions.map'}) has functions and no variables: the build of a Xen before 4.15 "
        f"leaves variables out; {GIVE}"
    )


def test_a_raw_image(machine: CrashedXen, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 4 << 30)
        for address, data in machine.xen.content.items():
            file.seek(address)
            file.write(data)
    with pytest.raises(Undecidable) as error:
        open_dump(path, base=0)
    text = str(error.value)
    start, _, rest = text.partition(" in ")
    assert start.startswith("the symbol table of a Xen at physical 0x")
    assert PHYS_START + TABLE < int(start.rpartition(" ")[2], 16) < PHYS_START + TABLE + 0x10000
    assert rest == (
        f"{path} has functions and no variables, by which its page tables cannot be found: {BUILT_WITHOUT}; {GIVE}"
    )
