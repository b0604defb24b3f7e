"""KVM without a processor for it: the machine's QEMU runs in an outer machine, Linux with AMD's KVM under TCG.

The outer machine starts from a snapshot, with the inner QEMU's program in its initial RAM file system. Its files are
in a folder of the run's folder. The inner QEMU has

- the run's folder and /dev/shm (where a debugger has it write its device state) by 9p, under the same names;
- the outer machine's disk, which is a file of the run;
- its serial ports through virtio consoles, whose other ends are the sockets and logs of the run;
- its gdbstub and monitors on TCP ports, for they must know where a client's connection begins: the outer QEMU forwards
  ports of 127.0.0.1 to them, and a process (relay.py) the run's sockets to those.

When the inner QEMU ends the outer machine does, and the other way round: the machine is the outer QEMU's process.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xencrash.lab import images, initramfs, relay
from xencrash.lab.errors import LabError
from xencrash.lab.machine import Machine
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot, Ends, Paths, Program
from xencrash.lab.rows import BUSYBOX_PACKAGE, KERNEL_SUITE
from xencrash.lab.specification import Specification

QEMU = "10.0"  # the outer one: under 7.2 hardware breakpoints never fire
_CPUS = 1  # with two, one boot of real Xen in five ends: a triple fault of a CPU in TCG's SVM
_MEMORY_MIB, _BESIDE_MIB = 2048, 1024  # at least; and what it needs beside the inner machine's
_STARTS_IN = 300.0  # seconds, on a busy host
_MODULES = (
    *("irqbypass.ko", "ccp.ko", *initramfs.CRASH_MODULES, "virtio_console.ko"),
    *("failover.ko", "net_failover.ko", "virtio_net.ko"),
    *("netfs.ko", "fscache.ko", "9pnet.ko", "9pnet_virtio.ko", "9p.ko", "kvm.ko", "kvm-amd.ko"),
)
# Without them the outer Linux panics, or the inner QEMU vanishes: what TCG has of SVM is not enough for KVM's defaults.
_PARAMETERS = {"kvm-amd.ko": " vgif=0 vls=0"}
_APPEND = "console=ttyS0 mitigations=off nokaslr tsc=reliable no_timer_check panic=-1 quiet"
_ADDRESS = "10.0.2.15"  # of the user network's only guest (QEMU's net/slirp.c)
_PORTS = {"gdb": 5001, "qmp": 5002, "own_qmp": 5003}  # of the outer machine, by Paths' names
_INIT = (
    initramfs.HEAD.format(loglevel=4)
    + "".join(f"insmod /lib/modules/{name}{_PARAMETERS.get(name, '')}\n" for name in _MODULES)
    + f"ifconfig lo up; ifconfig eth0 {_ADDRESS}\n"
    + initramfs.SHELL
)
# QEMU runs in its run's folder, which is one below the inner machine's.
_DEVICES = (
    *("-fsdev", "local,id=run,path=..,security_model=none", "-device", "virtio-9p-pci,fsdev=run,mount_tag=run"),
    *("-fsdev", "local,id=shm,path=/dev/shm,security_model=none", "-device", "virtio-9p-pci,fsdev=shm,mount_tag=shm"),
    *("-device", "virtio-serial-pci"),
    *("-chardev", "socket,id=hvc0,path=../console.sock,server=on,wait=off,logfile=../serial.log,logappend=on"),
    *("-device", "virtconsole,chardev=hvc0"),
    *("-chardev", "socket,id=hvc1,path=../line.sock,server=on,wait=off,logfile=../line.log,logappend=on"),
    *("-device", "virtconsole,chardev=hvc1"),
    *("-netdev", ",".join(("user,id=net,restrict=on", *(f"hostfwd=tcp:127.0.0.1:0-:{p}" for p in _PORTS.values())))),
    *("-device", "virtio-net-pci,netdev=net,romfile="),
)
ENDS = Ends(
    gdb=f"tcp:0.0.0.0:{_PORTS['gdb']},server=on,wait=off",
    qmp=tuple(f"tcp:0.0.0.0:{_PORTS[name]},server=on,wait=off" for name in ("qmp", "own_qmp")),
    console="serial,path=/dev/hvc0",
    line="serial,path=/dev/hvc1",
    disk="/dev/vda,cache=none",  # so that it is in the file when the crash kernel says so
)


def outer(cache: Cache, program: Program, memory_mib: int) -> Specification:
    """The machine in which a QEMU runs one with that much memory."""

    def build(folder: Path, base: images.Files) -> None:
        kernel = next(path for name, path in base.items() if name != BUSYBOX_PACKAGE)
        found = images.members([kernel], ("boot/vmlinuz-*", *(f"*/{name}" for name in _MODULES)))
        modules = {name: images.only(found, f"*/{name}") for name in _MODULES}
        shell = images.only(images.members([base[BUSYBOX_PACKAGE]], ("*bin/busybox",)), "*bin/busybox")
        files = [
            initramfs.file(str(path).lstrip("/"), path.read_bytes(), path.stat().st_mode & 0o777)
            for path in program.files()
        ]
        (folder / "linux-with-kvm").write_bytes(images.only(found, "boot/vmlinuz-*"))
        (folder / "initramfs.cpio.gz").write_bytes(initramfs.initramfs(_INIT, shell, modules, files))

    with cache.lock():
        sources = [Path(__file__), *program.files()]
        made = images.make_once(cache, "kvm", [images.Wanted(KERNEL_SUITE, images.kernel_packages)], build, sources)
    boot = Boot(made / "linux-with-kvm", made / "linux-with-kvm", _APPEND, str(made / "initramfs.cpio.gz"))
    return Specification(
        kernel=boot, wait="shell", qemu=QEMU, cpus=_CPUS, memory=max(_MEMORY_MIB, memory_mib + _BESIDE_MIB),
        qemu_args=_DEVICES,
    )  # fmt: skip


def moved(boot: Boot, paths: Paths) -> Boot:
    """The same, by the names under which `place` puts its files."""
    modules = [
        " ".join((str(paths.placed / f"module-{number}"), *module.split(" ")[1:]))
        for number, module in enumerate(boot.modules)
    ]
    return replace(boot, kernel=paths.placed / "kernel", initrd=",".join(modules))


def place(boot: Boot, kernel: bytes, paths: Paths) -> None:
    """Put what it boots where the inner QEMU finds it, and make the outer machine's disk its disk."""
    paths.placed.mkdir(exist_ok=True)
    (paths.placed / "kernel").write_bytes(kernel)
    for number, module in enumerate(boot.modules):
        shutil.copyfile(module.split(" ")[0], paths.placed / f"module-{number}")
    paths.disk.unlink(missing_ok=True)
    paths.disk.symlink_to(Paths(paths.outer).disk)


