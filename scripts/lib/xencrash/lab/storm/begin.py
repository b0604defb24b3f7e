"""From a specification to the snapshot at its crash's first instruction, and the scene that all experiments share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from xen_symbols.records import NamedTuple
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import TEXT, SymbolTable
from xen_symbols.targets.qmp import Qmp
from xencrash.lab import boot, crash
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.packages import Cache
from xencrash.lab.specification import Specification
from xencrash.lab.storm.livetarget import StormTarget
from xencrash.lab.storm.record import Recorder, Recording
from xencrash.lab.storm.rsp import Rsp
from xencrash.lab.storm.scene import Scene, set_scene
from xencrash.lab.storm.snapshot import Live, Snapshot

Progress = Callable[[str], None]

_CRASHES_IN = 60.0  # seconds from the key to kexec_crash, on a busy host
_IDLE = 0.005
_GUEST_READY, _GUEST_KERNEL = rb"CPUs ready", b"crash image: NMIs are unblocked"


class Scenery(NamedTuple):
    """What the experiments of a run have in common."""

    snapshot: Snapshot
    scene: Scene
    recording: Recording


def begin(specification: Specification, folder: Path, progress: Progress) -> Scenery:
    """Boot, crash, save, and single-step once. Raises LabError."""
    if specification.cpus < 2:
        raise LabError("storm: a machine of one CPU has no other to shoot down: give --cpus 2 or more")
    snapshot = Snapshot(boot.recipe_of(specification, Cache(progress=progress)), folder)
    symbols = load_symbols(os.fspath(snapshot.recipe.boot.symbols))
    with boot.up(specification, progress=progress, shared_ram=True) as machine:
        if specification.guest:
            machine.serial.wait(_GUEST_READY, 30)
        crashing = _crash(machine, specification, symbols, snapshot)
    with snapshot.machine() as live:
        scene = set_scene(live.target, symbols, crashing, _GUEST_KERNEL if specification.guest else None)
        progress(f"CPU {crashing} crashes; recording its path and the others', instruction by instruction")
        recording = Recorder(live, scene, progress).record()
    return Scenery(snapshot, scene, recording)


def _crash(machine: Machine, specification: Specification, symbols: SymbolTable, snapshot: Snapshot) -> int:
    """Crash the machine, save it at the first instruction, and return the crashing CPU."""
    entry = symbols.get("kexec_crash", TEXT)
    if entry is None:
        raise LabError("storm: the symbols do not name kexec_crash")
    if not specification.guest:
        crash.prepare(specification.crash, machine)
    with Rsp(machine.gdb_socket) as rsp, Qmp(machine.qmp_socket) as qmp:
        rsp.break_at([entry])
        rsp.begin_all()
        if specification.guest:
            machine.serial.send(b"C")
        else:
            crash.cause(specification.crash, machine, machine.serial, machine.dom0)
        stop = rsp.wait(_CRASHES_IN)
        if stop is None or rsp.registers(stop.cpu)["rip"] != entry:
            raise LabError(f"storm: the machine did not reach kexec_crash: {machine.where_to_look()}")
        rsp.break_at([entry], on=False)
        # QEMU does not start a machine from a stream that says that it stands at a breakpoint: one that was interrupted
        # does not say so. The crashing CPU stays where it is.
        rsp.run([cpu for cpu in range(specification.cpus) if cpu != stop.cpu], _IDLE)
        live = Live(machine.paths, None, qmp, rsp, StormTarget(rsp, qmp, (), machine.run_dir))
        snapshot.keep(live, machine.ram_file)
    return stop.cpu
