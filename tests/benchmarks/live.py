"""What looking at a live Xen costs: a stage's snapshot in gdb, its packets, and what a trace adds to the crash path.

    python -m tests.benchmarks.live [CPUS]

Boots real Xen 4.17 in the lab twice; figures are of one run, ratios where two things are compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from xen_symbols.symbols.table import load_symbols
from xencrash.lab.machine import Lab
from xencrash.session import open_session
from xencrash.trace import trace

ROUNDS = 30
_IN_GDB = """
import json, statistics, time
import gdb
from gdbplugin.register import _registered
from xen_symbols.crashpath.engine import context_at, judge
from xen_symbols.crashpath.position import infer
from xen_symbols.xen.state import read_state

session = _registered[0]
target = session.target()

def seconds(run):
    times = []
    for _ in range({rounds}):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

def snapshot():
    with session.look() as memory:
        memory.forget()
        return memory, read_state(memory)

def packet():
    gdb.selected_inferior().read_memory(session._memory.symbols.address("idle_pg_table"), 16)

memory, state = snapshot()
generation = session.identification(memory).generation
before = target.packets
snapshot()
out = {{
    "packets": target.packets - before,
    "snapshot": seconds(snapshot),
    "judge": seconds(lambda: judge(context_at(memory, state, infer(state, generation), generation))),
    "packet": seconds(packet),
}}
json.dump(out, open({path!r}, "w"))
"""


def snapshot(cpus: int) -> dict[str, Any]:
    """Figures of one snapshot, taken inside gdb."""
    with Lab.up(cpus=cpus) as lab, tempfile.TemporaryDirectory() as name:
        script, result = Path(name) / "bench.py", Path(name) / "result.json"
        script.write_text(_IN_GDB.format(rounds=ROUNDS, path=str(result)))
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            session.xen("crash-check")
            session.cli(f"source {script}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def path_seconds(cpus: int, follow: bool) -> float:
    """Wall time from kexec_crash to kexec_reloc, with every stage judged or with these two stops alone."""
    with Lab.up(cpus=cpus) as lab:
        target, symbols, qmp = f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)
        if follow:
            seen: dict[str, float] = {}
            trace(target, symbols, qmp, timeout=60, trigger=lab.crash,
                  progress=lambda stage, _: seen.setdefault(stage["stage"], time.perf_counter()) and None)  # fmt: skip
            return seen["handover"] - seen["crash-entry"]
        table = load_symbols(symbols)
        with open_session(target, symbols, qmp) as session:
            for name in ("kexec_crash", "kexec_reloc"):
                session.break_at(table.address(name, "tT"))
            session.run()
            lab.crash()
            assert session.wait_stop(60)
            start = time.perf_counter()
            session.run()
            assert session.wait_stop(60)
            return time.perf_counter() - start


def main() -> None:
    cpus = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    figures = snapshot(cpus)
    milli = {name: figures[name] * 1000 for name in ("snapshot", "judge", "packet")}
    reads = figures["snapshot"] / figures["packet"]
    print(f"{cpus} CPUs: snapshot {milli['snapshot']:.1f} ms, as {reads:.0f} reads; {figures['packets']} packets")
    print(f"judging it {milli['judge']:.1f} ms")
    bare, followed = path_seconds(cpus, False), path_seconds(cpus, True)
    print(f"kexec_crash to kexec_reloc: {bare:.2f} s bare, {followed:.2f} s followed, {followed / bare:.1f} x")


if __name__ == "__main__":
    main()
