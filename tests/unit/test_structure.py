"""Structural rules: who may import whom, what importing may do, and no comparison of Xen's version numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import recording

ROOT = Path(__file__).parents[2]
FOLDERS = ("xen_symbols", "gdbplugin", "scripts")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# A layer may import itself and what stands to its left.
LAYERS = ("absence", "x86", "report", "symbols", "target", "xen", "crashpath", "api")
HOMES = {
    "gdb": ("gdbplugin/",),
    "pygdbmi": ("scripts/",),
    "rich": ("xen_symbols/report/console.py", "scripts/"),
    "elftools": ("xen_symbols/symbols/", "xen_symbols/target/"),
    "cramjam": ("xen_symbols/target/decompress.py",),
    "lzallright": ("xen_symbols/target/decompress.py",),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_modules_are_found() -> None:
    assert {path.parts[len(ROOT.parts)] for path in MODULES} == set(FOLDERS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_keep_to_the_fences(path: Path) -> None:
    own = name_of(path)
    for name in imports(path):
        top = name.split(".")[0]
        homes = HOMES.get(top)
        assert homes is None or own.startswith(homes), f"{own} imports {name}"
        if own.startswith("xen_symbols/"):
            assert top not in ("gdbplugin", "xencrash", "scripts", "tests"), f"{own} imports {name}"
        if own.startswith("gdbplugin/"):
            assert top not in ("xencrash", "scripts", "tests", "pygdbmi"), f"{own} imports {name}"
        if own.startswith("scripts/"):
            assert top not in ("gdbplugin", "tests", "gdb"), f"{own} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p).startswith("xen_symbols/")], ids=name_of)
def test_layers_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "xen_symbols").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "xen_symbols" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= LAYERS.index(own), f"{own} imports {name}"


def test_importing_does_nothing() -> None:
    """Every module that needs no gdb imports without output, files or threads."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if name_of(path).startswith("xen_symbols/")
    ]
    code = (
        f"import importlib, threading\nfor n in {names!r}: importlib.import_module(n)\n"
        "assert threading.active_count() == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What judging an ELF dump by a .map takes, and nothing else: a module more costs as much as a CPU or two.
CHECK = """
xencrash xencrash.cli
xen_symbols xen_symbols.absence xen_symbols.api xen_symbols.text
xen_symbols.x86 xen_symbols.x86.apic xen_symbols.x86.gate xen_symbols.x86.paging
xen_symbols.report xen_symbols.report.jsontext xen_symbols.report.model
xen_symbols.symbols xen_symbols.symbols.buildid xen_symbols.symbols.files xen_symbols.symbols.mapfile
xen_symbols.symbols.table
xen_symbols.target xen_symbols.target.dump xen_symbols.target.elfcore xen_symbols.target.image xen_symbols.target.notes
xen_symbols.xen xen_symbols.xen.console xen_symbols.xen.crashnotes xen_symbols.xen.ist xen_symbols.xen.locate
xen_symbols.xen.memory xen_symbols.xen.state
xen_symbols.crashpath xen_symbols.crashpath.checks xen_symbols.crashpath.engine xen_symbols.crashpath.generations
xen_symbols.crashpath.position xen_symbols.crashpath.stages
""".split()
COSTLY = {"ast", "asyncio", "dataclasses", "dis", "inspect", "mmap", "pathlib", "shutil", "socket",
          "subprocess", "tempfile", "tokenize", "traceback", "urllib"}  # fmt: skip


def test_a_check_of_a_dump_imports_what_it_needs(tmp_path: Path) -> None:
    """Values, not clocks: importing is most of what a check of a dump costs (docs/benchmarks.md)."""
    vmcore, symbols = recording.write_files(tmp_path, *recording.load("4.17.0-crashed-vmcore"))
    code = (
        "import sys; before = set(sys.modules); from xencrash.cli import main\n"
        f"status = main(['check', {str(vmcore)!r}, '--symbols', {str(symbols)!r}, '--format', 'json',"
        f" '--output', {str(tmp_path / 'report')!r}])\n"
        "print(status, *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    status, *names = done.stdout.split()
    assert (status, done.stderr) == ("0", "")
    assert {name for name in names if name.split(".")[0] in FOLDERS or name.startswith("xencrash")} == set(CHECK)
    assert not COSTLY & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_compares_versions_of_xen(path: Path) -> None:
    words = {"xen_major", "xen_minor", "xen_version", "version_info"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            names = {
                getattr(part, "attr", getattr(part, "id", None)) for side in (node.left, *node.comparators)
                for part in ast.walk(side)
            }  # fmt: skip
            assert not names & words, f"{name_of(path)}:{node.lineno}"
