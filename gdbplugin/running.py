"""Lets the machine run from gdb's command line, with hardware breakpoints that the user does not see."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import gdb

from gdbplugin.declare import Stop
from xen_symbols.absence import Undecidable

_GONE = "QEMU went away: the guest was reset with -no-reboot, or QEMU ended; see its log"
NOT_SET = (
    "gdb could not set its breakpoints: the machine takes no more hardware breakpoints (KVM has four, watchpoints "
    "included); delete your own"
)
_REFUSED = ("Command aborted", "Cannot insert hardware", "Could not insert hardware")  # gdb's words


@contextlib.contextmanager
def breakpoints() -> Iterator[Callable[[Sequence[int]], None]]:
    """A function to call with the addresses to break on from now on, and with none at the end."""
    made: dict[int, gdb.Breakpoint] = {}

    def keep(addresses: Sequence[int]) -> None:
        for address in made.keys() - set(addresses):
            point = made.pop(address)
            if point.is_valid():
                point.delete()
        for address in addresses:
            if address not in made:
                made[address] = gdb.Breakpoint(f"*{address:#x}", type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)
                made[address].silent = True

    try:
        yield keep
    finally:
        keep(())


def own_hardware() -> int:
    """How many hardware breakpoints and watchpoints there are already."""
    return sum(bool(point.enabled) and point.type in _HARDWARE for point in gdb.breakpoints())


_HARDWARE = (gdb.BP_HARDWARE_BREAKPOINT, gdb.BP_HARDWARE_WATCHPOINT, gdb.BP_READ_WATCHPOINT, gdb.BP_ACCESS_WATCHPOINT)
_stops: list[gdb.StopEvent] = []


def _note_stop(event: gdb.StopEvent) -> None:
    _stops.append(event)


def let_run(seconds: float | None) -> Stop:
    """Let the machine run until it stops; after `seconds` make it stop. Raises Undecidable when it is gone."""
    fired = threading.Event()

    def interrupt() -> None:
        fired.set()
        os.kill(os.getpid(), signal.SIGINT)  # which gdb turns into a stop of the machine

    timer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, interrupt)
    timer.daemon = True
    _stops.clear()
    gdb.events.stop.connect(_note_stop)
    timer.start()
    try:
        gdb.execute("continue", to_string=True)
    except gdb.error as error:
        refused = any(words in str(error) for words in _REFUSED)
        raise Undecidable(NOT_SET if refused else f"{_GONE} ({error})") from None
    finally:
        timer.cancel()
        gdb.events.stop.disconnect(_note_stop)
    if gdb.selected_thread() is None:
        raise Undecidable(_GONE)
    interrupted = bool(_stops) and isinstance(_stops[-1], gdb.SignalEvent)
    return Stop(expired=fired.is_set(), interrupted=interrupted and not fired.is_set())
