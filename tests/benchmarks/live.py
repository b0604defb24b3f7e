"""What looking at a live Xen costs: `xen crash status` in gdb, its packets, and what a trace adds to the crash path.

    python -m tests.benchmarks.live [CPUS] [--status]

Boots real Xen 4.17 in the lab three times, with --status once; figures are of one run, ratios where two things are
compared. The bare client sends the very packets of one status, one after the other over one connection, and does
nothing with the answers; what the status asks over QMP besides is measured by itself.
"""

from __future__ import annotations

import json
import re
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from xen_symbols.symbols.load import load_symbols
from xencrash.gdbmi import open_session
from xencrash.lab.boot import up
from xencrash.lab.specification import Specification
from xencrash.trace import trace

ROUNDS = 30
_TIMED = """
import json, statistics, time
import gdb

def seconds(run):
    times = []
    for _ in range({rounds}):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

"""

_SNAPSHOT = """
from gdbplugin.register import _registered
from xen_symbols.crashpath.checks import Context
from xen_symbols.crashpath.engine import judge
from xen_symbols.crashpath.position import infer
from xen_symbols.xen.state import read_state

session = _registered[0]
target = session.target()

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
    "judge": seconds(lambda: judge(Context(memory, state, infer(state, generation), generation))),
    "packet": seconds(packet),
}}
json.dump(out, open({path!r}, "w"))
"""


_STATUS = """
from gdbplugin.register import _registered
from gdbplugin.target import device_state
from xen_symbols.targets.qmp import Qmp

target = _registered[0].target()
sent = []
send = target._send

def noted(packet):
    sent.append(packet)
    return send(packet)

def status():
    gdb.execute("xen crash status", to_string=True)

def state():
    with Qmp(target.qmp_socket) as qmp:
        device_state(qmp)

status()
target._send = noted
status()
del target._send
json.dump({{"packets": sent, "status": seconds(status), "qmp": seconds(state)}}, open({path!r}, "w"))
"""


class Bare:
    """A client of the remote protocol that does nothing but ask."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._received = b""

    def ask(self, packet: str) -> bytes:
        """The answer; each is acknowledged, as QEMU's stub wants it. QEMU 7.2 tells the stop unasked at first."""
        data = packet.encode()
        self._socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))
        while True:
            while not (found := re.search(rb"\$([^#]*)#..", self._received)):
                self._received += self._socket.recv(65536)
            self._received = self._received[found.end() :]
            self._socket.sendall(b"+")
            if not found[1].startswith(b"T"):
                return found[1]

    def close(self) -> None:
        self._socket.close()


def status(cpus: int) -> dict[str, Any]:
    """Seconds of one `xen crash status`, of its reads by a bare client, and of the device state over QMP."""
    with up(Specification(cpus=cpus)) as lab, tempfile.TemporaryDirectory() as name:
        script, result = Path(name) / "bench.py", Path(name) / "result.json"
        script.write_text((_TIMED + _STATUS).format(rounds=ROUNDS, path=str(result)))
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            session.cli(f"source {script}", timeout=300)
            figures: dict[str, Any] = json.loads(result.read_text())
            session.leave(running=False)
        bare = Bare(str(lab.gdb_socket))
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            answers = [bare.ask(packet) for packet in figures["packets"]]
            times.append(time.perf_counter() - start)
            assert not any(re.match(rb"$|E", answer) for answer in answers)
        bare.close()
        return {**figures, "packets": len(figures["packets"]), "bare": statistics.median(times)}


def snapshot(cpus: int) -> dict[str, Any]:
    """Figures of one snapshot, taken inside gdb."""
    with up(Specification(cpus=cpus)) as lab, tempfile.TemporaryDirectory() as name:
        script, result = Path(name) / "bench.py", Path(name) / "result.json"
        script.write_text((_TIMED + _SNAPSHOT).format(rounds=ROUNDS, path=str(result)))
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            session.xen("crash-check")
            session.cli(f"source {script}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def path_seconds(cpus: int, follow: bool) -> float:
    """Wall time from kexec_crash to kexec_reloc, with every stage judged or with these two stops alone."""
    with up(Specification(cpus=cpus)) as lab:
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
    words = [word for word in sys.argv[1:] if word != "--status"]
    cpus = int(words[0]) if words else 4
    cost = status(cpus)
    milli = {name: cost[name] * 1000 for name in ("status", "qmp", "bare")}
    print(f"{cpus} CPUs: status {milli['status']:.1f} ms, {cost['packets']} packets; QMP's part {milli['qmp']:.1f} ms")
    print(f"a bare client {milli['bare']:.1f} ms: {cost['status'] / cost['bare']:.1f} x that")
    if "--status" in sys.argv:
        return
    figures = snapshot(cpus)
    milli = {name: figures[name] * 1000 for name in ("snapshot", "judge", "packet")}
    reads = figures["snapshot"] / figures["packet"]
    print(f"{cpus} CPUs: snapshot {milli['snapshot']:.1f} ms, as {reads:.0f} reads; {figures['packets']} packets")
    print(f"judging it {milli['judge']:.1f} ms")
    bare, followed = path_seconds(cpus, False), path_seconds(cpus, True)
    print(f"kexec_crash to kexec_reloc: {bare:.2f} s bare, {followed:.2f} s followed, {followed / bare:.1f} x")


if __name__ == "__main__":
    main()
