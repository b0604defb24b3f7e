"""What a file is, by its content: one table, for dumps and for the files that people give in their place."""

from __future__ import annotations

from xen_symbols.absence import Unreadable
from xen_symbols.formats.content import Content, start_of
from xen_symbols.records import NamedTuple


class Magic(NamedTuple):
    """A kind of file. `dump` is the module of xen_symbols.targets that reads it as a dump; else `advice` says what to
    do with it. `symbols` is the module of xen_symbols.symbols that reads it, `packed` the compression of which
    formats/compression.py undoes a file of symbols. These modules are imported when such a file is met: few are.
    `offset` is that of the magic, from the file's end where negative; `source` names who defines it.

    A `weak` one is so short that a raw image of memory may have it by chance: a base address, which says that the file
    is such an image, overrules it.
    """

    magic: bytes
    what: str
    dump: str = ""
    symbols: str = ""
    packed: str = ""
    advice: str = ""
    offset: int = 0
    source: str = ""
    weak: bool = False

    @property
    def unpacks(self) -> bool:
        """Whether the advice is to unpack it, whatever it is taken for."""
        return self.advice.startswith(_UNPACK)


_UNPACK = "unpack it first"
_DISK = "this is a disk, not memory; take a dump of the machine's memory"
_OTHER_DUMP = "take the dump through kexec (/proc/vmcore, makedumpfile), or with QEMU's dump-guest-memory"
_MIGRATION = "no tool reads memory from it reliably; restore the machine, then take a dump with dump-guest-memory"
_DOMAIN = "it holds a domain, not Xen; take a dump of the host"
_RAW = "convert it to an ELF core or a raw image"
_VMWARE = "convert it with VMware's vmss2core -N6, or give the .vmem file beside it with --base 0"

