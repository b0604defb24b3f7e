"""What judging a dump costs, as ratios to `python3 -c pass` by the same interpreter in the same run.

Synthesised dumps of 4, 256 and 4096 CPUs in 4 GB, and of 4 CPUs in a sparse 64 GB; a real one when it is given, and
then crash(8) and xen-crashdump-analyser on it, if they are installed. Processes alternate with the empty
program, so that a busy machine slows both; CPU time is user and system together.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.machines import dumpwriter
from tests.machines.syntheticxen import SyntheticXen
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.page import page
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets.dump import open_dump
from xen_symbols.xen.images import carried_symbols
from xen_symbols.xen.locate import locate

SYNTHETIC = ((4, 4), (4, 64), (256, 4), (4096, 4))  # CPUs, GB
# Runs the command and prints the peak of its resident memory, pages of a mapped dump included.
_PEAK = """
import contextlib, os, sys
from xencrash.cli import main
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Cost:
    """Medians of one process, seconds."""

    wall: float
    cpu: float


def run(command: Sequence[str]) -> Cost:
    start = time.perf_counter()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
    _, child.returncode, usage = os.wait4(child.pid, 0)
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime)


def in_turn(runs: int, *commands: Sequence[str]) -> list[Cost]:
    """The cost of each command, all of them run once in each round."""
    rounds = [[run(command) for command in commands] for _ in range(runs)]
    return [
        Cost(statistics.median(cost.wall for cost in costs), statistics.median(cost.cpu for cost in costs))
        for costs in zip(*rounds, strict=True)
    ]


def ratios(cost: Cost, empty: Cost) -> str:
    return f"{cost.wall / empty.wall:.1f} x python3 -c pass ({cost.cpu / empty.cpu:.1f} x its CPU time)"


def median(runs: int, work: Callable[[], object]) -> float:
    """Median CPU time of work in this process, seconds; like the command, without garbage collection."""
    gc.disable()
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    gc.enable()
    return statistics.median(times)


def synthesise(directory: Path, cpus: int, gigabytes: int) -> tuple[str, str]:
    """(dump, map) of a crashed Xen in so much memory."""
    xen = SyntheticXen(cpus)
    dump, symbols = directory / f"{cpus}-{gigabytes}.elf", directory / f"{cpus}.map"
    with dump.open("wb") as file:
        dumpwriter.write_elf(file, [(0, gigabytes << 30)], xen.content, xen.notes())
    symbols.write_text(xen.map_file())
    return str(dump), str(symbols)


def measure(name: str, dump: str, symbols: str | None, python: str, runs: int) -> float:
    """Print the lines for one dump; returns the seconds of its checks."""
    words = ["check", dump, "--format", "json", *(["--symbols", symbols] if symbols else [])]
    empty, whole = in_turn(runs, [python, "-c", "pass"], [str(Path(python).with_name("xencrash")), *words])
    peak = subprocess.run([python, "-c", _PEAK, *words], capture_output=True, text=True, check=True, cwd="/").stdout
    print(f"{name}: {ratios(whole, empty)}, {whole.wall * 1e3:.0f} ms; {int(peak) / 1024:.0f} MB at the peak")

    def table() -> SymbolTable:
        return load_symbols(symbols) if symbols else carried_symbols(open_dump(dump))

    loaded = table()
    memory = locate(open_dump(dump), loaded)
    made = evaluate(memory)
    length = sum(map(len, page(made.to_json())))
    seconds = {
        "symbols": median(runs, lambda: table().get("idle_pg_table")),
        "opening": median(runs, lambda: locate(open_dump(dump), loaded)),
        "checks": median(runs, lambda: evaluate(memory)),
        "page": median(runs, lambda: sum(map(len, page(made.to_json())))),
    }
    inside = ", ".join(f"{part} {value * 1e3:.1f} ms" for part, value in seconds.items())
    drawn = f"{seconds['page'] / seconds['checks']:.2f} x its checks, {length / 1e3:.0f} kB"
    print(f"    inside: {inside} ({drawn})", flush=True)
    return seconds["checks"]


def compare(dump: str, symbols: str, python: str, runs: int) -> None:
    """What the other tools do with the same file, or that they are not installed."""
    with tempfile.TemporaryDirectory() as out:
        for tool, words in (
            ("crash", ["--hyper", "-s", symbols, dump]),
            ("xen-crashdump-analyser", ["--core", dump, "--xen-symtab", symbols, "--outdir", out]),
        ):
            if not shutil.which(tool):
                print(f"{tool}: not installed")
                continue
            empty, whole = in_turn(runs, [python, "-c", "pass"], [tool, *words])
            once = subprocess.run([tool, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
            lines = [line for line in (once.stdout + once.stderr).splitlines() if line.strip()]
            print(f"{tool}: {ratios(whole, empty)}; exit status {once.returncode}")
            print(f"    last line: {lines[-1].strip() if lines else 'none'}")
            if written := sorted(path.name for path in Path(out).iterdir()):
                print(f"    files that it wrote: {', '.join(written)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("vmcore", nargs="?", help="a real dump, judged as well")
    parser.add_argument("symbols", nargs="?", help="its xen-syms; default: what Xen itself carries")
    parser.add_argument("-n", type=int, default=15, metavar="RUNS", help="runs of each thing (default: %(default)s)")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH",
        help="interpreter of a venv with a plain `pip install`: an editable one starts its finder in the empty "
        "program, too, which flatters the ratio (default: the one that runs this)",
    )  # fmt: skip
    args = parser.parse_args()
    checks = {}
    with tempfile.TemporaryDirectory() as name:
        for cpus, gigabytes in SYNTHETIC:
            dump, symbols = synthesise(Path(name), cpus, gigabytes)
            checks[cpus, gigabytes] = measure(f"{cpus} CPUs, {gigabytes} GB", dump, symbols, args.python, args.n)
            Path(dump).unlink()
    print(f"each CPU: {(checks[4096, 4] - checks[256, 4]) / (4096 - 256) * 1e6:.0f} us of checks")
    if args.vmcore:
        real = f"{args.vmcore}, {Path(args.vmcore).stat().st_size / 1e9:.1f} GB"
        measure(real, args.vmcore, args.symbols, args.python, args.n)
        if args.symbols:
            compare(args.vmcore, args.symbols, args.python, args.n)


if __name__ == "__main__":
    main()
