"""Crash Xen on purpose. `--how` is one of

  key           C on Xen's console; the CPU that takes the serial interrupt crashes
  panic         dom0's kernel panics
  nmi           an NMI on CPU 0, fatal to a Xen booted with nmi=fatal: the crash
                begins inside it
  watchdog      a CPU is stuck in Xen, and the watchdog of a Xen booted with
                watchdog=force finds that in an NMI
  mce           a fatal machine check: the crash begins inside it
  bug           Xen executes ud2, as BUG() does
  page-fault    Xen reads what is not mapped
  double-fault  Xen loses its stack

watchdog and the last three are planted in Xen's kexec hypercall, which dom0 then
makes. For them and for panic `lab up --dom0-vcpus CPUS` (as many as the machine
has) lets `--cpu` choose the CPU. A machine check can be given any CPU, by default
CPU 0.
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
    crashing.prepare(asked.how, asked.cpu)
    crashing.crash(asked.how, asked.cpu)
    wait_until_seen(crashing, since)
    print(f"crashing; see {crashing.serial_log}")
    return 0
