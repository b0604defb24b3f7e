"""What judging a dump costs, as ratios to `python -c pass` measured in the same run.

    python -m tests.benchmarks.check [VMCORE XEN-SYMS]

Synthesised dumps of 4, 256 and 4096 CPUs in 4 GB, and 4 CPUs in a sparse 64 GB; with arguments, a real one as well, and
crash(8) and xen-crashdump-analyser on it where they are installed.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import dumpwriter
from tests.syntheticxen import SyntheticXen
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.model import Verdict
from xen_symbols.symbols.table import load_symbols
from xen_symbols.target.dump import open_dump
from xen_symbols.xen.locate import locate

RUNS = 7


def median(run: Callable[[], object], runs: int = RUNS) -> float:
    """Median wall time of several runs, seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def process(*command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def peak_kib(command: Sequence[str]) -> int:
    """Peak resident memory of one child, KiB."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    return int(subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True).stdout)


def synthesise(directory: Path, cpus: int, gigabytes: int) -> tuple[str, str]:
    """(dump, map) of a crashed Xen in so much memory."""
    xen = SyntheticXen(cpus)
    dump, symbols = directory / f"{cpus}-{gigabytes}.elf", directory / f"{cpus}.map"
    with dump.open("wb") as file:
        dumpwriter.write_elf(file, [(0, gigabytes << 30)], xen.content, xen.notes())
    symbols.write_text(xen.map_file())
    return str(dump), str(symbols)


def measure(name: str, dump: str, symbols: str, baseline: float) -> float:
    """Print a line for one dump; returns the in-process seconds."""
    command = [sys.executable, "-m", "xencrash", "check", dump, "--symbols", symbols, "--format", "json"]
    whole = median(process(*command))
    parts = {
        "symbols": median(lambda: load_symbols(symbols).get("idle_pg_table")),
        "opening": median(lambda: locate(open_dump(dump), load_symbols(symbols)))
        - median(lambda: load_symbols(symbols).get("idle_pg_table")),
    }
    memory = locate(open_dump(dump), load_symbols(symbols))
    assert evaluate(memory).verdict is Verdict.PASS, name
    parts["checks"] = median(lambda: evaluate(memory))
    inside = sum(parts.values())
    shown = ", ".join(f"{part} {seconds * 1000:.1f} ms" for part, seconds in parts.items())
    print(f"{name:24} process {whole / baseline:5.1f} x python, {peak_kib(command) / 1024:.0f} MB; inside: {shown}")
    return inside


def main() -> None:
    baseline = median(process(sys.executable, "-c", "pass"))
    print(f"python -c pass           {baseline * 1000:.1f} ms")
    inside = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for cpus, gigabytes in ((4, 4), (4, 64), (256, 4), (4096, 4)):
            dump, symbols = synthesise(directory, cpus, gigabytes)
            inside[cpus, gigabytes] = measure(f"{cpus} CPUs, {gigabytes} GB", dump, symbols, baseline)
    per_cpu = (inside[4096, 4] - inside[256, 4]) / (4096 - 256)
    print(f"per CPU                  {per_cpu * 1e6:.0f} us")
    print(f"64 GB to 4 GB            {inside[4, 64] / inside[4, 4]:.2f}")
    if len(sys.argv) == 3:
        dump, symbols = sys.argv[1:]
        measure("real", dump, symbols, baseline)
        for tool in ("crash", "xen-crashdump-analyser"):
            if shutil.which(tool):
                command = [tool, "--hyper", symbols, dump] if tool == "crash" else [tool, "-c", dump, "-x", symbols]
                print(f"{tool:24} {median(process(*command)) / baseline:.1f} x python")
    print(f"this process             {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
