"""Structural rules: who may import whom, what importing may do, no comparison of version numbers, and citations.

More than 400 lines: the rules share what they read of the sources.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machines import recorded
from xencrash import commands
from xencrash.lazy import load
from xencrash.output import FORMATS
from xencrash.subcommands import every

ROOT = Path(__file__).parents[2]
FOLDERS = ("xen_symbols", "gdbplugin", "scripts")
XENCRASH = "scripts/lib/xencrash"
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# A layer may import itself and those to its left.
LAYERS = ("absence", "x86", "formats", "report", "symbols", "targets", "xen", "describe", "crashpath", "api")
HOMES = {
    "gdb": ("gdbplugin/",),
    "pygdbmi": ("scripts/",),
    "argparse_manpage": ("scripts/lib/xencrash/manual.py",),
    "shtab": ("scripts/lib/xencrash/manual.py",),
    "pytest": ("scripts/lib/xencrash/pytest_plugin.py",),
    "capstone": ("scripts/lib/xencrash/lab/storm/decode.py",),
    "rich": ("xen_symbols/report/console.py", "scripts/"),
    "cramjam": ("xen_symbols/formats/compression.py",),
    "lzallright": ("xen_symbols/formats/compression.py",),
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
def test_imports_stay_within_the_fences(path: Path) -> None:
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


def test_what_tests_share_is_in_no_test_file() -> None:
    """It is in tests/machines and in the modules beside it, and imports from no folder of tests."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name in imports(path):
            assert not (name.startswith("tests.") and ".test_" in name), f"{name_of(path)} imports {name}"
            if path.is_relative_to(ROOT / "tests/machines"):
                assert not name.startswith(("tests.unit", "tests.live", "tests.contract")), f"{name_of(path)}: {name}"


PACKAGES = {"xen_symbols": ROOT, "gdbplugin": ROOT, "xencrash": ROOT / "scripts" / "lib"}


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    assert set(setup["options"]["packages"].split()) == packages


def module_name(path: Path) -> str:
    """The name it is imported by: a package by its folder."""
    for package, parent in PACKAGES.items():
        if path.is_relative_to(parent / package):
            return ".".join(path.relative_to(parent).with_suffix("").parts).removesuffix(".__init__")
    raise AssertionError(f"{path} is in no package")


def import_graph() -> dict[str, set[str]]:
    """Our modules that each module imports: at its top, in a function, or for types alone."""
    paths = {module_name(path): path for package, root in PACKAGES.items() for path in (root / package).rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):  # a package's module is not the package itself
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name].update(each if each in paths else f"{node.module}" for each in full)
        graph[name] &= paths.keys() - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Modules that import each other, directly or not."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {name: reached(name) for name in graph}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}


def test_no_modules_import_each_other() -> None:
    graph = import_graph()
    assert len(graph) > 100
    assert "xen_symbols.symbols.load" in graph["xen_symbols.api"]
    assert [sorted(circle) for circle in circles(graph)] == []


def test_a_circle_of_imports_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(graph) == {frozenset("abc"), frozenset("ef")}


def imports_in_functions(path: Path) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [
        f"{name_of(path)}: {ast.unparse(node)}"
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def test_the_command_imports_late_by_its_tables_alone() -> None:
    """xencrash.lazy is the one device: every other import stands at the top of its module."""
    assert [text for path in MODULES if name_of(path).startswith(XENCRASH) for text in imports_in_functions(path)] == []
    assert imports_in_functions(ROOT / "xen_symbols/report/console.py")  # which has them


def test_every_row_of_the_commands_tables_can_be_loaded() -> None:
    parsers = {parser.prog for parser in every(commands, "xencrash")}
    assert {"xencrash", "xencrash check", "xencrash lab", "xencrash lab run"} < parsers
    for format in FORMATS.values():
        assert {"SUFFIX", "write", "write_several"} <= vars(load(format)).keys()
    ours = [path for path in MODULES if name_of(path).startswith(XENCRASH)]
    texts = (literal(node) or "" for path in ours for node in ast.walk(ast.parse(path.read_text())))
    named = {text for text in texts if re.fullmatch(r"xencrash[.\w]+:\w+", text)}
    assert named == {
        "xencrash.live:judge", "xencrash.live:console", "xencrash.several:judge", "xencrash.renderers.html:write_index",
    }  # fmt: skip
    assert all(callable(load(name)) for name in named)


def test_the_command_line_is_imported_by_nobody() -> None:
    graph = import_graph()
    assert [name for name, used in graph.items() if "xencrash.cli" in used] == ["xencrash.__main__"]


def test_the_attributes_used_of_an_object_are_declared() -> None:
    """Not with getattr(): a target, for example, has what its protocol declares."""
    probes = [
        f"{name_of(path)}: {ast.unparse(node)}"
        for path in MODULES
        if name_of(path).startswith(("xen_symbols/", "gdbplugin/"))
        for node in ast.walk(ast.parse(path.read_text()))
        if call_name(node) in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant)  # type: ignore[attr-defined]
    ]
    assert probes == []


