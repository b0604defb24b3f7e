"""Structural rules: who may import whom, what importing may do, no comparison of version numbers, and citations."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


# -- Evidence, never version numbers ----------------------------------------------------------

# Names that hold a version, and words that are one: 4.17, 4\\.17, 4.17.0, 4.17-.
VERSION_NAME = re.compile(r"version|release|major|minor", re.IGNORECASE)
VERSION_WORD = re.compile(r"[0-9]{1,2}\\?\.[0-9]{1,3}(?![0-9])")
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
COMPARING_CALLS = {"startswith", "endswith", "match", "fullmatch", "search", "fnmatch", "index", "count", "find"}
COMPARING_MODULES = {"packaging", "distutils", "pkg_resources", "looseversion", "semver", "operator"}

# Comparisons of what is called a version and is none of Xen's: of a file's layout, which the file itself names.
OTHER_VERSIONS = {
    ("xen_symbols/target/qemu_state.py", "version > 64"): "no section header has such a one",
    ("xen_symbols/target/qemu_state.py", "section.name not in _VERSIONS"): "which sections are read",
    ("xen_symbols/target/qemu_state.py", "section.version != _VERSIONS[section.name]"): "of a section's layout",
    ("xen_symbols/target/kdump.py", "version >= 6"): "header_version, which says which fields the header has",
    ("xen_symbols/target/kdump.py", "version >= 4"): "header_version",
    ("xen_symbols/target/notes.py", "version != 1"): "of QEMU's note",
    ("xen_symbols/target/flattened.py", "(kind, version) != (1, 1)"): "of the flattened format",
    ("xen_symbols/report/blocks.py", "'version' not in info"): "whether the note says one, to be shown",
    ("scripts/session.py", "version is None"): "of gdb",
    ("scripts/session.py", "version < OLDEST_GDB"): "gdb is asked before it is started with what older ones lack",
}


def mentions_version(node: ast.AST) -> bool:
    """Whether an expression holds a version: by a name in it, or as a literal."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            if VERSION_WORD.match(part.value) or VERSION_NAME.fullmatch(part.value):
                return True
        elif isinstance(part, ast.Constant) and isinstance(part.value, float):
            if 4 <= part.value < 5:  # every Xen with this path is 4.something
                return True
        elif VERSION_NAME.search(getattr(part, "attr", None) or getattr(part, "id", None) or ""):
            return True
    return False


def numbers(node: ast.AST) -> bool:
    return isinstance(node, ast.Tuple | ast.List) and len(node.elts) > 1 and all(
        isinstance(item, ast.Constant) and isinstance(item.value, int) for item in node.elts
    )  # fmt: skip


