"""Real Xen with a real Linux dom0 and a real crash kernel in QEMU (no KVM needed), from Debian's packages:

  xencrash lab up                      boot it, and load the crash kernel
  xencrash lab status                  where its sockets and logs are
  xencrash gdb gdb:SOCKET              look at it, or
  xencrash trace gdb:SOCKET --qmp SOCKET   follow the crash that you cause next
  xencrash lab crash                   press Xen's crash key
  xencrash lab dump --output vmcore    take the crash kernel's vmcore
  xencrash check vmcore
  xencrash lab down

  xencrash lab run                     all of that at once
  xencrash lab matrix                  the same for several Xens, QEMUs, gdbs and LAPIC modes
  xencrash lab repeat -n 50            many times, at random moments
  xencrash lab storm                   an NMI or a machine check at every instruction of it

Once dom0 is up the machine is saved as a snapshot, and next time starts from that in a fraction of a second; --fresh
boots it. Snapshots are kept in the cache ($XENCRASH_CACHE, else ~/.cache/xencrash), about 130 MB each and 8 GiB at most
($XENCRASH_SNAPSHOTS sets another number of GiB; 0 keeps none); the least recently used are removed first.
"""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from xencrash.errors import UsageError
from xencrash.lab.errors import BadSpecification
from xencrash.lab.options import STEP
from xencrash.subcommands import Command, add_commands

COMMANDS = {
    "fetch": Command("xencrash.lab.commands.fetch", "fetch packages and make the images, without booting"),
    "up": Command("xencrash.lab.commands.up", "boot a machine and leave it running"),
    "crash": Command("xencrash.lab.commands.crash", "crash Xen"),
    "run": Command("xencrash.lab.commands.run", "all of it: boot, crash, take the vmcore, judge, stop"),
    "matrix": Command(
        "xencrash.lab.commands.matrix", "crash every Xen on every QEMU, with every gdb, in every LAPIC mode"
    ),
    "repeat": Command("xencrash.lab.commands.repeat", "crash Xen many times in a row, at random moments"),
    "storm": Command(
        "xencrash.lab.commands.storm", "an NMI or #MC at every instruction of the crash path, CPUs in every order"
    ),
    "dump": Command("xencrash.lab.commands.dump", "take a dump of the machine"),
    "status": Command(
        "xencrash.lab.commands.status", "which machines run, how far they got, and where their sockets and logs are"
    ),
    "down": Command("xencrash.lab.commands.down", "end a machine and remove its sockets and disk"),
    "guests": Command("xencrash.lab.commands.guests", "the generations and faults that the reference guest knows"),
}
EPILOG = STEP
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def add_options(parser: ArgumentParser) -> None:
    add_commands(parser, COMMANDS, "STEP")


def around(run: Callable[[Namespace], int], args: Namespace) -> int:
    """Run a step so that SIGTERM or a closed terminal leaves no more behind than Ctrl-C does.

    Raises UsageError for an impossible machine.
    """

    def end(number: int, frame: object) -> None:
        for sign in _ENDING:
            signal.signal(sign, signal.SIG_IGN)  # a second one must not disturb the cleanup
        print(f"xencrash: ended by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    before = {sign: signal.getsignal(sign) for sign in _ENDING}
    for sign, handler in before.items():
        if handler is signal.SIG_DFL:  # not one that nohup(1) ignores
            signal.signal(sign, end)
    try:
        return run(args)
    except BadSpecification as error:
        raise UsageError(str(error)) from error
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