def start(outer: Machine, machine: Machine, command: Sequence[str]) -> None:
    """Start the inner QEMU. Raises LabError, which says why that ended."""
    words = " ".join(shlex.quote(word) for word in command)
    run_dir, log = shlex.quote(str(machine.paths.run_dir)), machine.paths.qemu_log.name
    share = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144"
    machine.paths.qemu_log.write_text(" ".join(command) + "\n")
    listening = " || ".join(f"! grep -q ':{port:04X} .* 0A ' /proc/net/tcp" for port in _PORTS.values())
    script = f"""mkdir -p {run_dir} /dev/shm && {share} run {run_dir} && {share} shm /dev/shm || exit 1
cd {run_dir}
(
{words} >>{log} 2>&1; s=$?
[ $s -le 128 ] || echo killed by signal $((s - 128)) >>{log}
reboot -f
) </dev/null >/dev/null 2>&1 &
while {listening}; do sleep 0.05; done"""
    try:
        outer.dom0.run(script, _STARTS_IN)
    except LabError as error:
        if outer.alive():
            raise
        raise LabError(f"starting QEMU under KVM: {machine.where_to_look()}") from error
    outer.dom0.close()
    forwarded = outer.qmp("human-monitor-command", command_line="info usernet")
    sockets = [f"{getattr(machine.paths, name)}={port}" for name, port in _forwarded(forwarded).items()]
    with machine.paths.qemu_log.open("ab") as log_file:  # no stream of this command's: it outlives it
        subprocess.Popen(
            [sys.executable, "-I", relay.__file__, str(outer.qemu_pid), *sockets],
            stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True,
            cwd=machine.paths.run_dir,
        )  # fmt: skip


def _forwarded(usernet: str) -> dict[str, int]:
    """The ports of this machine, by Paths' names, from `info usernet` (slirp_connection_info in libslirp's misc.c):
    TCP[HOST_FORWARD] FD SOURCE-ADDRESS PORT DESTINATION-ADDRESS PORT …"""
    rows = re.findall(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)", usernet)
    ports = {int(inner): int(port) for port, inner in rows}
    return {name: ports[inner] for name, inner in _PORTS.items()}