MAGICS = (
    Magic(b"\x7fELF", "an ELF file", dump="elfcore", symbols="elf", source="gABI, chapter 4"),
    Magic(b"KDUMP   ", "a kdump", dump="kdump", source="makedumpfile diskdump_mod.h"),
    Magic(b"makedumpfile\0\0\0\0", "a flattened dump", dump="flattened", source="makedumpfile makedumpfile.h"),
    # Other dumps and images of memory
    Magic(b"PAGEDU64", "a Windows crash dump", advice=f"the guest wrote it, not Xen; {_OTHER_DUMP}",
          source="QEMU include/qemu/win_dump_defs.h"),
    Magic(b"PAGEDUMP", "a Windows crash dump (32-bit)", advice=f"the guest wrote it, not Xen; {_OTHER_DUMP}",
          source="QEMU include/qemu/win_dump_defs.h"),
    Magic(b"MDMP", "a Windows minidump", advice=f"it holds one process, not Xen; {_OTHER_DUMP}",
          source="Windows SDK minidumpapiset.h"),
    Magic(b"EMiL", "a LiME image", advice=f"a Linux kernel took it, so it lacks Xen unless taken below Xen; {_RAW}",
          source="LiME src/lime.h"),
    Magic(b"AVML", "an AVML image", advice=f"a Linux kernel took it, so it lacks Xen unless taken below Xen; {_RAW} "
          "(avml-convert)", source="AVML src/image.rs"),
    *(Magic(magic, "a VMware suspended state or snapshot (.vmss, .vmsn)", advice=_VMWARE,
            source="volatility3 layers/vmware.py")
      for magic in (b"\xd0\xbe\xd2\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xbe\xd2\xbe", b"\xd3\xbe\xd3\xbe")),
    Magic(b"DISKDUMP", "a dump by diskdump", advice=f"crash(8) reads it; {_OTHER_DUMP}", source="crash diskdump.h"),
    *(Magic(magic, "a dump by LKCD", advice=f"crash(8) reads it; {_OTHER_DUMP}", source="crash lkcd_vmdump_v1.h")
      for magic in (b"\xed\x23\x8f\x61\x73\x01\x19\xa8", b"\xcd\x23\x8f\x61\x73\x01\x19\xa8")),
    Magic(b"sadump\0\0", "a dump by sadump", advice=f"crash(8) reads it; {_OTHER_DUMP}", source="crash sadump.h"),
    Magic(b"\x7fVirtualBox SavedState", "a VirtualBox saved state",
          advice="start the machine from it, and take an ELF core with VBoxManage debugvm dumpvmcore",
          source="VirtualBox SSM.cpp"),
    # Saved machines
    Magic(b"QEVM", "a QEMU migration or savevm stream", advice=_MIGRATION, source="QEMU migration/savevm.c"),
    Magic(b"LibvirtQemud", "a libvirt save file", advice="restore the machine, then virsh dump --memory-only",
          source="libvirt qemu_saveimage.h"),
    Magic(b"Xen saved domain, xl format", "a domain saved by xl", advice=_DOMAIN, source="xen tools/xl/xl.h"),
    Magic(b"\xff\xff\xff\xff\xff\xff\xff\xffXENF", "a saved domain (libxc migration stream)", advice=_DOMAIN,
          source="xen docs/specs/libxc-migration-stream.pandoc"),
    Magic(b"LinuxGuestRecord", "a domain saved by xm", advice=_DOMAIN, source="xen 4.2 XendCheckpoint.py"),
    Magic(b"XenSavedDom", "a domain saved by XAPI", advice=_DOMAIN, source="xenopsd suspend_image.ml"),
    # Disks and file systems; a kernel image begins with a boot sector
    Magic(b"HdrS", "a Linux kernel", advice="it is not a dump; give the vmcore", offset=0x202,
          source="Linux Documentation/arch/x86/boot.rst"),
    Magic(b"QFI\xfb", "a qcow2 disk image", advice=_DISK, source="QEMU docs/interop/qcow2.rst"),
    Magic(b"KDMV", "a VMDK disk image", advice=_DISK, source="QEMU block/vmdk.c"),
    Magic(b"COWD", "a VMDK disk image", advice=_DISK, source="QEMU block/vmdk.c"),
    Magic(b"# Disk DescriptorFile", "a VMDK descriptor", advice=_DISK, source="QEMU block/vmdk.c"),
    Magic(b"vhdxfile", "a VHDX disk image", advice=_DISK, source="QEMU block/vhdx.h"),
    Magic(b"conectix", "a VHD disk image", advice=_DISK, source="QEMU block/vpc.c"),
    Magic(b"conectix", "a VHD disk image", advice=_DISK, offset=-512, source="QEMU block/vpc.c"),
    Magic(b"\x7f\x10\xda\xbe", "a VDI disk image", advice=_DISK, offset=0x40, source="QEMU block/vdi.c"),
    Magic(b"EFI PART", "a disk with a GUID partition table", advice=_DISK, offset=512, source="UEFI 2.10, 5.3.2"),
    Magic(b"LABELONE", "an LVM physical volume", advice=_DISK, offset=512, source="LVM2 lib/label/label.h"),
    Magic(b"SWAPSPACE2", "a swap partition or file", advice=_DISK, offset=4086, source="Linux include/linux/swap.h"),
    Magic(b"LUKS\xba\xbe", "an encrypted disk (LUKS)", advice=_DISK, source="LUKS On-Disk Format"),
    Magic(b"XFSB", "an XFS file system", advice=_DISK, source="Linux fs/xfs/libxfs/xfs_format.h"),
    Magic(b"hsqs", "a squashfs file system", advice=_DISK, source="Linux include/uapi/linux/magic.h"),
    Magic(b"_BHRfS_M", "a btrfs file system", advice=_DISK, offset=0x10040, source="Linux fs/btrfs"),
    Magic(b"CD001", "an ISO 9660 image", advice=_DISK, offset=0x8001, source="ECMA-119, 8.1.2"),
    Magic(b"\x53\xef", "an ext2, ext3 or ext4 file system", advice=_DISK, offset=0x438, weak=True,
          source="Linux fs/ext4/ext4.h"),
    Magic(b"\x55\xaa", "a boot sector or partitioned disk", advice=_DISK, offset=510, weak=True,
          source="UEFI 2.10, 5.2.1"),
    # Compressed files
    Magic(b"\x1f\x8b", "compressed by gzip", packed="gzip", advice=f"{_UNPACK} (gunzip)", weak=True, source="RFC 1952"),
    Magic(b"\xfd7zXZ\0", "compressed by xz", packed="xz", advice=f"{_UNPACK} (unxz)",
          source="the .xz file format, 2.1.1.1"),
    Magic(b"\x28\xb5\x2f\xfd", "compressed by zstd", packed="zstd", advice=f"{_UNPACK} (unzstd)", source="RFC 8878"),
    Magic(b"BZh", "compressed by bzip2", packed="bzip2", advice=f"{_UNPACK} (bunzip2)", weak=True,
          source="bzip2 bzlib_private.h"),
    Magic(b"\x04\x22\x4d\x18", "compressed by LZ4", advice=f"{_UNPACK} (unlz4)", source="LZ4 frame format"),
    Magic(b"\x02\x21\x4c\x18", "compressed by LZ4 (legacy)", advice=f"{_UNPACK} (unlz4)", source="LZ4 frame format"),
    Magic(b"\x89LZO\0\r\n\x1a\n", "compressed by lzop", advice=f"{_UNPACK} (lzop -d)", source="lzop lzop.c"),
    Magic(b"\xff\x06\0\0sNaPpY", "compressed by snappy", advice=f"{_UNPACK} (snzip -d)",
          source="snappy framing_format.txt"),
    Magic(b"LZIP", "compressed by lzip", advice=f"{_UNPACK} (lzip -d)", source="lzip manual, file format"),
    Magic(b"\x1f\x9d", "compressed by compress", advice=f"{_UNPACK} (uncompress)", weak=True, source="ncompress"),
    Magic(b"\x5d\0\0", "compressed by lzma", packed="lzma", advice=f"{_UNPACK} (unlzma)", weak=True,
          source="LZMA SDK lzma.txt"),
    # Archives and others
    Magic(b"PK\3\4", "a zip archive", advice=_UNPACK, source="PKWARE APPNOTE, 4.3.7"),
    Magic(b"ustar", "a tar archive", advice=_UNPACK, offset=257, source="POSIX.1, pax"),
    Magic(b"7z\xbc\xaf\x27\x1c", "a 7z archive", advice=_UNPACK, source="7-Zip 7zFormat.txt"),
    Magic(b"Rar!\x1a\x07", "a rar archive", advice=_UNPACK, source="RAR 5.0 technical note"),
    Magic(b"070701", "a cpio archive", advice=_UNPACK, source="Linux initramfs buffer format"),
    Magic(b"070702", "a cpio archive", advice=_UNPACK, source="Linux initramfs buffer format"),
    Magic(b"070707", "a cpio archive", advice=_UNPACK, source="POSIX.1, pax"),
    Magic(b"!<arch>\n", "an ar archive or Debian package", advice=_UNPACK, source="ar(5)"),
    Magic(b"\xed\xab\xee\xdb", "an RPM package", advice=_UNPACK, source="rpm lib/rpmlead"),
    Magic(b"version https://git-lfs", "a pointer of Git LFS", advice="fetch the file itself (git lfs pull)",
          source="Git LFS specification"),
    Magic(b"/annex/objects/", "a pointer of git-annex", advice="fetch the file itself (git annex get)",
          source="git-annex internals/pointer_file"),
    Magic(b"MZ", "a PE image (xen.efi, perhaps)", symbols="pe", advice="it is not a dump; give the vmcore", weak=True,
          source="PE format, MS-DOS stub"),
)  # fmt: skip
TEXT = Magic(b"", "a text file", advice="a log or a map is not a dump; give the vmcore", weak=True)
_NEAR = 4096  # of two that match, one that is nearer than this is meant
_LONGEST = max(len(row.magic) for row in MAGICS)
_SAMPLE = 512  # of a text
_WHITE = frozenset(b"\t\n\r\f\x1b")


def recognised(content: Content) -> Magic | None:
    """The kind of a file; None for one that is not known, as a raw image of memory is."""
    start = start_of(content, _LONGEST)
    near = (row for row in MAGICS if 0 <= row.offset < _NEAR)
    far = (row for row in MAGICS if not 0 <= row.offset < _NEAR)
    found = next((row for row in (*near, *far) if _has(content, row, start)), None)
    return found or (TEXT if _is_text(_read(content, 0, min(_SAMPLE, content.size))) else None)


def _has(content: Content, row: Magic, start: bytes) -> bool:
    if not row.offset:
        return start.startswith(row.magic)
    offset = row.offset % max(content.size, 1) if row.offset < 0 else row.offset
    return _read(content, offset, len(row.magic)) == row.magic


def _read(content: Content, offset: int, size: int) -> bytes:
    """Nothing where it is not all there: the file is shorter, or a flattened one has a hole."""
    try:
        return content.read(offset, size)
    except Unreadable:
        return b""


def _is_text(sample: bytes) -> bool:
    """Lines of ASCII, or of UTF-8, with nothing that does not print."""
    if b"\n" not in sample:
        return False
    return all(byte in _WHITE or 32 <= byte < 127 or byte >= 128 for byte in sample)
