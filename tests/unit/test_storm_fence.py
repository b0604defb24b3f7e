"""A storm writes to the machine. Only the lab may, and only to its own machines; the plugin stays read-only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORM = ROOT / "scripts/lib/xencrash/lab/storm"
# The command, and what writes Xen's own faults into a machine of the lab's (lab crash --how page-fault).
MAY_IMPORT = {ROOT / f"scripts/lib/xencrash/lab/{name}.py" for name in ("commands/storm", "planted")}
# Packets of the remote protocol that only read, or set breakpoints: memory, queries, QEMU's modes, breakpoints.
READS = re.compile(r"m|q|Qqemu\.PhyMemMode|[Zz][01234]?")
# GDB manual, appendix E: what changes registers or memory, runs a CPU, or ends the machine.
WRITES = re.compile(r"(G|P|M|X|vCont|s|c|k|vKill|R|D|Qqemu\.sstep)\b")


def modules(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_the_lab_uses_what_writes() -> None:
    users = {
        path
        for folder in ("xen_symbols", "gdbplugin", "scripts")
        for path in modules(folder)
        if STORM not in path.parents and any(name.startswith("xencrash.lab.storm") for name in imported(path))
    }
    assert users == MAY_IMPORT
    loaders = {path for folder in ("xen_symbols", "gdbplugin", "scripts") for path in modules(folder)
               if STORM not in path.parents and '"xencrash.lab.storm' in path.read_text()}  # fmt: skip
    assert {path: re.findall(r'"(xencrash\.lab\.storm[^"]*)"', path.read_text()) for path in loaders} == {
        ROOT / "scripts/lib/xencrash/commands/render.py": ["xencrash.lab.storm.shown"]
    }


def test_what_renders_a_storm_reaches_no_machine() -> None:
    assert [name for name in imported(STORM / "shown.py") if not name.startswith("xen_symbols.report.")] == [
        "__future__.annotations", "json", "shlex", *(f"collections.abc.{name}" for name in
        ("Callable", "Iterator", "Mapping", "Sequence")), "typing.IO", "typing.Any",
    ]  # fmt: skip


def packets(path: Path) -> Iterator[str]:
    """The beginnings of the packets sent, up to the first value."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr not in ("_send", "send_packet"):
                continue
            text = node.args[0]
            if isinstance(text, ast.JoinedStr):
                text = text.values[0]
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield text.value
            elif not (isinstance(text, ast.Name) and text.id == "packet"):  # of _send itself
                raise AssertionError(f"{path}:{node.lineno}: what is sent cannot be seen")


def test_the_plugin_sends_no_packet_that_writes() -> None:
    sent = {packet for path in modules("gdbplugin") for packet in packets(path)}
    assert {"m", "Qqemu.PhyMemMode:"} <= sent  # the test sees them
    assert [packet for packet in sent if not READS.match(packet) or WRITES.match(packet)] == []


def test_the_test_knows_a_packet_that_writes(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f(self, a): self._send(f'M{a:x},4:00040000')")
    assert [packet for packet in packets(planted) if not READS.match(packet)] == ["M"]


def test_the_plugin_writes_no_memory_through_gdb() -> None:
    """`set $rip` in rdmsr.py happens only on explicit request, and is undone."""
    for path in modules("gdbplugin"):
        text = path.read_text()
        assert "write_memory" not in text, path
        assert re.search(r"human-monitor-command.{0,40}\b(mce|nmi|system_reset)\b", text) is None, path
        assert "inject-nmi" not in text, path
