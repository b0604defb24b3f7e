"""Crash Xen on purpose. `--how key` presses C on Xen's console; the CPU that
takes the serial interrupt crashes. `--how panic` makes dom0's kernel panic; with
`lab up --dom0-vcpus CPUS` (as many as the machine has CPUs) `--cpu` chooses the
CPU.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash.lab.crash import wait_until_seen
from xencrash.lab.options import STEP, add_crash, add_run_dir, crash, machine

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    add_crash(parser)
    add_run_dir(parser)


def run(args: Namespace) -> int:
    asked = crash(args)
    crashing = machine(args)
    asked.require_vcpus(crashing.state.cpus, crashing.state.dom0_vcpus)
    since = crashing.serial.size()
    crashing.crash(asked.how, asked.cpu)
    wait_until_seen(crashing, since)
    print(f"crashing; see {crashing.serial_log}")
    return 0
