"""QEMU's command line, and one QEMU process that does not outlive its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOCKET_PATH_LIMIT = 107  # sockaddr_un's sun_path holds 108 bytes with the final NUL (unix(7))


@dataclass(frozen=True)
class Efi:
    """A firmware, and the folder that it sees as a disk with one FAT partition."""

    firmware: Path
    esp: Path


@dataclass(frozen=True)
class Boot:
    """What QEMU boots: a multiboot or ELF kernel, its command line, and its modules as `-initrd` takes them; or with
    `efi` the same from its folder.

    `symbols` is the file with the symbols of exactly this kernel.
    """

    kernel: Path
    symbols: Path
    append: str = ""
    initrd: str = ""
    efi: Efi | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """QEMU's options for a kernel that it loads by itself."""
        if self.efi:
            return ()
        return ("-kernel", str(self.kernel), "-append", self.append, *(("-initrd", self.initrd) if self.initrd else ()))

    @property
    def efi_words(self) -> tuple[str, ...]:
        """QEMU's options for the firmware and its disk, which comes after the machine's own."""
        if not self.efi:
            return ()
        drive = f"file=fat:{_escaped(self.efi.esp)},format=raw,if=virtio,readonly=on"
        return ("-bios", str(self.efi.firmware), "-drive", drive)

    @property
    def modules(self) -> tuple[str, ...]:
        """A file each, and its command line."""
        return tuple(filter(None, self.initrd.split(",")))


@dataclass(frozen=True)
class Paths:
    """The files of one run."""

    run_dir: Path

    @property
    def gdb(self) -> Path:
        return self.run_dir / "gdb.sock"

    @property
    def qmp(self) -> Path:
        return self.run_dir / "qmp.sock"

    @property
    def own_qmp(self) -> Path:
        return self.run_dir / "lab.sock"

    @property
    def console(self) -> Path:
        return self.run_dir / "console.sock"

    @property
    def line(self) -> Path:
        return self.run_dir / "line.sock"

    @property
    def sockets(self) -> tuple[Path, ...]:
        return (self.gdb, self.qmp, self.own_qmp, self.console, self.line)

    @property
    def serial_log(self) -> Path:
        return self.run_dir / "serial.log"

    @property
    def line_log(self) -> Path:
        return self.run_dir / "line.log"

    @property
    def qemu_log(self) -> Path:
        return self.run_dir / "qemu.log"

    @property
    def logs(self) -> tuple[Path, ...]:
        return (self.serial_log, self.line_log, self.qemu_log)

    @property
    def disk(self) -> Path:
        return self.run_dir / "disk.raw"

    @property
    def outer(self) -> Path:
        """The folder of the machine in which QEMU runs, if it does (nested.py)."""
        return self.run_dir / "outer"

    @property
    def placed(self) -> Path:
        """Where that has what it boots."""
        return self.outer / "boot"

    @property
    def kernel(self) -> Path:
        """The kernel, if it was made for this run alone."""
        return self.run_dir / "xen-of-this-run"

    @property
    def state(self) -> Path:
        return self.run_dir / "state.json"


@dataclass(frozen=True)
class Program:
    """A QEMU to run: the words before its options, and what `-cpu` is for the wished LAPIC mode."""

    words: tuple[str, ...]
    cpu: str
    accel: str = "tcg"
    irqchip: str | None = None  # under KVM: `kernel_irqchip`

    def files(self) -> Iterator[Path]:
        """All that it consists of."""
        for path in (Path(word) for word in self.words if word.startswith("/")):
            yield from sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else (path,)

    @property
    def machine(self) -> str:
        """Of `-machine`."""
        return "q35,memory-backend=ram" + (f",kernel_irqchip={self.irqchip}" if self.irqchip else "")


