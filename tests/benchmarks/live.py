"""What looking at a live Xen costs: the look at one stage of a trace, `xen crash status`, a whole crash path followed.

    python -m tests.benchmarks.live [CPUS] [--guest] [--look]

Boots real Xen 4.17 in the lab three times; with --look once, for the looks alone, and with --guest the reference guest
for them. The figures of looks are the minimum of many, as other work only adds time, and the medians; ratios are
of the minima. The bare client sends the same packets as one look, one after the other over one connection, and ignores
the answers; the device state is read over QMP. Any look waits for both. tests/unit/test_looks.py and test_gdb_plugin.py
assert how many packets a look takes.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.live.machines import guest
from xen_symbols.symbols.load import load_symbols
from xencrash.gdbmi import open_session
from xencrash.lab.boot import up
from xencrash.lab.machine import Machine
from xencrash.lab.specification import Specification
from xencrash.trace import trace

ROUNDS = 100
_TIMED = """
import json, statistics, time
import gdb

def seconds(run):
    times = []
    for _ in range({rounds}):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times)

"""

_LOOK = """
from gdbplugin.register import _registered
from gdbplugin.target import device_state
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.engine import judge
from xen_symbols.crashpath.position import infer
from xen_symbols.targets.qmp import Qmp
from xen_symbols.xen.state import read_state

session = _registered[0]
target = session.target()
sent = []
send = target._send

def noted(packet):
    sent.append(packet)
    return send(packet)

def look():
    with target.batch():
        memory.forget()
        return read_state(memory)

def status():
    gdb.execute("xen crash status", to_string=True)

def device():
    with Qmp(target.qmp_socket) as qmp:
        device_state(qmp)

with session.look() as memory:
    generation = session.identification(memory).generation
target._send = noted
state = look()
del target._send
out = {{
    "packets": sent,
    "look": seconds(look),
    "device": seconds(device),
    "status": seconds(status),
    "judge": seconds(lambda: judge(Context(memory, state, infer(state, generation), generation))),
}}
json.dump(out, open({path!r}, "w"))
"""


class Bare:
    """A client of the remote protocol that only asks."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._received = b""

    def ask(self, packet: str) -> bytes:
        """The answer; each is acknowledged, as QEMU's stub requires. QEMU 7.2 first reports the stop unasked."""
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


def looks(lab: Machine) -> dict[str, Any]:
    """(minimum, median) seconds of one look at a stage, its parts, and others; `bare` is its packets sent by a bare
    client, `packets` their number."""
    with tempfile.TemporaryDirectory() as name:
        script, result = Path(name) / "bench.py", Path(name) / "result.json"
        script.write_text((_TIMED + _LOOK).format(rounds=ROUNDS, path=str(result)))
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket)) as session:
            session.cli(f"source {script}", timeout=300)
            session.leave(running=False)
        figures: dict[str, Any] = json.loads(result.read_text())
    bare = Bare(str(lab.gdb_socket))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        answers = [bare.ask(packet) for packet in figures["packets"]]
        times.append(time.perf_counter() - start)
        assert not any(re.match(rb"$|E", answer) for answer in answers)
    bare.close()
    return {**figures, "packets": len(figures["packets"]), "bare": (min(times), statistics.median(times))}


def path_seconds(cpus: int, follow: bool) -> float:
    """Wall time from kexec_crash to kexec_reloc, with every stage judged or with only these two stops."""
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
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.live", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cpus", nargs="?", type=int, default=4, metavar="CPUS", help="default: %(default)s")
    parser.add_argument("--guest", action="store_true", help="looks at the reference guest, not at real Xen")
    parser.add_argument("--look", action="store_true", help="the looks alone")
    args = parser.parse_args()
    with guest(cpus=args.cpus) if args.guest else up(Specification(cpus=args.cpus)) as lab:
        found = looks(lab)
    ratio = found["look"][0] / (found["bare"][0] + found["device"][0])
    milli = {name: "{:.1f} ms ({:.1f})".format(*(1000 * value for value in values))
             for name, values in found.items() if name != "packets"}  # fmt: skip
    print(f"{args.cpus} CPUs, the least (median): the look at a stage {milli['look']}, {found['packets']} packets")
    print(f"a bare client {milli['bare']}, the device state {milli['device']}: {ratio:.2f} x both")
    print(f"xen crash status {milli['status']}; judging a stage {milli['judge']}")
    if args.look or args.guest:
        return
    bare, followed = path_seconds(args.cpus, False), path_seconds(args.cpus, True)
    print(f"kexec_crash to kexec_reloc: {bare:.2f} s bare, {followed:.2f} s followed, {followed / bare:.1f} x")


if __name__ == "__main__":
    main()
