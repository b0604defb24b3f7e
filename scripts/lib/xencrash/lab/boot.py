"""Makes the machine that a specification asks for: its images, its QEMU, and its boot up to the point waited for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from xencrash import guests
from xencrash.lab import dom0, efi, images, nested, saved
from xencrash.lab.digests import sha256_of
from xencrash.lab.errors import LabError
from xencrash.lab.firmware import with_x2apic_on
from xencrash.lab.machine import GUEST_UP, XEN_UP, Machine, logs_say_why
from xencrash.lab.packages import Cache
from xencrash.lab.process import Progress
from xencrash.lab.qemu import Boot, Memory, Paths, Program, Ram, command_line, start, start_time
from xencrash.lab.runs import State, new_run
from xencrash.lab.snapshots import Snapshot, Snapshots, limit_of_space
from xencrash.lab.sparse import copy_packed
from xencrash.lab.specification import Specification

# All but its own memory is what a crash kernel copies, at 100 MiB a second under TCG: dom0 has what it needs, which is
# most while it loads a crash kernel of 40 MiB and has it three times.
CRASH_KERNEL_MIB = 192
DOM0_MIB = 320
BOOT_TIMEOUT = 600.0  # 32 vCPUs on two busy host cores boot within this
_STALLED = 180.0  # seconds without console output: under TCG, a boot of dom0 very occasionally hangs
# Seconds for which dom0 says itself that a CPU of it got nowhere; it goes on saying so. A busy host makes it some 20.
_STUCK = 60
_STUCK_FOR = re.compile(rb"watchdog: BUG: soft lockup - CPU#\d+ stuck for (\d+)s!")
_WORDS = 3  # lines
_DIED = rb"Panic on CPU \d+|Kernel panic - not syncing|Hardware Dom0 (?:halted|crashed)"


class Stalled(LabError):
    """A boot that made no more progress."""


@dataclass(frozen=True)
class Recipe:
    """The files and command lines that QEMU gets for a specification."""

    specification: Specification
    program: Program
    boot: Boot

    def command(self, paths: Paths, ram: Ram, incoming: bool = False) -> list[str]:
        spec = self.specification
        iommu = ("-device", spec.qemu_row.iommu) if spec.pvh else ()
        boot = replace(self.boot, kernel=paths.kernel) if spec.lapic_row.firmware else self.boot
        return command_line(
            self.program,
            nested.moved(boot, paths) if spec.accel_row.nested else boot,
            paths,
            ram,
            cpus=spec.cpus,
            max_cpus=spec.max_cpus,
            memory_mib=spec.memory_mib,
            paused=spec.paused,
            incoming=incoming,
            connected=nested.ENDS if spec.accel_row.nested else None,
            extra=(*iommu, *spec.qemu_args),
        )

    def kernel(self) -> bytes:
        """The image that is booted."""
        image = self.boot.kernel.read_bytes()
        return with_x2apic_on(image) if self.specification.lapic_row.firmware else image

    def key(self) -> str:
        """A name for the resulting machine: a digest of all files that QEMU reads, its command line, and what is done
        once dom0 is up. Whatever changes the machine changes the key."""
        spec = self.specification
        everything = {
            "command": self.command(Paths(Path("/run")), Ram(Path("/ram"))),
            "files": {str(path): sha256_of(path) for path in self._files()},
            "kernel": hashlib.sha256(self.kernel()).hexdigest(),
            "then": [dom0.KEXEC * spec.loads_crash_kernel],
            "saved as": saved.VERSION,
        }
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:32]

    def _files(self) -> Iterator[Path]:
        yield from self.program.files()
        yield from (Path(module.split(" ")[0]) for module in self.boot.modules)
        if made := self.boot.efi:
            yield from (made.firmware, *sorted(filter(Path.is_file, made.esp.rglob("*"))))


def recipe_of(specification: Specification, cache: Cache) -> Recipe:
    """The recipe, with what it needs in the cache. Raises LabError for what cannot be fetched."""
    spec = specification
    words = (spec.cpu_modes[spec.lapic_row.mode], "-rdtscp" * spec.pvh, spec.cpu_args, spec.crash_cpu_args)
    cpu = ",".join(filter(None, words))
    accel = spec.accel_row
    program = Program(images.qemu_words(cache, spec.qemu_row), cpu, accel.option, accel.irqchip)
    return Recipe(spec, program, spec.kernel or (_guest_boot(spec) if spec.guest else _xen_boot(spec, cache)))


def _guest_boot(spec: Specification) -> Boot:
    assert spec.guest is not None
    built = guests.build(spec.guest)
    append = guests.command_line(fault=spec.fault, crash_cpu=spec.crash.cpu or 0, x2apic=spec.lapic == "x2apic")
    return Boot(kernel=built.kernel, symbols=built.symbols, append=append)


def _images(spec: Specification, cache: Cache) -> images.XenImages:
    if spec.xen_image:
        spec.xen_image.check(spec.loads_crash_kernel)
        return images.own_images(cache, spec.xen_image)
    made = (images.domu_images if spec.domu_vcpus else images.xen_images)(cache, spec.xen_row)
    return efi.row_images(cache, spec.xen_row, made) if spec.boots_efi else made


def _xen_boot(spec: Specification, cache: Cache) -> Boot:
    made = _images(spec, cache)
    dom0_vcpus = spec.dom0_vcpus or 1
    words = (
        "xen com1=115200,8n1 console=com1 loglvl=all noreboot",
        f"crashkernel={CRASH_KERNEL_MIB}M" * spec.crash_kernel,
        f"dom0_mem={DOM0_MIB}M dom0_max_vcpus={dom0_vcpus}",
        "dom0_vcpus_pin" * (dom0_vcpus == spec.cpus),
        "dom0=pvh" * spec.pvh,
        spec.crash.way.xen_args,
        spec.xen_args,
    )
    quiet = " quiet" * spec.accel_row.nested  # where each byte of the console takes its time
    kernel = f"{made.kernel} console=hvc0 earlyprintk=xen{quiet} {spec.dom0_args}".rstrip()
    multiboot = Boot(made.xen, made.symbols, " ".join(filter(None, words)), f"{kernel},{made.dom0_initramfs}")
    return efi.booted(cache, multiboot, made.kernel, made.dom0_initramfs) if spec.boots_efi else multiboot


def up(
    specification: Specification,
    run_dir: str | Path | None = None,
    *,
    progress: Progress = lambda text: None,
    owned: bool = True,
    fresh: bool = False,
    shared_ram: bool = False,
) -> Machine:
    """The machine, booted as far as its specification says; on failure only its logs are left.

    If dom0 is waited for, it starts from a snapshot of an earlier boot, or saves one for later. `fresh` boots it and
    saves none. A machine from a snapshot has private RAM that no file shows, unless `shared_ram` asks for one: a copy,
    which takes some tenths of a second.
    An owned machine dies with the thread that called this; any other is for `attach` and `down`. Raises LabError.
    """
    cache = Cache(progress=progress)
    recipe = recipe_of(specification, cache)
    limit = limit_of_space()
    run = Run(recipe, *new_run(run_dir), owned, progress)
    if specification.accel_row.nested:
        return run.in_another(
            lambda folder: up(
                nested.outer(cache, recipe.program, specification.memory_mib),
                folder, progress=progress, owned=owned, fresh=fresh,
            )
        )  # fmt: skip
    if fresh or not specification.keeps_snapshot or not limit:
        return run.booted()
    snapshots = Snapshots(cache.root / "snapshots", limit, progress)
    for anew in (False, True):
        with snapshots.reserved(recipe.key(), anew) as snapshot:
            if not snapshot.exists():
                return run.booted(lambda machine: _keep(machine, snapshots, snapshot))
            try:
                return run.loaded(snapshot, shared_ram)
            except LabError as error:
                progress(f"the snapshot {snapshot.folder} does not start, and is deleted: {error}")
                run.remove_logs()
    raise AssertionError("one that is made anew is not there before")


def _keep(machine: Machine, snapshots: Snapshots, snapshot: Snapshot) -> None:
    """Make the snapshot. If that fails the machine keeps running, and is booted again next time."""
    try:
        snapshots.make(snapshot, lambda folder: saved.save(machine, folder))
    except (OSError, LabError) as error:
        machine.progress(f"no snapshot is kept of this machine: {error}")
        if (status := machine.qmp("query-status")["status"]) != "running":
            raise LabError(f"saving a snapshot: the machine is now {status}: {machine.where_to_look()}") from error


@dataclass(frozen=True)
class Run:
    """A run of a machine: where its files are, and whose it is."""

    recipe: Recipe
    paths: Paths
    temporary: bool
    owned: bool
    progress: Progress

    def booted(self, then: Callable[[Machine], None] = lambda machine: None) -> Machine:
        """Boot it, and do something to it when it is up. If the boot hangs it is tried once more."""
        try:
            return self._boot(then)
        except Stalled as stalled:
            for log in self.paths.logs:
                log.replace(log.with_suffix(".stalled.log"))
            self.progress(f"{stalled} (now *.stalled.log); starting again")
        return self._boot(then)

    def _boot(self, then: Callable[[Machine], None]) -> Machine:
        spec = self.recipe.specification
        self.progress(f"starting {spec.name} on {spec.cpus} CPUs in QEMU {spec.qemu} ({self.paths.run_dir})")
        self._write_disk_and_kernel()
        with Memory(spec.memory_mib << 20) as memory:
            machine = self._started(self.recipe.command(self.paths, Ram(memory.path)), memory)
        with _down_on_failure(machine):
            wait_until_up(machine, spec)
            then(machine)
            self._create_domu(machine)
        return machine

    def in_another(self, start_outer: Callable[[Path], Machine]) -> Machine:
        """Boot it in a machine that is started in a given folder."""
        spec = self.recipe.specification
        outer = start_outer(self.paths.outer)
        machine = self._machine(outer.state.pid, outer.child)
        with _down_on_failure(machine):
            self.progress(f"starting {spec.name} on {spec.cpus} CPUs in QEMU {spec.qemu} in it ({self.paths.run_dir})")
            nested.place(self.recipe.boot, self.recipe.kernel(), self.paths)
            nested.start(outer, machine, self.recipe.command(self.paths, Ram(None)))
            wait_until_up(machine, spec)
            self._create_domu(machine)
        return machine

    def loaded(self, snapshot: Snapshot, shared_ram: bool) -> Machine:
        """Start it from a snapshot."""
        spec = self.recipe.specification
        self.progress(
            f"starting {spec.name} on {spec.cpus} CPUs in QEMU {spec.qemu} from a snapshot ({self.paths.run_dir})"
        )
        self._write_disk_and_kernel()
        saved.write_files(snapshot.folder, self.paths)
        ram = snapshot.folder / saved.RAM
        with Memory(spec.memory_mib << 20) if shared_ram else contextlib.nullcontext() as memory:
            if memory:
                copy_packed(ram, memory.path)
            mapped = Ram(memory.path) if memory else Ram(ram, shared=False)
            machine = self._started(self.recipe.command(self.paths, mapped, incoming=True), memory)
        with _down_on_failure(machine):
            wait_for_qemu(machine)
            saved.load(machine, snapshot.folder, snapshot.about())
            if not self.owned:
                machine.dom0.run("true")  # sets its clock, since whoever attaches does not know that it is late
            self._create_domu(machine)
        return machine

    def _create_domu(self, machine: Machine) -> None:
        """Anew each time: QEMU 7.2 does not always load a state in which a CPU is in SVM guest mode."""
        if self.recipe.specification.domu_vcpus:
            machine.domus.create(self.recipe.specification.domu_vcpus)

    def remove_logs(self) -> None:
        for log in self.paths.logs:
            log.unlink(missing_ok=True)

    def _write_disk_and_kernel(self) -> None:
        spec = self.recipe.specification
        with self.paths.disk.open("wb") as disk:
            disk.truncate((spec.memory_mib + 64) << 20)  # a vmcore is a little larger than the memory it holds
        if spec.lapic_row.firmware:
            self.paths.kernel.write_bytes(self.recipe.kernel())

    def _started(self, command: list[str], memory: Memory | None) -> Machine:
        child = start(command, self.paths, self.owned, memory)
        return self._machine(child.pid, child)

    def _machine(self, pid: int, child: subprocess.Popen[bytes] | None) -> Machine:
        spec = self.recipe.specification
        state = State(
            pid=pid,
            started=start_time(pid) or 0,
            symbols=str(self.recipe.boot.symbols),
            memory_mib=spec.memory_mib,
            cpus=spec.cpus,
            dom0_vcpus=spec.dom0_vcpus or 1,
            guest=spec.name,
            qemu=spec.qemu,
            owned=self.owned,
            accel=spec.accel,
        )
        return Machine(self.paths, state, self.temporary, self.progress, child)


@contextlib.contextmanager
def _down_on_failure(machine: Machine) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        machine.down(keep=logs_say_why(error))
        raise


def wait_for_qemu(machine: Machine) -> None:
    """Wait until QEMU answers; after that `attach` finds it."""
    machine.paths.state.write_text(json.dumps(asdict(machine.state), indent=1))
    machine.until("starting QEMU", 30, lambda: all(path.exists() for path in machine.paths.sockets) or None)


def wait_until_up(machine: Machine, spec: Specification) -> None:
    """Wait for as much of the boot as the specification asks for."""
    wait_for_qemu(machine)
    if spec.boots_guest:
        _boots(machine, "booting the reference guest", machine.paths.serial_log, GUEST_UP)
    if spec.boots_shell:
        _boots(machine, f"booting {spec.name}", machine.paths.line_log, dom0.READY)
    if spec.paused or not spec.boots_xen or spec.wait == "none":
        return
    begun = time.monotonic()
    _boots(machine, "booting Xen", machine.paths.serial_log, XEN_UP)
    if spec.boots_dom0:
        _boots(machine, "booting dom0", machine.paths.line_log, dom0.READY)
        machine.progress(f"dom0 is up after {time.monotonic() - begun:.1f} s")
        if spec.loads_crash_kernel:
            machine.dom0.load_crash_kernel()


def last_words(console: bytes) -> str:
    """The first lines from a panic on, without their ornaments, in one."""
    lines = (line.removeprefix("(XEN)").strip(" *\t") for line in console.decode(errors="replace").splitlines())
    return " | ".join([line for line in lines if line][:_WORDS])


def stuck_for(console: bytes) -> int:
    """Seconds for which a CPU of dom0 has been in one loop, by Linux's own watchdog; 0 where it says nothing of it."""
    return max(map(int, _STUCK_FOR.findall(console)), default=0)


def _boots(machine: Machine, step: str, log: Path, sign: bytes) -> None:
    size, heard, slower = 0, time.monotonic(), machine.accel_row.slower

    def ready() -> bool | None:
        nonlocal size, heard
        console = machine.read_log(machine.serial_log)
        if died := re.search(_DIED, console):
            raise LabError(f"{step}: Xen or dom0 died: {last_words(console[died.start() :])}; see {machine.serial_log}")
        if re.search(sign, machine.read_log(log), re.MULTILINE):
            return True
        if (seconds := stuck_for(console)) >= _STUCK * slower:
            raise Stalled(f"{step}: a CPU of dom0 has been stuck for {seconds} s: see {machine.serial_log}")
        if (now := machine.serial.size()) != size:
            size, heard = now, time.monotonic()
        elif time.monotonic() - heard > _STALLED * slower:
            raise Stalled(f"{step}: the console said nothing for {_STALLED * slower:.0f} s: {machine.where_to_look()}")
        return None

    machine.until(step, BOOT_TIMEOUT * slower, ready)
