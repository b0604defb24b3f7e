"""One machine of the lab: a guest booted in QEMU, its sockets and logs, and what can be done to it."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from xen_symbols.targets.qmp import Qmp, QmpError
from xencrash.lab import images
from xencrash.lab.errors import LabError
from xencrash.lab.firmware import with_x2apic_on
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot, Paths, Program, command_line, cpu_of, end, start, start_time
from xencrash.lab.rows import DEFAULT_QEMU, DEFAULT_XEN, LAPICS, QEMUS, XENS
from xencrash.lab.runs import State, known_run, new_run, runs_folder
from xencrash.lab.vmcore import copy_sparse, elf_size

Progress = Callable[[str], None]
_T = TypeVar("_T")

CRASH_KERNEL_MIB = 256
DOM0_MIB = 512
BOOT_TIMEOUT = 600.0  # 32 vCPUs on two busy host cores boot within this
_STALLED = 180.0  # seconds without a word on the console: a boot of dom0 under TCG hangs for good once in a long while

_KEXEC = (
    "kexec -p /boot/vmlinuz --initrd=/boot/crash.cpio.gz "
    '--append="console=ttyS0 irqpoll nr_cpus=1 reset_devices loglevel=5"'
)
_RESUMES_IN = 5.0  # seconds from gdb's "running" to QEMU's, on a loaded host
_BUSY_ANSWERS = 600.0  # seconds for a word of a dom0 that shares each CPU with loops and a domU, on a busy host
_TO_XEN = rb"Serial input to Xen"
_DIED = rb"Panic on CPU \d+|Kernel panic - not syncing|Hardware Dom0 halted"
_XEN_UP = rb"Brought up \d+ CPUs"
_DOM0_UP = rb"^@dom0 ready\r?\n"
_COPIED = rb"^@vmcore (?:copied (?P<size>\d+)|failed: (?P<reason>[^\r\n]*))\r?\n"
_PHASES = (  # the newest that a log shows is where the machine is
    ("vmcore copied", "line", rb"^@vmcore copied"),
    ("crash kernel runs", "line", rb"^@crash kernel"),
    ("crash kernel loaded", "line", rb"^@crash-kernel-loaded 0\r?$"),
    ("dom0 runs", "line", _DOM0_UP),
    ("Xen runs", "serial", _XEN_UP),
)


class _Stalled(LabError):
    """A boot that came to a standstill."""


@dataclass(frozen=True)
class Machine:
    """What is to be booted. Raises LabError for what cannot be.

    `xen` and `qemu` are rows of the lab; `guest` boots that instead of Xen and dom0. `lapic` is a row of LAPICS or None
    (what this QEMU does). `domu_vcpus` is the number of CPUs on which a domU spins once dom0 is up (`Lab.create_domu`).
    With `pvh` dom0 is a PVH guest, its vCPUs in SVM guest mode, and no crash kernel is loaded: kexec finds no place for
    one there. It gets no RDTSCP, on whose intercept Xen kills it under TCG.
    `cpu_args` is added to QEMU's -cpu, `qemu_args` to its command line. `wait` is how far the boot is waited for:
    "dom0" (a shell answers, and the crash kernel is loaded unless `crash_kernel` is false), "xen" (all CPUs are up) or
    "none". `paused` stops before the first instruction, and waits for nothing.
    """

    xen: str = DEFAULT_XEN
    qemu: str = DEFAULT_QEMU
    lapic: str | None = None
    guest: Boot | None = None
    cpus: int = 4
    max_cpus: int | None = None
    memory_mib: int = 1024
    crash_kernel: bool = True
    xen_args: str = ""
    dom0_args: str = ""
    dom0_vcpus: int = 1
    domu_vcpus: int = 0
    pvh: bool = False
    cpu_args: str = ""
    qemu_args: Sequence[str] = ()
    wait: str = "dom0"
    paused: bool = False

    def __post_init__(self) -> None:
        if self.wait not in ("dom0", "xen", "none"):
            raise LabError(f"starting the lab: wait is dom0, xen or none, not {self.wait!r}")
        if self.domu_vcpus > self.cpus:
            raise LabError(
                f"starting the lab: each of a domU's {self.domu_vcpus} vCPUs needs a CPU of its own, of {self.cpus}"
            )

    @property
    def name(self) -> str:
        return self.guest.kernel.name if self.guest else f"Xen {self.xen}"


class Lab:
    """A running machine. Get one from `Lab.up` (a context manager) or `Lab.attach`."""

    def __init__(self, paths: Paths, state: State, temporary: bool, progress: Progress) -> None:
        self.paths = paths
        self.state = state
        self._temporary = temporary  # the folder is ours to remove
        self._progress = progress
        self._lines: dict[Path, _Line] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._domu: dict[int, list[int]] = {}  # by domain ID, how often each vCPU was seen to have counted
        self._loops: set[int] = set()  # process IDs in dom0

    # Where things are.

    @property
    def run_dir(self) -> Path:
        return self.paths.run_dir

    @property
    def gdb_socket(self) -> Path:
        """Of QEMU's gdbstub: `target remote PATH`."""
        return self.paths.gdb

    @property
    def qmp_socket(self) -> Path:
        """For tools; the lab itself uses another one."""
        return self.paths.qmp

    @property
    def serial_log(self) -> Path:
        """Everything that Xen, dom0's kernel and the crash kernel printed."""
        return self.paths.serial_log

    @property
    def qemu_log(self) -> Path:
        return self.paths.qemu_log

    @property
    def symbols(self) -> Path:
        """An ELF file with the symbols of exactly this build."""
        return Path(self.state.symbols)

    @property
    def qemu_pid(self) -> int:
        return self.state.pid

    @property
    def ram_file(self) -> Path:
        """The guest's RAM as a file that can be mapped: the offset is the physical address (RAM below 2 GiB)."""
        for link in Path(f"/proc/{self.state.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "memory-backend-memfd" in str(link.readlink()):
                    return link
        raise LabError(f"QEMU (process {self.state.pid}) has no RAM file: {self._logs()}")

    # Starting and stopping.

    @classmethod
    def up(
        cls,
        run_dir: str | Path | None = None,
        *,
        progress: Progress = lambda text: None,
        owned: bool = True,
        **wanted: Any,
    ) -> Lab:
        """Boot a machine and wait until it is as wished; on failure nothing of it is left but its logs.

        `wanted` are Machine's fields. An owned machine dies with the thread that called this; one that is not is for
        `Lab.attach` and `down`. Raises LabError.
        """
        machine = Machine(**wanted)
        cache = Cache(progress=progress)
        row = _row(QEMUS, machine.qemu, "QEMU")
        cpu = ",".join(filter(None, (cpu_of(row, machine.lapic), "-rdtscp" * machine.pvh, machine.cpu_args)))
        program = Program(images.qemu_words(cache, row), cpu)
        iommu = ("-device", row.iommu) if machine.pvh else ()
        boot = machine.guest or _xen_boot(cache, machine)
        paths, temporary = new_run(run_dir)
        by_firmware = machine.lapic is not None and LAPICS[machine.lapic].firmware
        command = command_line(
            program,
            replace(boot, kernel=paths.kernel) if by_firmware else boot,
            paths,
            cpus=machine.cpus,
            max_cpus=machine.max_cpus,
            memory_mib=machine.memory_mib,
            paused=machine.paused,
            extra=(*iommu, *machine.qemu_args),
        )

        def start_one() -> Lab:
            progress(f"starting {machine.name} on {machine.cpus} CPUs in QEMU {machine.qemu} ({paths.run_dir})")
            with paths.disk.open("wb") as disk:
                disk.truncate((machine.memory_mib + 64) << 20)  # a vmcore is a little larger than the memory it holds
            if by_firmware:
                paths.kernel.write_bytes(with_x2apic_on(boot.kernel.read_bytes()))
            process = start(command, paths, owned)
            state = State(
                pid=process.pid,
                started=start_time(process.pid) or 0,
                symbols=str(boot.symbols),
                memory_mib=machine.memory_mib,
                cpus=machine.cpus,
                guest=machine.name,
                qemu=machine.qemu,
                owned=owned,
            )
            lab = cls(paths, state, temporary, progress)
            lab._process = process
            return lab

        return cls._boot_twice(start_one, lambda lab: lab._wait_until_up(machine), paths, progress)

    @classmethod
    def _boot_twice(
        cls, start_one: Callable[[], Lab], wait_for: Callable[[Lab], None], paths: Paths, progress: Progress
    ) -> Lab:
        """The started machine that was waited for; one whose boot comes to a standstill is started once more."""
        try:
            return cls._boot(start_one, wait_for)
        except _Stalled as stalled:
            for log in (paths.serial_log, paths.line_log, paths.qemu_log):
                log.replace(log.with_suffix(".stalled.log"))
            progress(f"{stalled} (now *.stalled.log); starting it once more")
        return cls._boot(start_one, wait_for)

    @staticmethod
    def _boot(start_one: Callable[[], Lab], wait_for: Callable[[Lab], None]) -> Lab:
        lab = start_one()
        try:
            wait_for(lab)
        except BaseException as error:
            lab.down(keep=_is_failure(error))
            raise
        return lab

    def _wait_until_up(self, machine: Machine) -> None:
        self.paths.state.write_text(json.dumps(asdict(self.state), indent=1))
        self._until("starting QEMU", 30, lambda: all(path.exists() for path in self.paths.sockets) or None)
        if machine.paused or machine.guest or machine.wait == "none":
            return
        begun = time.monotonic()
        self._boots("booting Xen", self.paths.serial_log, _XEN_UP)
        if machine.wait == "dom0":
            self._boots("booting dom0", self.paths.line_log, _DOM0_UP)
            self._progress(f"dom0 is up after {time.monotonic() - begun:.1f} s")
            if machine.crash_kernel and not machine.pvh:
                self.load_crash_kernel()
            if machine.domu_vcpus:
                self.create_domu(machine.domu_vcpus)

    def _boots(self, step: str, log: Path, sign: bytes) -> None:
        size, heard = 0, time.monotonic()

        def ready() -> bool | None:
            nonlocal size, heard
            if re.search(_DIED, _read(self.serial_log)):
                raise LabError(f"{step}: it died: {self._logs()}")
            if re.search(sign, _read(log), re.MULTILINE):
                return True
            if (now := self.serial_size()) != size:
                size, heard = now, time.monotonic()
            elif time.monotonic() - heard > _STALLED:
                raise _Stalled(f"{step}: the console said nothing for {_STALLED:.0f} s: {self._logs()}")
            return None

        self._until(step, BOOT_TIMEOUT, ready)

    @classmethod
    def attach(cls, run_dir: str | Path, progress: Progress = lambda text: None) -> Lab:
        """The machine that an `up` with owned=False left running in `run_dir`."""
        return cls(*known_run(run_dir), progress)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down(keep=error is not None and _is_failure(error))

    def down(self, keep: bool = False) -> None:
        """Stop QEMU and remove what is of no more use; the logs stay if asked for or the folder was given."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()
        end(self.state.pid, self.state.started)
        if self._process is not None:
            self._process.kill()  # no-op once it is gone; makes the wait below end
            self._process.wait()
        for path in (*self.paths.sockets, self.paths.disk, self.paths.kernel, self.paths.state):
            path.unlink(missing_ok=True)
        if self._temporary and not keep:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def alive(self) -> bool:
        return self.state.alive()

    # The serial lines.

    def serial_send(self, data: bytes) -> None:
        """Type on Xen's console."""
        self._line(self.paths.console).send(data)

    def serial_size(self) -> int:
        """How much has been printed: a `since` for `wait_serial`."""
        return _size(self.paths.serial_log)

    def wait_serial(
        self, pattern: str | bytes, timeout: float, since: int = 0, step: str = "waiting for the console"
    ) -> re.Match[bytes]:
        """Wait until what was printed from offset `since` on matches; raises LabError after `timeout` seconds."""
        return self._wait_log(self.paths.serial_log, pattern, timeout, step, since)

    def dom0(self, command: str, timeout: float = 30.0) -> str:
        """What a shell command printed in dom0 (both streams); LabError if its exit status is not 0."""
        status, output = self.dom0_status(command, timeout)
        if status:
            raise LabError(f"in dom0, {command!r} failed with status {status}: {' '.join(output.split())[-200:]}")
        return output

    def dom0_status(self, command: str, timeout: float = 30.0) -> tuple[int, str]:
        """The exit status of a shell command in dom0, and what it printed."""
        since = _size(self.paths.line_log)
        token = self._send_dom0(command)
        answer = rb"(?s)\A(.*?)\r?\n@" + token.encode() + rb" (\d+)\r?\n"
        match = self._wait_log(self.paths.line_log, answer, timeout, f"running {command!r} in dom0", since)
        return int(match[2]), match[1].decode(errors="replace").replace("\r\n", "\n")

    def _send_dom0(self, command: str) -> str:
        if not re.search(_DOM0_UP, _read(self.paths.line_log), re.MULTILINE):
            raise LabError(f"in dom0: no shell answers (yet) to {command!r}: {self._logs()}")
        token = secrets.token_hex(4)
        self._line(self.paths.line).send(f"{token} {base64.b64encode(command.encode()).decode()}\n".encode())
        return token

    def _line(self, path: Path) -> _Line:
        if path not in self._lines:
            self._lines[path] = _Line(path)
        return self._lines[path]

    # What runs on Xen.

    def create_domu(self, vcpus: int) -> int:
        """Create a PVH domU of 4 MiB, and return its domain ID; needs a machine with `domu_vcpus`.

        It spins, its vCPUs in SVM guest mode, each pinned to the CPU of its number.
        """
        domid = int(self.dom0(f"domu create {vcpus}", _BUSY_ANSWERS))
        self._domu[domid] = [0] * vcpus
        self.require_busy()
        self._progress(f"domain {domid} runs")
        return domid

    def load(self, loops: int) -> None:
        """Keep dom0 busy with so many more endless loops."""
        for _ in range(loops):
            self._loops.add(int(self.dom0("while :; do :; done >/dev/null 2>&1 & echo $!", _BUSY_ANSWERS)))

    def require_busy(self) -> None:
        """Raise LabError unless what was to run beside Xen does: each vCPU of a domU has counted since it was last
        looked at, which is waited for, and each loop in dom0 runs by what Linux says of it."""
        if self._loops:
            stats = " ".join(f"/proc/{pid}/stat" for pid in sorted(self._loops))
            said = self.dom0(f"cat {stats} 2>&1; true", _BUSY_ANSWERS)
            running = {int(line.split()[0]) for line in said.splitlines() if re.match(r"\d+ \(.*\) R ", line)}
            if running != self._loops:
                raise LabError(f"in dom0: {len(self._loops)} busy loops were started, and {len(running)} run: {said!r}")
        for domid, before in self._domu.items():

            def counts(domid: int = domid, before: list[int] = before) -> list[int] | None:
                now = list(map(int, self.dom0(f"domu rounds {domid} {len(before)}", _BUSY_ANSWERS).split()))
                return now if all(count > then for count, then in zip(now, before, strict=True)) else None

            self._domu[domid] = self._until(f"running domain {domid}: a vCPU does not go on", _BUSY_ANSWERS, counts)

    def dump_core(self, domid: int, path: str | Path) -> Path:
        """A domain's core, as `xl dump-core` writes it; the domain is paused meanwhile."""
        core = "/tmp/core"
        text = self.dom0(f"domu dump {domid} {core} && gzip <{core} | base64; rm -f {core}", 120)
        target = Path(path)
        target.write_bytes(gzip.decompress(base64.b64decode(text)))
        return target

    # Crashing.

    def load_crash_kernel(self) -> None:
        """Give Xen a crash kernel: without one its crash path returns at once."""
        status, output = self.dom0_status(f"{_KEXEC}; status=$?; echo @crash-kernel-loaded $status; exit $status", 60)
        if status:
            raise LabError(f"loading the crash kernel: kexec failed: {output.strip().splitlines()[0]}: {self._logs()}")
        self._progress("crash kernel loaded")

    def crash(self, how: str = "key", cpu: int | None = None) -> None:
        """Crash Xen, and return at once.

        "key" presses Xen's crash key on its console: the CPU that takes the serial interrupt crashes, not always
        CPU 0. "panic" has dom0's kernel panic; `cpu` chooses the CPU, for which dom0 must have a vCPU for each
        CPU, pinned to it (`dom0_vcpus=cpus`).
        """
        if how not in ("key", "panic") or (how == "key" and cpu is not None):
            raise LabError(f"crashing Xen: there is no way {how!r}" + (" to choose the CPU" if cpu is not None else ""))
        self._require_running()
        if how == "key":
            self._console_to_xen()
            self.serial_send(b"C")
        else:
            panic = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger"
            self._send_dom0(panic if cpu is None else f"taskset -p {1 << cpu:x} $$ >/dev/null && {{ {panic}; }}")

    def _require_running(self) -> None:
        """A gdb that has just let the machine run says so before QEMU has heard of it: that moment is waited for."""
        deadline = time.monotonic() + _RESUMES_IN
        while (status := self.qmp("query-status")["status"]) != "running":
            if time.monotonic() > deadline:
                raise LabError(
                    f"crashing Xen: the machine is stopped ({status}), by a debugger perhaps: let it run first"
                )
            time.sleep(0.02)

    def crash_seen(self, since: int, timeout: float = 10.0) -> None:
        """Wait until the crash shows on the console after offset `since`, or a debugger has stopped the machine."""
        shown = re.compile(rb"triggering crashdump|crashing|kexec image|panic", re.IGNORECASE)

        def seen() -> bool | None:
            stopped = self.qmp("query-status")["status"] != "running"
            return True if stopped or shown.search(_read(self.serial_log, since)) else None

        self._until("crashing Xen", timeout, seen)

    def _console_to_xen(self) -> None:
        for _ in range(2):  # three Ctrl-A switch the input to the next of dom0 and Xen
            since = self.serial_size()
            self.serial_send(b"\x01\x01\x01")
            match = self.wait_serial(rb"\*\*\* Serial input to (\w+)", 20, since, "switching the console to Xen")
            if match[1] == b"Xen":
                return
        raise LabError(f"switching the console to Xen: Ctrl-A three times does not lead there: {self._logs()}")

    def wait_vmcore(self, path: str | Path, timeout: float = 120.0) -> Path:
        """Wait until the crash kernel has copied /proc/vmcore, and write exactly that file to `path`."""
        match = self._wait_log(self.paths.line_log, _COPIED, timeout, "waiting for the vmcore")
        if match["size"] is None:
            reason = match["reason"].decode(errors="replace")
            raise LabError(f"taking the vmcore: the crash kernel could not copy it: {reason}: {self._logs()}")
        size = int(match["size"])
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            copy_sparse(self.paths.disk, partial, size)
            if (described := elf_size(partial)) != size:
                raise LabError(
                    f"taking the vmcore: the copy is broken: its headers describe {described} bytes, "
                    f"/proc/vmcore had {size}: {self._logs()}"
                )
            partial.rename(target)
        except OSError as error:
            raise LabError(f"taking the vmcore: {target}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
        self._progress(f"vmcore: {target} ({size / 1e6:.0f} MB)")
        return target

    def dump_guest_memory(self, path: str | Path, format: str = "elf", paging: bool = False) -> Path:
        """QEMU's own dump of the whole machine; `format` is one of its `dump-guest-memory` formats."""
        target = Path(path).absolute()
        arguments: dict[str, Any] = {} if format == "elf" else {"format": format}
        self.qmp("dump-guest-memory", timeout=300, protocol=f"file:{target}", paging=paging, **arguments)
        return target

    def qmp(self, command: str, /, timeout: float = 10.0, **arguments: Any) -> Any:
        """One QMP command on the lab's own socket."""
        try:
            with Qmp(self.paths.own_qmp) as client:
                return client.execute_for(timeout, command, **arguments)
        except QmpError as error:
            if not self.alive():
                raise LabError(f"QEMU is gone: {self._logs()}") from error
            raise LabError(f"asking QEMU: {error}: {self._logs()}") from error

    def status(self) -> dict[str, Any]:
        """What runs, how far it came, and where everything is."""
        alive = self.alive()
        logs = {"line": _read(self.paths.line_log), "serial": _read(self.paths.serial_log)}
        phase = next((name for name, log, seen in _PHASES if re.search(seen, logs[log], re.MULTILINE)), "started")
        return {
            "run_dir": str(self.run_dir),
            "running": alive,
            "machine": self.qmp("query-status")["status"] if alive else "gone",
            "phase": phase,
            "gdb": str(self.gdb_socket),
            "qmp": str(self.qmp_socket),
            "serial_log": str(self.serial_log),
            "qemu_log": str(self.qemu_log),
            **asdict(self.state),
        }

    # Waiting.

    def _wait_log(self, log: Path, pattern: str | bytes, timeout: float, step: str, since: int = 0) -> re.Match[bytes]:
        wanted = re.compile(pattern.encode() if isinstance(pattern, str) else pattern, re.MULTILINE)
        return self._until(step, timeout, lambda: wanted.search(_read(log, since)))

    def _until(self, step: str, timeout: float, ready: Callable[[], _T | None]) -> _T:
        deadline = time.monotonic() + timeout
        while True:
            alive = self.alive()  # before looking: what a dying QEMU printed last is seen
            if (found := ready()) is not None:
                return found
            if not alive:
                raise LabError(f"{step}: QEMU ended: {self._logs()}")
            if time.monotonic() > deadline:
                raise LabError(f"{step}: nothing after {timeout:.0f} s: {self._logs()}")
            time.sleep(0.05)

    def _logs(self) -> str:
        """Where to look, and the last words of QEMU or of the console."""
        said = _last_line(self.paths.qemu_log, skip=1)
        if said:
            return f"QEMU said {said!r}; see {self.qemu_log} and {self.serial_log}"
        return f"the console's last line is {_last_line(self.serial_log)!r}; see {self.serial_log}"


class _Line:
    """A serial port's socket, kept open and emptied: a full one would stop the guest's output."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise LabError(f"connecting to the serial line {path}: {error.strerror}") from error
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            while self._socket.recv(65536):
                pass

    def send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise LabError(f"typing on a serial line: {error.strerror}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _is_failure(error: BaseException) -> bool:
    """Whether the logs may say why: they do not of an end that was asked for (Ctrl-C, SIGTERM)."""
    return isinstance(error, Exception)


def _row(rows: dict[str, Any], name: str, kind: str) -> Any:
    if name not in rows:
        raise LabError(f"starting the lab: there is no {kind} {name!r}: the rows are {', '.join(rows)}")
    return rows[name]


def _xen_boot(cache: Cache, machine: Machine) -> Boot:
    image_of = images.domu_images if machine.domu_vcpus else images.xen_images
    made = image_of(cache, _row(XENS, machine.xen, "Xen"))
    words = (
        "xen com1=115200,8n1 console=com1 loglvl=all noreboot",
        f"crashkernel={CRASH_KERNEL_MIB}M" * machine.crash_kernel,
        f"dom0_mem={DOM0_MIB}M dom0_max_vcpus={machine.dom0_vcpus}",
        "dom0_vcpus_pin" * (machine.dom0_vcpus == machine.cpus),
        "dom0=pvh" * machine.pvh,
        machine.xen_args,
    )
    kernel = f"{made.kernel} console=hvc0 earlyprintk=xen {machine.dom0_args}".rstrip()
    return Boot(made.xen, made.symbols, " ".join(filter(None, words)), f"{kernel},{made.dom0_initramfs}")


def labs() -> list[Lab]:
    """The machines that run in folders of their own making, and what is left of such that died."""
    found = []
    for folder in sorted(runs_folder().glob("*")):
        with contextlib.suppress(LabError):  # a run that just ended, or never began
            found.append(Lab.attach(folder))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, since: int = 0) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(since)
            return stream.read()
    except FileNotFoundError:
        return b""


def _last_line(path: Path, skip: int = 0) -> str:
    lines = [line.strip() for line in _read(path).decode(errors="replace").splitlines()[skip:]]
    return next((line for line in reversed(lines) if line), "")
