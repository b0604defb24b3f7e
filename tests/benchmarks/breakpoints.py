"""What four hardware breakpoints cost a trace: its stops and seconds with four at a time, and with one at each stage.

    python -m tests.benchmarks.breakpoints [RUNS]

The reference guest with 4 CPUs, whose stub takes any number; the two ways alternate, and the figures are medians from
the crash key to the handover.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from tests.live.machines import guest, target
from xencrash.gdbmi import open_session
from xencrash.trace import follow


def measure(slots: int) -> tuple[int, float]:
    """Stops, and seconds."""
    times: list[float] = []
    stops: list[float] = []

    with guest(cpus=4) as lab, open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
        session.cli(f"python import xen_symbols.crashpath.follow; xen_symbols.crashpath.follow.SLOTS = {slots}")

        def crash() -> None:
            times.append(time.monotonic())
            lab.serial.send(b"C")

        def seen(stage: Any, _findings: Any) -> None:
            if stage["stage"] == "handover":
                times.append(time.monotonic())

        follow(session, timeout=120, trigger=crash, progress=seen, on_stop=lambda _: stops.append(time.monotonic()))
    return len(stops), times[-1] - times[0]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    found: dict[int, list[tuple[int, float]]] = {4: [], 100: []}
    for _ in range(runs):
        for slots, measured in found.items():
            measured.append(measure(slots))
    for slots, measured in found.items():
        stops, seconds = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"at most {slots} breakpoints: {stops:.0f} stops, {seconds:.2f} s")


if __name__ == "__main__":
    main()