def test_the_plugin_and_the_command_share_no_module_names() -> None:
    """They run in two processes and refer to each other: which `session.py` would be meant?"""
    names = {folder: {path.stem for path in MODULES if name_of(path).startswith(folder)} - {"__init__"}
             for folder in ("gdbplugin/", f"{XENCRASH}/")}  # fmt: skip
    assert set.intersection(*names.values()) == set()


CONTRACT = "xen_symbols.report.contract"


def test_the_contracts_types_have_one_home_and_are_for_type_checking_alone() -> None:
    """Creating them takes longer than judging a dump's CPUs; and a JSON object has one name."""
    users = 0
    for path in MODULES:
        tree = ast.parse(path.read_text())
        defined = [ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)]
        assert "Json" not in defined or module_name(path) == CONTRACT, path
        blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        for_types = {id(part) for block in blocks for part in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
                users += CONTRACT in imported
                assert CONTRACT not in imported or id(node) in for_types, path
    assert users > 10


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


def test_every_named_tuple_is_made_the_quick_way() -> None:
    typings = [path for path in MODULES if re.search(r"^from typing import .*\bNamedTuple\b", path.read_text(), re.M)]
    assert typings == []


# What judging an ELF dump with a .map takes, and nothing else: one more module costs as much as a CPU or two.
CHECK = """
xencrash xencrash.cli xencrash.commands xencrash.commands.check xencrash.errors xencrash.garbage xencrash.judging
xencrash.lazy xencrash.options xencrash.output xencrash.renderers xencrash.renderers.json xencrash.subcommands
xen_symbols xen_symbols.absence xen_symbols.api xen_symbols.records xen_symbols.text xen_symbols.version
xen_symbols.x86 xen_symbols.x86.apic xen_symbols.x86.control xen_symbols.x86.gate xen_symbols.x86.paging
xen_symbols.x86.tss
xen_symbols.report xen_symbols.report.jsontext xen_symbols.report.model
xen_symbols.formats xen_symbols.formats.content xen_symbols.formats.elf
xen_symbols.formats.elfnotes xen_symbols.formats.extents xen_symbols.formats.image xen_symbols.formats.magics
xen_symbols.symbols xen_symbols.symbols.buildid xen_symbols.symbols.functions
xen_symbols.symbols.listed xen_symbols.symbols.load xen_symbols.symbols.mapfile
xen_symbols.symbols.table
xen_symbols.targets xen_symbols.targets.dump xen_symbols.targets.elfcore xen_symbols.targets.notes
xen_symbols.targets.stretches
xen_symbols.xen xen_symbols.xen.console xen_symbols.xen.crashnotes xen_symbols.xen.ist xen_symbols.xen.lapic
xen_symbols.xen.kexec xen_symbols.xen.locate xen_symbols.xen.cpuinfo
xen_symbols.xen.idt xen_symbols.xen.memory xen_symbols.xen.owned xen_symbols.xen.percpu xen_symbols.xen.reads
xen_symbols.xen.savedcpus xen_symbols.xen.shown xen_symbols.xen.stacks xen_symbols.xen.state xen_symbols.xen.given
xen_symbols.describe xen_symbols.describe.machine
xen_symbols.crashpath xen_symbols.crashpath.context xen_symbols.crashpath.engine xen_symbols.crashpath.follows
xen_symbols.crashpath.generations xen_symbols.crashpath.identification xen_symbols.crashpath.position
xen_symbols.crashpath.stages xen_symbols.crashpath.timeline
xen_symbols.crashpath.checks xen_symbols.crashpath.checks.cpus xen_symbols.crashpath.checks.gates
xen_symbols.crashpath.checks.lapic xen_symbols.crashpath.checks.machine xen_symbols.crashpath.checks.model
xen_symbols.crashpath.checks.filenotes xen_symbols.crashpath.checks.notes xen_symbols.crashpath.checks.registers
xen_symbols.crashpath.checks.running xen_symbols.crashpath.checks.shootdown
""".split()
COSTLY = {"ast", "asyncio", "dataclasses", "dis", "inspect", "mmap", "pathlib", "socket",
          "subprocess", "tempfile", "tokenize", "traceback", "urllib"}  # fmt: skip


def test_a_check_of_a_dump_imports_what_it_needs(tmp_path: Path) -> None:
    """A list instead of a clock: importing is most of the cost of checking a dump (docs/benchmarks.md)."""
    vmcore, symbols = recorded.write_files(tmp_path, *recorded.load("4.17-crashed-vmcore"))
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

# Names that hold a version; words that are one: 4.17, 4.17.0, 4.17-, Xen 4.17; patterns: 4\\.1[0-9], (\\d+)[.]\\d+.
VERSION_NAME = re.compile(r"version|release|major|minor", re.IGNORECASE)
VERSION_WORD = re.compile(r"(?:[Xx]en[ -]?)?[0-9]{1,2}\.[0-9]{1,3}(?![0-9])")
_NUMBER = r"(?:[0-9]|\\d|\[[0-9]-[0-9]\])[+*?]?\)?"
VERSION_PATTERN = re.compile(rf"{_NUMBER}(?:\\?\.|\[\.\])\(?(?:\?:)?{_NUMBER}")
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
COMPARING_CALLS = {"startswith", "endswith", "fnmatch", "index", "count", "find"}
PATTERN_CALLS = {"match", "fullmatch", "search", "findall", "finditer", "compile"}
SPLITTING_CALLS = {"split", "rsplit", "partition", "rpartition"}
TABLES = {"GENERATIONS", "BY_ID", "list(BY_ID)", "list(GENERATIONS)", "tuple(BY_ID)"}
COMPARING_MODULES = {"packaging", "distutils", "pkg_resources", "looseversion", "semver", "operator"}

# Comparisons of versions that are not Xen's: of a file's layout, which the file itself states.
OTHER_VERSIONS = {
    ("xen_symbols/targets/qemu_state.py", "version > 64"): "no section header has such a one",
    ("xen_symbols/targets/qemu_state.py", "section.name not in _VERSIONS"): "which sections are read",
    ("xen_symbols/targets/qemu_state.py", "section.version != _VERSIONS[section.name]"): "of a section's layout",
    ("xen_symbols/targets/kdump.py", "version >= 6"): "header_version, which says which fields the header has",
    ("xen_symbols/targets/kdump.py", "version >= 4"): "header_version",
    ("xen_symbols/targets/notes.py", "version != 1"): "of QEMU's note",
    ("xen_symbols/targets/flattened.py", "(kind, version) != (1, 1)"): "of the flattened format",
    ("xen_symbols/report/notelines.py", "'version' not in info"): "whether the note says one, to be shown",
    ("xen_symbols/report/crashpath.py", "releases is None"): "whether the report names them",
    (f"{XENCRASH}/guests/build.py", "generation not in generations()"): "whether the reference guest has it at all",
    (f"{XENCRASH}/gdbprogram.py", "version is None"): "of gdb",
    (f"{XENCRASH}/gdbprogram.py", "version < OLDEST_GDB"): "gdb is asked before it is started with what others lack",
    (f"{XENCRASH}/gdbprogram.py", "re.findall('\\\\b(\\\\d+)\\\\.\\\\d+', words.partition('\\n')[0])"): "of gdb",
}
# Decisions of tests by a version that they chose themselves, or that is not Xen's.
DECIDED_IN_TESTS = {
    ("tests/live/test_guest_matrix.py", "run.generation == '4.2.0'"): "as the guest was built: 4.2.0 names no owner",
    ("tests/live/test_lab.py", "int(qemu.split('.')[0])"): "QEMU says the version of the row that was asked for",
    ("tests/live/test_real_symbols.py", "build.name == '4.14'"): "what Debian put into that package",
    ("tests/live/test_real_symbols.py", "build.name == '4.20'"): "what Debian put into that package",
    ("tests/unit/test_checks.py", "row.id != '4.17.0'"): "takes one row away",
    ("tests/unit/test_lab_packages.py", "words[1:] != [f'tool={self.version}']"): "of a package made up there",
}


def literal(node: ast.AST) -> str | None:
    """A string or bytes literal as text."""
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else None


def mentions_version(node: ast.AST) -> bool:
    """Whether an expression holds a version: by a name in it, or as a literal."""
    for part in ast.walk(node):
        if (text := literal(part)) is not None:
            if VERSION_WORD.match(text) or VERSION_NAME.fullmatch(text):
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


def call_name(node: ast.AST) -> str:
    return str(getattr(node.func, "attr", getattr(node.func, "id", ""))) if isinstance(node, ast.Call) else ""


def splits_at_dots(node: ast.AST) -> bool:
    """Whether an expression splits something at its dots, as a version into its numbers."""
    cuts = (part for part in ast.walk(node) if isinstance(part, ast.Call) and call_name(part) in SPLITTING_CALLS)
    return any(literal(argument) == "." for cut in cuts for argument in cut.args)


def part_as_number(node: ast.AST) -> bool:
    """Whether a piece of something is taken as a number: int(parts[1]), int(found[2])."""
    return any(
        call_name(part) == "int" and any(isinstance(argument, ast.Subscript) for argument in part.args)
        for part in ast.walk(node) if isinstance(part, ast.Call)
    )  # fmt: skip


def of_generation(node: ast.AST) -> bool:
    """Whether it is a generation, or its id: generation.id, context.generation, run.generation."""
    if isinstance(node, ast.Attribute) and node.attr == "id":
        node = node.value
    return (getattr(node, "attr", None) or getattr(node, "id", "")).lower() == "generation"


def decides(compare: ast.Compare) -> bool:
    """Whether a comparison is one of versions, or a way to write one."""
    sides = [compare.left, *compare.comparators]
    if any(map(mentions_version, sides)) or any(map(splits_at_dots, sides)):
        return True
    if any(isinstance(operator, ORDERS) for operator in compare.ops):
        return any(numbers(side) or getattr(side, "attr", "") == "id" or part_as_number(side) for side in sides)
    if any(
        isinstance(operator, ast.In | ast.NotIn) for operator in compare.ops
    ):  # which rows are meant depends on their number
        return of_generation(compare.left) and ast.unparse(compare.comparators[-1]) not in TABLES
    return False


def version_comparisons(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of everything that decides by a version number, or could."""
    for node in ast.walk(ast.parse(source)):
        if is_version_comparison(node):
            yield node.lineno, ast.unparse(node)


def is_version_comparison(node: Any) -> bool:
    if isinstance(node, ast.Compare):
        return decides(node)
    if isinstance(node, ast.Call):
        name, on = call_name(node), getattr(node.func, "value", None)
        if name in COMPARING_CALLS:
            inside = [*node.args, *([on] if on is not None else [])]
            return any(map(mentions_version, inside)) or (name == "index" and ast.unparse(on or node) in TABLES)
        if name in PATTERN_CALLS:
            patterns = [text for argument in node.args if (text := literal(argument)) is not None]
            return any(map(VERSION_PATTERN.search, patterns)) or any(map(mentions_version, node.args))
        if name in SPLITTING_CALLS:
            return on is not None and mentions_version(on) and splits_at_dots(node)
        if name in ("int", "map"):
            return any(map(splits_at_dots, node.args))
        return name in ("sorted", "min", "max") and any(map(mentions_version, node.args))
    if isinstance(node, ast.Subscript):  # a generation by its place
        return ast.unparse(node.value) in TABLES - {"BY_ID"}
    if isinstance(node, ast.Match):
        patterns = [part.value for part in ast.walk(node) if isinstance(part, ast.MatchValue)]
        return any(map(mentions_version, [node.subject, *patterns]))
    if isinstance(node, ast.Dict):  # a table by version is a comparison with each
        versions = [key for key in node.keys if isinstance(key, ast.Constant) and mentions_version(key)]
        return any(not VERSION_NAME.fullmatch(str(key.value)) for key in versions)
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return any(module.split(".")[0] in COMPARING_MODULES for module in modules)
    return False


def decisions(source: str) -> Iterator[tuple[int, str]]:
    """The same for a test, except plain assertions and tables of samples, which decide nothing."""
    tree = ast.parse(source)
    asserted = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Assert) for part in parts_of(node.test)}
    for node in ast.walk(tree):
        if is_version_comparison(node) and id(node) not in asserted and not isinstance(node, ast.Dict):
            yield node.lineno, ast.unparse(node)


def parts_of(test: ast.expr) -> Iterator[ast.expr]:
    """The parts of an assertion joined by `and`."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        for value in test.values:
            yield from parts_of(value)
    else:
        yield test


def test_no_module_compares_versions() -> None:
    found = {
        (name_of(path), text): line for path in MODULES for line, text in version_comparisons(path.read_text())
    }  # fmt: skip
    new = [f"{path}:{line}: {text}" for (path, text), line in found.items() if (path, text) not in OTHER_VERSIONS]
    assert new == []
    assert OTHER_VERSIONS.keys() <= found.keys()  # none that no longer exists


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
        "if int(parts[1]) >= 17: pass",
        "if 17 <= int(found[2]): pass",
        "if x.split('.')[1] > '17': pass",
        "if tuple(map(int, text.split('.'))) >= floor: pass",
        "floor = tuple(map(int, text.split('.')))",
        "if b'4.17' in data: pass",
        "if data.startswith(b'4.17'): pass",
        "if data == b'4.17.0': pass",
        "if b'Xen 4.17' in data: pass",
        "new = data.partition(b'.')[2] > b'17'",
        "new = re.search('Xen 4.1[0-9]', text)",
        "new = re.match(rb'4[.]1[0-9]', data)",
        "pattern = re.compile(r'(\\d+)\\.(\\d+)')",
        "if generation.id in NEW: pass",
        "if context.generation not in OLD: pass",
        "if g in GENERATIONS[6:]: pass",
        "newest = GENERATIONS[-1]",
        "later = list(BY_ID)[3:]",
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
        "if generation.id in BY_ID: pass",
        "for generation in GENERATIONS: pass",
        "if stage.id in seen: pass",
        "suffix = name.split('.')[-1]",
        "if len(parts[1]) >= 2: pass",
        "number = int(words[1])",
        "pattern = re.compile(r'^CPU#([0-9]+)$')",
        "if data.startswith(b'XEN'): pass",
        "text = f'{info.xen_major}.{info.xen_minor}'",
        "tool = {'version': __version__}",
    ],
)
def test_showing_a_version_does_not_compare_it(innocent: str) -> None:
    assert not list(version_comparisons(innocent))


