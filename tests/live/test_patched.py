"""A crash path whose patch renamed a function, followed in the reference guest by its alias and by a generation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.live.machines import gdb, guest, named, target
from xen_symbols.xen.given import Given
from xencrash.trace import trace

pytestmark = pytest.mark.live


def test_a_renamed_function_is_followed_by_its_alias(tmp_path: Path) -> None:
    renamed = tmp_path / "xen-syms"
    with guest() as lab:
        subprocess.run(["objcopy", "--redefine-sym", "do_nmi_crash=mine", lab.symbols, renamed], check=True)
        patched = ("set xen generation 4.21.0", "set xen aliases do_nmi_crash=mine")
        again = ("set xen generation", "xen crash check")
        shown = gdb(lab, *patched, "xen crash check", *again, symbols=str(renamed))
        given = Given("4.17.0", {"do_nmi_crash": "mine"})
        report = trace(target(lab), str(renamed), str(lab.qmp_socket), given, timeout=60,
                       trigger=lambda: lab.serial.send(b"C"))  # fmt: skip
    assert (named(report["findings"]), report["verdict"]) == ([], "pass")
    assert report["stages"][-1]["stage"] == "after-handover"
    assert (report["generation"]["id"], report["generation"]["given"]) == ("4.17.0", True)
    assert report["symbols"]["aliases"] == {"do_nmi_crash": "mine"}
    given, recognised = shown.split("crash path  ")[1:]
    assert given.startswith("as in Xen 4.21.0, 4.21.1 (9c20d3c591), given, not recognised: ")
    assert recognised.startswith("as in Xen 4.17 - 4.20 (e7f147bf4a): symbol do_nmi_crash; ")
