"""List the machines that run in folders under /tmp, or the one of --run-dir."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from xen_symbols.text import escaped
from xencrash.lab.machine import running
from xencrash.lab.options import STEP, add_run_dir, machine

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table")
    add_run_dir(parser)


def run(args: Namespace) -> int:
    states = [found.status() for found in ([machine(args)] if args.run_dir else running())]
    if args.format == "json":
        print(json.dumps(states, indent=2))
    elif not states:
        print("no machine runs: xencrash lab up boots one")
    for state in states if args.format == "table" else []:
        show(state)
    return 0


def show(state: dict[str, Any]) -> None:
    """A machine's status, a line for each part."""
    width = max(map(len, state))
    print("\n".join(f"{name:{width}}  {escaped(str(value))}" for name, value in state.items()) + "\n")
