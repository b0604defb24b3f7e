"""How many experiments of a storm are done in a second.

    python -m tests.benchmarks.storm [--xen ROW | --guest GENERATION] [--seconds N] [--jobs N]

Injections, in the order of seed 0. Booting and recording are not counted. The goal, on two quiet cores with two
machines at a time: 5 a second on the guest, 2 on real Xen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter

from xencrash.lab import progress
from xencrash.lab.specification import Specification
from xencrash.lab.storm.begin import begin
from xencrash.lab.storm.explore import plan
from xencrash.lab.storm.run import Budget, Storm
from xencrash.lab.storm.snapshot import folder_for_snapshot


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.storm", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--xen", metavar="ROW")
    parser.add_argument("--guest", metavar="GENERATION", help="default: 4.17.0, without --xen")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    wanted = Specification(xen=args.xen) if args.xen else Specification(guest=args.guest or "4.17.0")
    with folder_for_snapshot() as folder:
        scenery = begin(wanted, folder, progress.on_stderr())
        experiments, planned = plan(scenery, ["injection"], 1, 0, True)
        storm = Storm(scenery, Budget(args.seconds, None, args.jobs), progress.on_stderr())
        begun = time.monotonic()
        results = storm.run(experiments, planned)
        took = time.monotonic() - begun
    counted = Counter(str(result.outcome.verdict) for result in results)
    each = statistics.median(result.seconds for result in results)
    rate, load = len(results) / took, os.getloadavg()[0]
    print(f"{wanted.name}: {len(results)} experiments in {took:.0f} s, {rate:.2f} a second with {args.jobs} machines")
    print(f"one takes {each:.2f} s (median); load {load:.1f}; {dict(counted)}")


if __name__ == "__main__":
    main()