class Memory:
    """RAM as a file without a name (memfd_create(2)): others can map it, and it is gone when QEMU is."""

    NAME = "xencrash-ram"

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create(self.NAME)
        os.truncate(self.descriptor, size)

    @property
    def path(self) -> Path:
        """As any process opens it that has inherited the descriptor."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class Ram:
    """The file that RAM is mapped from: shared, so that what the machine writes is in it; or privately, so that it
    stays as it is. Without one it is QEMU's own."""

    path: Path | None
    shared: bool = True

    def backend(self, size_mib: int) -> str:
        """Of `-object`."""
        if not self.path:
            return f"memory-backend-ram,id=ram,size={size_mib}M"
        share = "on" if self.shared else "off"
        return f"memory-backend-file,id=ram,size={size_mib}M,mem-path={_escaped(self.path)},share={share}"


@dataclass(frozen=True)
class Ends:
    """Where the other ends of QEMU's connections are, as its options take them: `-gdb`, `-qmp`, `-chardev` for each
    serial port, and `-drive file=`."""

    gdb: str
    qmp: tuple[str, ...]
    console: str
    line: str
    disk: str


def ends(paths: Paths) -> Ends:
    """The sockets and files of a run. A client may connect to a serial port; its output is always logged."""
    gdb, qmp, own_qmp, console, line = (f"{_escaped(path)},server=on,wait=off" for path in paths.sockets)

    def serial(socket: str, log: Path) -> str:
        return f"socket,path={socket},logfile={_escaped(log)},logappend=on"

    return Ends(
        gdb=f"unix:{gdb}",
        qmp=(f"unix:{qmp}", f"unix:{own_qmp}"),
        console=serial(console, paths.serial_log),
        line=serial(line, paths.line_log),
        # Nothing here must survive the host's own crash, so the host's cache is trusted with every write.
        disk=f"{_escaped(paths.disk)},cache=unsafe",
    )


def command_line(
    program: Program,
    boot: Boot,
    paths: Paths,
    ram: Ram,
    *,
    cpus: int,
    max_cpus: int | None = None,
    memory_mib: int,
    paused: bool = False,
    incoming: bool = False,
    connected: Ends | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The whole command. With `incoming` QEMU waits for a saved machine, and does not start it. `connected` is to
    what; by default the run's sockets and files."""
    there = connected or ends(paths)
    smp = f"{cpus},maxcpus={max_cpus}" if max_cpus else f"{cpus}"
    command = [
        *program.words,
        *("-name", f"xencrash,process=xencrash-{paths.run_dir.name}"[:60]),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-accel", program.accel, "-cpu", program.cpu, "-smp", smp),
        *("-object", ram.backend(memory_mib), "-machine", program.machine),
        *("-m", str(memory_mib), *boot.words),
        *("-gdb", there.gdb),
        *(word for qmp in there.qmp for word in ("-qmp", qmp)),
        *_serial("console", there.console),
        *_serial("line", there.line),
        *("-drive", f"file={there.disk},format=raw,if=virtio,discard=unmap,detect-zeroes=unmap"),
        *boot.efi_words,
        *(("-S",) if paused or incoming else ()),
        *(("-incoming", "defer") if incoming else ()),
        *extra,
    ]
    return command


def _serial(name: str, end: str) -> tuple[str, ...]:
    return ("-chardev", f"{end},id={name}", "-serial", f"chardev:{name}")


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def start(
    command: Sequence[str], paths: Paths, owned: bool, memory: Memory | None = None
) -> subprocess.Popen[bytes]:
    """Start QEMU in its own session (Ctrl-C is ours to handle). It inherits the memory's descriptor.

    An owned QEMU is killed by the kernel when the thread that started it ends, however it ends
    (PR_SET_PDEATHSIG, prctl(2)): the caller's thread must live as long as the machine is wanted.
    """
    words = ["setpriv", "--pdeathsig", "KILL", "--", *command] if owned else list(command)
    with paths.qemu_log.open("ab") as log:
        log.write(" ".join(command).encode() + b"\n")
        log.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=paths.run_dir,
            pass_fds=(memory.descriptor,) if memory else (),
        )
    return process


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks after boot (field 22 of proc(5)'s stat); None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def end(pid: int, started: int | None, grace: float = 3.0) -> None:
    """End the process if it is still the one that started then: by asking, then by force."""
    for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        if started is None or start_time(pid) != started:
            return
        try:
            os.kill(pid, sign)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and start_time(pid) == started:
            time.sleep(0.02)