def version_comparisons(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of everything that decides by a version number, or could."""
    for node in ast.walk(ast.parse(source)):
        found = False
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            ordered = any(isinstance(operator, ORDERS) for operator in node.ops)
            found = any(map(mentions_version, sides))
            found |= ordered and any(numbers(side) or getattr(side, "attr", "") == "id" for side in sides)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            on = getattr(node.func, "value", None)
            if name in COMPARING_CALLS:
                found = any(map(mentions_version, [*node.args, *([on] if on is not None else [])]))
                found |= name == "index" and ast.unparse(on or node) in ("GENERATIONS", "list(BY_ID)")
            elif name in ("split", "partition", "rpartition"):
                parts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                found = "." in parts and on is not None and mentions_version(on)
            elif name in ("sorted", "min", "max"):
                found = any(map(mentions_version, node.args))
        elif isinstance(node, ast.Match):
            patterns = [part.value for part in ast.walk(node) if isinstance(part, ast.MatchValue)]
            found = any(map(mentions_version, [node.subject, *patterns]))
        elif isinstance(node, ast.Dict):  # a table by version is a comparison with each
            found = any(isinstance(key, ast.Constant) and mentions_version(key) for key in node.keys if key)
            found &= not all(isinstance(key, ast.Constant) and VERSION_NAME.fullmatch(str(key.value)) for key in
                             node.keys if key is not None and mentions_version(key))  # fmt: skip
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found = any(module.split(".")[0] in COMPARING_MODULES for module in modules)
        if found:
            yield node.lineno, ast.unparse(node)


def test_no_module_compares_versions() -> None:
    found = {
        (name_of(path), text): line for path in MODULES for line, text in version_comparisons(path.read_text())
    }  # fmt: skip
    new = [f"{path}:{line}: {text}" for (path, text), line in found.items() if (path, text) not in OTHER_VERSIONS]
    assert new == []
    assert OTHER_VERSIONS.keys() <= found.keys()  # none that is there no more


@pytest.mark.parametrize(
    "planted",
    [
        "if xen_version >= (4, 17): pass",
        "if info.xen_minor > 16: pass",
        "if info['version'] != text: pass",
        "if (major, minor) == known: pass",
        "if parsed >= (4, 17): pass",
        "if [4, 17] <= parsed: pass",
        "if name == '4.17': pass",
        "if name in ('4.17', '4.20'): pass",
        "if '4.17.' in banner: pass",
        "new = banner.startswith('4.2')",
        "new = re.match(r'4\\.2[0-9]', banner)",
        "if float(banner) < 4.17: pass",
        "new = generation.id >= other.id",
        "new = generation.releases.startswith(wanted)",
        "new = GENERATIONS.index(generation) > 6",
        "names = {'4.17': 'nmi', '4.18': 'entry_NMI'}[xen]",
        "number = int(xen_version.split('.')[1])",
        "newest = max(one.version, other.version)",
        "from packaging.version import parse",
        "import operator",
        "match name:\n    case '4.17': pass",
        "match minor:\n    case 17: pass",
    ],
)
def test_a_comparison_of_versions_is_found(planted: str) -> None:
    assert list(version_comparisons(f"def f():\n    {planted.replace(chr(10), chr(10) + '    ')}\n"))


@pytest.mark.parametrize(
    "innocent",
    [
        "if memory.symbols.has('idt_tables'): pass",
        "if size >= 4: pass",
        "row = Variable('fred', ('opt_fred',), source='bbfb30f649 (4.22.0)')",
        "if generation.id == found: pass",
        "text = f'{info.xen_major}.{info.xen_minor}'",
        "tool = {'version': __version__}",
    ],
)
def test_what_shows_a_version_compares_none(innocent: str) -> None:
    assert not list(version_comparisons(innocent))


# -- Every difference has its citation --------------------------------------------------------

COMMIT = re.compile(r"\b[0-9a-f]{10,}\b")
CITATION = re.compile(
    rf"{COMMIT.pattern}|\b(?:xen|arch|common|drivers)/[\w/.-]+\.[chS]\b|\bSDM\b|\bAPM\b|RFC of 2012|Linux"
)


def cited_tables() -> Iterator[tuple[str, Any]]:
    """(module.NAME, row) of every table in xen_symbols whose rows say where they come from."""
    for path in MODULES:
        if not name_of(path).startswith("xen_symbols/"):
            continue
        module = importlib.import_module(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        )
        for name, table in vars(module).items():
            if name.isupper() and isinstance(table, tuple) and not hasattr(table, "_fields"):
                for row in table:
                    if row.__class__.__module__.startswith("xen_symbols.") and citation(row) is not None:
                        yield f"{module.__name__}.{name}", row


def citation(row: Any) -> str | None:
    """A row's own, or that of who makes the change that it is."""
    return getattr(row, "introduced", getattr(getattr(row, "by", row), "source", None))


def test_each_row_of_a_table_cites_where_it_comes_from() -> None:
    tables: dict[str, list[Any]] = {}
    for name, row in cited_tables():
        tables.setdefault(name.rpartition(".")[2], []).append(row)
    assert tables.keys() >= {
        "CHECKS", "ENTRY_POINTS", "CHANGES", "GENERATIONS", "STAGES", "IST_NUMBERS", "_CPU_INFOS", "SYSTEM",
    }  # fmt: skip
    stages = tables.pop("STAGES")
    rows = [(name, row) for name, rows in tables.items() for row in rows]
    assert [(name, row) for name, row in rows if not CITATION.search(citation(row) or "")] == []
    several = [(name, row) for name, row in rows if len(own_names(row)) > 1]
    several += [("STAGES", stage) for stage in stages if len(stage.anchors) > 1]
    assert len(several) > 7
    assert [(name, row) for name, row in several if not COMMIT.search(citation(row) or "")] == []


def own_names(row: Any) -> set[str]:
    """The names that Xen has had for one thing; `file#name` is the same name, told apart from others like it."""
    return {name.rpartition("#")[2] for name in getattr(row, "names", ())}
