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
# Seconds from gdb's word that the machine runs until it does; and until an interrupt was lost, as one before that is.
# A second one while gdb waits for the first to take effect has it ask whether to give up.
_AT_LEAST, _AGAIN = 0.05, 30.0
_stops: list[gdb.StopEvent] = []


def _note_stop(event: gdb.StopEvent) -> None:
    _stops.append(event)


def let_run(seconds: float | None) -> Stop:
    """Let the machine run until it stops; after `seconds` make it stop. Raises Undecidable when it is gone."""
    fired, over = threading.Event(), threading.Event()

    def interrupt() -> None:
        left = max(seconds or 0.0, _AT_LEAST)
        while not over.wait(left):
            fired.set()
            os.kill(os.getpid(), signal.SIGINT)  # which gdb turns into a stop of the machine
            left = _AGAIN

    timer = threading.Thread(target=interrupt, daemon=True)

    def start(event: gdb.ContinueEvent) -> None:
        if seconds is not None and timer.ident is None:
            timer.start()

    _stops.clear()
    gdb.events.stop.connect(_note_stop)
    gdb.events.cont.connect(start)
    try:
        gdb.execute("continue", to_string=True)
        over.set()
        if timer.ident is not None:
            timer.join()
    except gdb.error as error:
        refused = any(words in str(error) for words in _REFUSED)
        raise Undecidable(NOT_SET if refused else f"{_GONE} ({error})") from None
    except KeyboardInterrupt:
        if not fired.is_set():
            raise
        # Ours, for a machine that does not run: not yet, since a busy host's gdb is slow, or no longer.
    finally:
        over.set()
        gdb.events.cont.disconnect(start)
        gdb.events.stop.disconnect(_note_stop)
    if gdb.selected_thread() is None:
        raise Undecidable(_GONE)
    interrupted = bool(_stops) and isinstance(_stops[-1], gdb.SignalEvent)
    return Stop(expired=fired.is_set(), interrupted=interrupted and not fired.is_set())
