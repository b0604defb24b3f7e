"""A machine saved to files and started from them: QEMU's migration, with the RAM beside the stream.

The stream (`x-ignore-shared`) holds only the devices. The RAM is copied once, and mapped privately by each machine
that starts from it, so none changes it. Since QEMU 8.2 only RAM in a file that QEMU opens by name counts as shared:
qemu.Memory is one, by its name under /proc.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.qemu import Paths
from xencrash.lab.sparse import copy_packed

RAM = "ram"
VERSION = 1  # of what is saved, and how it is loaded
_STATE, _DISK = "state", "disk.raw"
_TIMEOUT = 120.0


def save(machine: Machine, folder: Path) -> dict[str, Any]:
    """Save a running machine's RAM, devices, disk and logs; it keeps running. Returns what else `load` needs."""
    machine.qmp("stop")
    try:
        _ignore_ram(machine)
        machine.qmp("migrate", uri=f"exec:cat >{shlex.quote(str(folder / _STATE))}")
        _migrated(machine, "saving the machine")
        copy_packed(machine.ram_file, folder / RAM)
        copy_packed(machine.paths.disk, folder / _DISK)
        for log in (machine.paths.serial_log, machine.paths.line_log):
            shutil.copyfile(log, folder / log.name)
    finally:
        machine.qmp("cont")
    return {"domus": list(machine.domus.rounds.items())}


def write_files(folder: Path, paths: Paths) -> None:
    """Write the disk and the logs of a machine that is about to be loaded, and that continues them."""
    copy_packed(folder / _DISK, paths.disk)
    for log in (paths.serial_log, paths.line_log):
        shutil.copyfile(folder / log.name, log)


def load(machine: Machine, folder: Path, about: dict[str, Any]) -> None:
    """Have a waiting QEMU (`-incoming defer -S`) continue from where the machine was saved."""
    _ignore_ram(machine)
    machine.qmp("migrate-incoming", uri=f"exec:cat {shlex.quote(str(folder / _STATE))}")
    _migrated(machine, "loading the machine")
    machine.domus.rounds = {domid: [0] * len(rounds) for domid, rounds in about["domus"]}
    machine.dom0.clock_is_late = True
    machine.qmp("cont")


def _ignore_ram(machine: Machine) -> None:
    machine.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])


def _migrated(machine: Machine, step: str) -> None:
    def done() -> bool | None:
        migration = machine.qmp("query-migrate")
        if (status := migration.get("status")) in ("failed", "cancelled"):
            why = migration.get("error-desc", status)
            raise LabError(f"{step}: QEMU's migration failed: {why}: {machine.where_to_look()}")
        return True if status == "completed" else None

    machine.until(step, _TIMEOUT, done)
