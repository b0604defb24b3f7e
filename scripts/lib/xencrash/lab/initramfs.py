"""Initial RAM file systems for dom0 and for the crash kernel: their content, and the cpio archive itself.

Archive format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterable
from dataclasses import dataclass

# Modules by file name, in the order in which they must be inserted.
DOM0_MODULES = ("xen-privcmd.ko", "xen-evtchn.ko", "xenfs.ko")
CRASH_MODULES = (
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
)

# The second serial port is the lab's own line into the machine: nothing else is ever printed on it,
# so what a command prints arrives as it is. The first is Xen's console.
LINE = "/dev/ttyS1"

HEAD = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc none /proc
mount -t sysfs none /sys
[ -c /dev/null ] || mount -t devtmpfs none /dev
dmesg -n {loglevel}
"""

# The lab's line to a shell. A request is one line: a token and a command in base64. The answer is what the command
# printed, then a line with the token and the exit status.
SHELL = f"""exec <{LINE} >{LINE} 2>&1
stty raw -echo
echo "@shell ready"
while read -r token command; do
    echo "$command" | base64 -d >/run.sh
    sh /run.sh </dev/null
    printf '\\n@%s %d\\n' "$token" $?
done
echo "@shell lost its line"
sleep 100000
"""
DOM0_INIT = (
    HEAD.format(loglevel=4)
    + "".join(f"insmod /lib/modules/{name}\n" for name in DOM0_MODULES)
    + """mount -t xenfs none /proc/xen
(while :; do sh </dev/hvc0 >/dev/hvc0 2>&1; done) &
"""
    + SHELL
)

# With the size, so that the reader knows when the vmcore is complete.
CRASH_INIT = (
    HEAD.format(loglevel=4)
    + f"""exec >{LINE} 2>&1
stty raw
echo "@crash kernel"
"""
    + "".join(f"insmod /lib/modules/{name}\n" for name in CRASH_MODULES)
    + """size=$(stat -c %s /proc/vmcore)
if [ -b /dev/vda ] && dd if=/proc/vmcore of=/dev/vda bs=1M iflag=fullblock oflag=direct conv=sync,fsync 2>/tmp.log; then
    echo "@vmcore copied $size"
else
    echo "@vmcore failed: $(tail -n 1 /tmp.log)"
fi
while :; do sleep 1000; done
"""
)


@dataclass(frozen=True)
class Entry:
    """One file, folder or symbolic link (whose data is its target); the path has no leading slash."""

    path: str
    mode: int
    data: bytes = b""


def file(path: str, data: bytes | str, permissions: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFREG | permissions, data.encode() if isinstance(data, str) else data)


def folder(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The archive, with the parent folders that the entries imply."""
    entries = list(entries)
    given = {entry.path for entry in entries}
    parents = {
        "/".join(parts[:depth])
        for parts in (entry.path.split("/") for entry in entries)
        for depth in range(1, len(parts))
    }
    folders = [*(folder(path) for path in parents - given), *(entry for entry in entries if stat.S_ISDIR(entry.mode))]
    others = (entry for entry in entries if not stat.S_ISDIR(entry.mode))
    # A folder whose parent comes later is not unpacked.
    everything = [*sorted(folders, key=lambda entry: entry.path), *others, Entry("TRAILER!!!", 0)]
    return b"".join(_member(number, entry) for number, entry in enumerate(everything, 1))


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _pad(header + name) + _pad(entry.data)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def compressed(archive: bytes) -> bytes:
    return gzip.compress(archive, compresslevel=3, mtime=0)


def initramfs(init: str, busybox: bytes, modules: dict[str, bytes], extra: Iterable[Entry] = ()) -> bytes:
    """A compressed archive that starts `init` with busybox and the modules (by file name) at hand."""
    return compressed(
        cpio(
            [
                *(folder(name) for name in ("dev", "proc", "sys", "tmp")),
                file("bin/busybox", busybox),
                file("init", init),
                *(file(f"lib/modules/{name}", data, 0o644) for name, data in modules.items()),
                *extra,
            ]
        )
    )
