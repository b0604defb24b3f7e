"""Making the machine that a specification asks for: its images, its QEMU, and its boot as far as it is waited for."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from xencrash import guests
from xencrash.lab import images
from xencrash.lab.dom0 import READY
from xencrash.lab.errors import LabError
from xencrash.lab.firmware import with_x2apic_on
from xencrash.lab.machine import XEN_UP, Machine, logs_say_why
from xencrash.lab.packages import Cache
from xencrash.lab.process import Progress
from xencrash.lab.qemu import Boot, Paths, Program, command_line, start, start_time
from xencrash.lab.runs import State, new_run
from xencrash.lab.specification import Specification

CRASH_KERNEL_MIB = 256
DOM0_MIB = 512
BOOT_TIMEOUT = 600.0  # 32 vCPUs on two busy host cores boot within this
_STALLED = 180.0  # seconds without a word on the console: a boot of dom0 under TCG hangs for good once in a long while
_DIED = rb"Panic on CPU \d+|Kernel panic - not syncing|Hardware Dom0 halted"


class _Stalled(LabError):
    """A boot that came to a standstill."""


@dataclass(frozen=True)
class Recipe:
    """What QEMU is given for a specification."""

    specification: Specification
    program: Program
    boot: Boot

    def command(self, paths: Paths) -> list[str]:
        spec = self.specification
        iommu = ("-device", spec.qemu_row.iommu) if spec.pvh else ()
        return command_line(
            self.program,
            replace(self.boot, kernel=paths.kernel) if spec.lapic_row.firmware else self.boot,
            paths,
            cpus=spec.cpus,
            max_cpus=spec.max_cpus,
            memory_mib=spec.memory_mib,
            paused=spec.paused,
            extra=(*iommu, *spec.qemu_args),
        )

    def write_files(self, paths: Paths) -> None:
        """Write what belongs to one run alone."""
        with paths.disk.open("wb") as disk:
            # A vmcore is a little larger than the memory it holds.
            disk.truncate((self.specification.memory_mib + 64) << 20)
        if self.specification.lapic_row.firmware:
            paths.kernel.write_bytes(with_x2apic_on(self.boot.kernel.read_bytes()))


def recipe_of(specification: Specification, cache: Cache) -> Recipe:
    """The recipe, with what it needs in the cache. Raises LabError for what cannot be got."""
    spec = specification
    cpu = ",".join(filter(None, (spec.qemu_row.cpu[spec.lapic_row.mode], "-rdtscp" * spec.pvh, spec.cpu_args)))
    program = Program(images.qemu_words(cache, spec.qemu_row), cpu)
    return Recipe(spec, program, spec.kernel or (_guest_boot(spec) if spec.guest else _xen_boot(spec, cache)))


def _guest_boot(spec: Specification) -> Boot:
    assert spec.guest is not None
    built = guests.build(spec.guest)
    append = guests.command_line(fault=spec.fault, crash_cpu=spec.crash.cpu or 0, x2apic=spec.lapic == "x2apic")
    return Boot(kernel=built.kernel, symbols=built.symbols, append=append)


def _xen_boot(spec: Specification, cache: Cache) -> Boot:
    made = (images.domu_images if spec.domu_vcpus else images.xen_images)(cache, spec.xen_row)
    dom0_vcpus = spec.dom0_vcpus or 1
    words = (
        "xen com1=115200,8n1 console=com1 loglvl=all noreboot",
        f"crashkernel={CRASH_KERNEL_MIB}M" * spec.crash_kernel,
        f"dom0_mem={DOM0_MIB}M dom0_max_vcpus={dom0_vcpus}",
        "dom0_vcpus_pin" * (dom0_vcpus == spec.cpus),
        "dom0=pvh" * spec.pvh,
        spec.xen_args,
    )
    kernel = f"{made.kernel} console=hvc0 earlyprintk=xen {spec.dom0_args}".rstrip()
    return Boot(made.xen, made.symbols, " ".join(filter(None, words)), f"{kernel},{made.dom0_initramfs}")


def up(
    specification: Specification,
    run_dir: str | Path | None = None,
    *,
    progress: Progress = lambda text: None,
    owned: bool = True,
) -> Machine:
    """The machine, as far as its specification waits for; on failure nothing of it is left but its logs.

    An owned machine dies with the thread that called this; one that is not is for `attach` and `down`. Raises LabError.
    """
    recipe = recipe_of(specification, Cache(progress=progress))
    paths, temporary = new_run(run_dir)

    def start_one() -> Machine:
        spec = specification
        progress(f"starting {spec.name} on {spec.cpus} CPUs in QEMU {spec.qemu} ({paths.run_dir})")
        return _started(recipe, paths, temporary, owned, progress)

    return boot_twice(start_one, lambda machine: wait_until_up(machine, specification), paths, progress)


def boot_twice(
    start_one: Callable[[], Machine], wait_for: Callable[[Machine], None], paths: Paths, progress: Progress
) -> Machine:
    """The started machine that was waited for; one whose boot comes to a standstill is started once more."""
    try:
        return _boot(start_one, wait_for)
    except _Stalled as stalled:
        for log in (paths.serial_log, paths.line_log, paths.qemu_log):
            log.replace(log.with_suffix(".stalled.log"))
        progress(f"{stalled} (now *.stalled.log); starting it once more")
    return _boot(start_one, wait_for)


def _boot(start_one: Callable[[], Machine], wait_for: Callable[[Machine], None]) -> Machine:
    machine = start_one()
    try:
        wait_for(machine)
    except BaseException as error:
        machine.down(keep=logs_say_why(error))
        raise
    return machine


def _started(recipe: Recipe, paths: Paths, temporary: bool, owned: bool, progress: Progress) -> Machine:
    spec = recipe.specification
    recipe.write_files(paths)
    child = start(recipe.command(paths), paths, owned)
    state = State(
        pid=child.pid,
        started=start_time(child.pid) or 0,
        symbols=str(recipe.boot.symbols),
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        dom0_vcpus=spec.dom0_vcpus or 1,
        guest=spec.name,
        qemu=spec.qemu,
        owned=owned,
    )
    return Machine(paths, state, temporary, progress, child)


def wait_until_up(machine: Machine, spec: Specification) -> None:
    machine.paths.state.write_text(json.dumps(asdict(machine.state), indent=1))
    machine.until("starting QEMU", 30, lambda: all(path.exists() for path in machine.paths.sockets) or None)
    if spec.paused or not spec.boots_xen or spec.wait == "none":
        return
    begun = time.monotonic()
    _boots(machine, "booting Xen", machine.paths.serial_log, XEN_UP)
    if spec.boots_dom0:
        _boots(machine, "booting dom0", machine.paths.line_log, READY)
        machine.progress(f"dom0 is up after {time.monotonic() - begun:.1f} s")
        if spec.loads_crash_kernel:
            machine.dom0.load_crash_kernel()
        if spec.domu_vcpus:
            machine.domus.create(spec.domu_vcpus)


def _boots(machine: Machine, step: str, log: Path, sign: bytes) -> None:
    size, heard = 0, time.monotonic()

    def ready() -> bool | None:
        nonlocal size, heard
        if re.search(_DIED, machine.read_log(machine.serial_log)):
            raise LabError(f"{step}: it died: {machine.where_to_look()}")
        if re.search(sign, machine.read_log(log), re.MULTILINE):
            return True
        if (now := machine.serial.size()) != size:
            size, heard = now, time.monotonic()
        elif time.monotonic() - heard > _STALLED:
            raise _Stalled(f"{step}: the console said nothing for {_STALLED:.0f} s: {machine.where_to_look()}")
        return None

    machine.until(step, BOOT_TIMEOUT, ready)
