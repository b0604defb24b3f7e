"""Xen booted as xen.efi: the firmware, and the EFI system partition (ESP) with Xen, its configuration and dom0.

OVMF starts what the ESP has as EFI/BOOT/BOOTX64.EFI (UEFI 2.10, 3.5.1.1). Xen reads its configuration from the file
beside it whose name ends in .cfg instead (xen/docs/misc/efi.pandoc).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from xencrash.lab.images import Files, Wanted, XenImages, make_once, members, only
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot, Efi
from xencrash.lab.rows import KERNEL_SUITE, XenRow

_PACKAGE, _FIRMWARE = "ovmf", "usr/share/ovmf/OVMF.fd"
_FOLDER, _NAME = "EFI/BOOT", "BOOTX64"
_KERNEL, _INITRAMFS = "vmlinux", "dom0.gz"


def row_images(cache: Cache, row: XenRow, plain: XenImages) -> XenImages:
    """The images of a row with its xen.efi, which has its own symbols."""
    name = row.image.removesuffix(".gz") + ".efi"

    def build(folder: Path, xen: Files) -> None:
        (folder / "xen.efi").write_bytes(only(members(xen.values(), (name,)), name))

    with cache.lock():
        wanted = Wanted(row.suite, lambda cache: cache.packages(row.suite, row.packages[:1]))
        image = make_once(cache, f"efi-{row.name}", [wanted], build) / "xen.efi"
    return replace(plain, xen=image, symbols=image)


def booted(cache: Cache, boot: Boot, kernel: Path, initramfs: Path) -> Boot:
    """The same boot, by the firmware; `kernel` and `initramfs` are the files of its modules."""

    def build_firmware(folder: Path, packages: Files) -> None:
        (folder / "OVMF.fd").write_bytes(only(members(packages.values(), (_FIRMWARE,)), _FIRMWARE))

    text = configuration(boot)
    files = {f"{_NAME}.EFI": boot.kernel, _KERNEL: kernel, _INITRAMFS: initramfs}
    with cache.lock():
        wanted = Wanted(KERNEL_SUITE, lambda cache: cache.packages(KERNEL_SUITE, [_PACKAGE]))
        firmware = make_once(cache, "ovmf", [wanted], build_firmware) / "OVMF.fd"
        kind = f"esp-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        esp = make_once(cache, kind, [], lambda folder: _write_esp(folder / _FOLDER, text, files), files.values())
    return replace(boot, efi=Efi(firmware, esp))


def configuration(boot: Boot) -> str:
    """Xen's configuration file: what QEMU would give it by multiboot."""
    options = boot.append.removeprefix("xen").strip()
    dom0 = boot.initrd.split(",")[0].partition(" ")[2]
    return (
        f"[global]\ndefault=xen\n\n[xen]\noptions={options}\nkernel={_KERNEL} {dom0}\nramdisk={_INITRAMFS}\n"
    )


def _write_esp(folder: Path, text: str, files: dict[str, Path]) -> None:
    folder.mkdir(parents=True)
    (folder / f"{_NAME}.CFG").write_text(text)
    for name, source in files.items():
        os.link(source, folder / name)
