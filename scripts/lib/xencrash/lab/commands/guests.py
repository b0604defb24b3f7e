"""The reference guest is a small bare-metal program with Xen's crash path, in each
of its generations, and with faults to find: `lab up --guest GENERATION --fault NAME`.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from xencrash.guests import listing
from xencrash.lab.options import STEP

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: Namespace) -> int:
    known = listing()
    if args.format == "json":
        print(json.dumps(known, indent=2))
        return 0
    print("generations: " + " ".join(generation["id"] for generation in known["generations"]))
    for generation in known["generations"]:
        if generation.get("finds"):
            finds = " ".join(generation["finds"])
            print(f"{generation['id']} by itself, with {generation['cpus']} CPUs or more, fails: {finds}")
    for fault in known["faults"]:
        needs = [f"{fault['cpus']} CPUs"] if fault["cpus"] > 1 else []
        needs += ["x2APIC"] if fault["lapic"] else []
        needs += ["trace --gates"] if fault["gates"] else []
        print(f"\n{fault['id']}: {fault['does']}")
        if not fault["visible"]:
            print(f"  leaves no trace in any readable state: {fault['reason']}")
        print(f"  in {' '.join(fault['generations'])}" + (f"; needs {', '.join(needs)}" if needs else ""))
    return 0
