"""Machines for the live tests of gdb: the reference guest, up in a fraction of a second, and gdb's own output."""

from __future__ import annotations

import contextlib
import mmap
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xencrash.gdbprogram import find_gdb, gdb_arguments, plugin_script
from xencrash.guests import build
from xencrash.lab.boot import up
from xencrash.lab.machine import Machine
from xencrash.lab.process import Progress
from xencrash.lab.qemu import Boot
from xencrash.lab.specification import Specification


def booted(run_dir: str | Path | None = None, progress: Progress = lambda text: None, **fields: Any) -> Machine:
    """A machine booted for the caller alone; `fields` are Specification's."""
    return up(Specification(**fields), run_dir, progress=progress, fresh=True)


def ready(*, shared_ram: bool = False, **fields: Any) -> Machine:
    """Real Xen, ready to be crashed: dom0 is up and the crash kernel loaded, as a machine of the caller's own.

    The first to ask for one boots it; all others, in this process or another, start from its snapshot. `fields`
    are Specification's; `shared_ram` is for tests that look at `ram_file`.
    """
    return up(Specification(**fields), shared_ram=shared_ram)


When = Mapping[str, Callable[[subprocess.Popen[str]], object]]


@contextlib.contextmanager
def guest(generation: str = "4.17.0", *, cpus: int = 4, append: str = "", **more: Any) -> Iterator[Machine]:
    """The reference guest, with all its CPUs up and waiting for a `C` on its serial line; `append` is its command line,
    as `xencrash.guests.command_line` makes it."""
    built = build(generation)
    boot = Boot(kernel=built.kernel, symbols=built.symbols, append=append)
    with booted(kernel=boot, cpus=cpus, **more) as lab:
        if not more.get("paused"):
            lab.serial.wait(rb"CPUs ready", 30)
        yield lab


def target(lab: Machine) -> str:
    return f"gdb:{lab.gdb_socket}"


def gdb(
    lab: Machine,
    *commands: str,
    qmp: bool = True,
    symbols: str | None = None,
    timeout: float = 60,
    before: Sequence[str] = (),
    when: When | None = None,
) -> str:
    """What a gdb with the plugin, attached to the machine, prints for some commands, of which `before` run before it is
    attached. It detaches at the end."""
    before = [*before, f"source {plugin_script()}", f"set xen symbols {symbols or lab.symbols}"]
    before += [f"set xen qmp-socket {lab.qmp_socket}"] * qmp
    return run_gdb(*before, f"target remote {lab.gdb_socket}", "echo \\n=== begin\\n", *commands, timeout=timeout,
                   when=when)  # fmt: skip


def run_gdb(*commands: str, timeout: float = 60, when: When | None = None) -> str:
    """gdb -batch; only what follows the mark `=== begin`, when there is one. `when` a line begins so, that is done."""
    words = [find_gdb(), *gdb_arguments(), "-batch"]
    for command in commands:
        words += ["-ex", command]
    output = ""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        killing = threading.Timer(timeout, process.kill)
        killing.start()
        for line in process.stdout:
            output += line
            for begins, do in (when or {}).items():
                if line.startswith(begins):
                    do(process)
        killing.cancel()
    assert process.returncode >= 0, f"gdb was killed after {timeout} s: {output}"
    return output.rpartition("=== begin\n")[2]


def rows(output: str, title: str) -> list[list[str]]:
    """The cells of a plain table, without its head: the words of each line, which are not split further."""
    lines = output.splitlines()
    start = lines.index(title) + 3
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return [line.split() for line in lines[start:end]]


def build_id(symbols: str) -> bytes:
    """What binutils says of an ELF file."""
    notes = subprocess.run(["readelf", "-n", symbols], capture_output=True, text=True, check=True).stdout
    return bytes.fromhex(notes.partition("Build ID: ")[2].split()[0])


@contextlib.contextmanager
def ram(lab: Machine) -> Iterator[mmap.mmap]:
    """The machine's RAM, to be read and changed; the offset is the physical address."""
    with lab.ram_file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        yield memory


def named(findings: Sequence[dict[str, Any]], verdict: str = "fail") -> list[tuple[str, int | None]]:
    """(check, cpu) of the findings with a verdict."""
    return [(finding["check"], finding["cpu"]) for finding in findings if finding["verdict"] == verdict]


def wrong(report: dict[str, Any]) -> set[tuple[str, int | None, str, str]]:
    return {(f["check"], f["cpu"], f["verdict"], f["stage"]) for f in report["findings"]
            if f["verdict"] in ("fail", "unknown")}  # fmt: skip


STATUS = "gdb.execute('xen crash status', to_string=True)"
LOOK = "with target.batch(): memory.forget(); read_state(memory)"  # as at each stage of a trace


def packets(lab: Machine, qmp: bool = True, what: str = STATUS) -> int:
    """How many packets of the remote protocol one status, or what else is said, sends, by gdb's own log of them."""
    script = (
        "python from gdbplugin.register import _registered; from xen_symbols.xen.state import read_state; "
        "target, memory = _registered[0].target(), _registered[0]._memory; before = target.packets; "
        f"exec({what!r}); print('packets', target.packets - before)"
    )
    mark = "maint packet qmark"
    with tempfile.NamedTemporaryFile("r") as log:
        output = gdb(lab, "xen crash status", mark, script, mark, qmp=qmp, before=[f"set remotelogfile {log.name}"])
        sent = re.findall(r"^w [+]?\$([^#]*)#", log.read(), re.MULTILINE)
    first, last = (at for at, packet in enumerate(sent) if packet == "qmark")
    ours = int(re.search(r"packets (\d+)", output)[1])  # type: ignore[index]
    assert ours == last - first - 1, sent[first:last]  # our count is what gdb sends
    return ours