def test_no_test_decides_by_a_version() -> None:
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert len(paths) > 50
    found = [(name_of(path), text) for path in paths for _, text in decisions(path.read_text())]
    assert set(found) - DECIDED_IN_TESTS.keys() == set()


@pytest.mark.parametrize(
    ("planted", "decision"),
    [
        ("assert found == '4.17.0'", False),
        ("assert found and release == '4.17.0'", False),
        ("names = {'4.17': 'nmi', '4.18': 'entry_NMI'}", False),
        ("assert count == (0 if name == '4.20' else 1)", True),
        ("assert only is (name == '4.14')", True),
        ("assert name == '4.14' or found", True),
        ("if b'4.17' in banner: pytest.skip()", True),
        ("rows = [row for row in XENS if row.name >= '4.17']", True),
        ("expected = 1 if generation.id in NEW else 2", True),
    ],
)
def test_asserting_a_version_is_not_deciding_by_it(planted: str, decision: bool) -> None:
    assert bool(list(decisions(planted))) is decision


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
    """A row's own, or that of the writer it names."""
    return getattr(row, "introduced", getattr(getattr(row, "by", row), "source", None))


def test_a_long_module_says_why_at_its_head() -> None:
    texts = {path: path.read_text() for path in (*MODULES, *(ROOT / "tests").rglob("*.py"))}
    long = {path: ast.get_docstring(ast.parse(text)) or "" for path, text in texts.items() if text.count("\n") > 400}
    assert [path for path, head in long.items() if "more than 400 lines" not in " ".join(head.split()).lower()] == []


def test_each_row_of_a_table_cites_where_it_comes_from() -> None:
    tables: dict[str, list[Any]] = {}
    for name, row in cited_tables():
        tables.setdefault(name.rpartition(".")[2], []).append(row)
    tables.pop("MAGICS")  # of files, whose formats are not Xen's: each names its definition
    assert tables.keys() >= {
        "CHECKS", "ENTRY_POINTS", "PATH", "BESIDE", "GENERATIONS", "STAGES", "IST_NUMBERS", "_CPU_INFOS", "SYSTEM",
    }  # fmt: skip
    stages = tables.pop("STAGES")
    rows = [(name, row) for name, rows in tables.items() for row in rows]
    assert [(name, row) for name, row in rows if not CITATION.search(citation(row) or "")] == []
    several = [(name, row) for name, row in rows if len(own_names(row)) > 1]
    several += [("STAGES", stage) for stage in stages if len(stage.anchors) > 1]
    assert len(several) > 7
    assert [(name, row) for name, row in several if not COMMIT.search(citation(row) or "")] == []


def own_names(row: Any) -> set[str]:
    """The names that Xen has had for one thing; `file#name` is the same name, with the file that distinguishes it."""
    return {name.rpartition("#")[2] for name in getattr(row, "names", ())}
