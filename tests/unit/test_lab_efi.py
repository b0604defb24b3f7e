"""Xen booted by a firmware: its configuration, the disk it is on, and QEMU's command line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from xencrash.lab import boot, efi, images
from xencrash.lab.errors import BadSpecification
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot, Efi, Paths, Program, Ram, command_line
from xencrash.lab.specification import Specification

XEN = Boot(Path("/xen.efi"), Path("/xen.efi"), "xen console=com1 noreboot", "/vmlinux console=hvc0 quiet,/cpio")
CONFIGURATION = """[global]
default=xen

[xen]
options=console=com1 noreboot
kernel=vmlinux console=hvc0 quiet
ramdisk=dom0.gz
"""


def test_xens_configuration_says_what_multiboot_would() -> None:
    assert efi.configuration(XEN) == CONFIGURATION


def test_the_disk_has_xen_where_firmware_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(cache: Cache, kind: str, wanted: Any, build: Any, sources: Any = ()) -> Path:
        folder = tmp_path / kind.partition("-")[0]
        if not wanted:
            folder.mkdir()
            build(folder)
        return folder

    monkeypatch.setattr(efi, "make_once", made)
    for name in ("xen.efi", "vmlinux", "cpio"):
        (tmp_path / name).write_text(name)
    xen = Boot(tmp_path / "xen.efi", tmp_path / "syms", XEN.append, XEN.initrd)
    by_efi = efi.booted(Cache(tmp_path), xen, tmp_path / "vmlinux", tmp_path / "cpio")
    assert by_efi.efi == Efi(tmp_path / "ovmf/OVMF.fd", tmp_path / "esp")
    files = {str(path.relative_to(tmp_path / "esp")): path.read_text() for path in (tmp_path / "esp").glob("*/*/*")}
    assert files == {
        "EFI/BOOT/BOOTX64.EFI": "xen.efi", "EFI/BOOT/BOOTX64.CFG": CONFIGURATION,
        "EFI/BOOT/vmlinux": "vmlinux", "EFI/BOOT/dom0.gz": "cpio",
    }  # fmt: skip


def test_the_machine_boots_from_a_disk_after_its_own(tmp_path: Path) -> None:
    xen = Boot(XEN.kernel, XEN.symbols, XEN.append, XEN.initrd, Efi(Path("/OVMF.fd"), Path("/e,sp")))
    command = command_line(Program(("qemu",), "max"), xen, Paths(tmp_path), Ram(Path("/ram")), cpus=1, memory_mib=64)
    options = [words for words in itertools.pairwise(command) if words[0] in ("-drive", "-bios", "-kernel", "-initrd")]
    assert [name for name, _ in options] == ["-drive", "-bios", "-drive"]
    assert [value for _, value in options][1:] == ["/OVMF.fd", "file=fat:/e,,sp,format=raw,if=virtio,readonly=on"]


def test_what_is_booted_is_part_of_the_snapshots_key(tmp_path: Path) -> None:
    (esp := tmp_path / "esp").mkdir()
    for name in ("OVMF.fd", "xen.efi", "esp/a.cfg"):
        (tmp_path / name).write_text("one")
    xen = Boot(tmp_path / "xen.efi", tmp_path / "xen.efi", efi=Efi(tmp_path / "OVMF.fd", esp))
    keys = []
    for name in ("esp/a.cfg", "OVMF.fd", "xen.efi"):
        keys.append(boot.Recipe(Specification(boot="efi"), Program((), "max"), xen).key())
        (tmp_path / name).write_text("other")
    assert len({*keys, boot.Recipe(Specification(boot="efi"), Program((), "max"), xen).key()}) == 4


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"boot": "bios"}, "--boot is one of multiboot, efi, not 'bios'"),
        ({"boot": "efi", "guest": "rfc-v1"}, "--boot efi is for real Xen: leave it out"),
        ({"boot": "efi", "qemu": "10.0", "lapic": "x2apic-firmware"}, "--lapic x2apic-firmware changes the multi"),
    ],
)
def test_rules(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(BadSpecification) as refused:
        Specification(**fields)
    assert str(refused.value).startswith(why)


def test_a_rows_xen_efi_is_its_own_symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efi, "make_once", lambda cache, kind, *_: tmp_path / kind)
    plain = images.XenImages(Path("/xen"), Path("/syms"), Path("/vmlinux"), Path("/cpio"))
    made = efi.row_images(Cache(tmp_path), Specification(xen="4.20").xen_row, plain)
    image = tmp_path / "efi-4.20/xen.efi"
    assert made == images.XenImages(image, image, Path("/vmlinux"), Path("/cpio"))
