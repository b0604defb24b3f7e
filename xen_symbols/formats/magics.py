"""What a file is, by its first bytes: one table, for dumps and for symbols."""

from typing import NamedTuple

from xen_symbols.formats.content import Content, start_of


class Magic(NamedTuple):
    """A kind of file. `reader` is the module of xen_symbols.targets that reads it as a dump; else `advice` says what to
    do with it."""

    magic: bytes
    what: str
    reader: str = ""
    advice: str = ""
    offset: int = 0


MAGICS = (
    Magic(b"\x7fELF", "an ELF file", "elfcore"),
    Magic(b"KDUMP   ", "a kdump", "kdump"),
    Magic(b"makedumpfile\0\0\0\0", "a flattened dump", "flattened"),
    # Files that people hand over and that need one more step, or are something else.
    Magic(b"\x1f\x8b", "compressed by gzip", advice="unpack it first"),
    Magic(b"\xfd7zXZ", "compressed by xz", advice="unpack it first"),
    Magic(b"\x28\xb5\x2f\xfd", "compressed by zstd", advice="unpack it first"),
    Magic(b"BZh", "compressed by bzip2", advice="unpack it first"),
    Magic(b"PAGEDU64", "a Windows crash dump",
          advice="take the dump with another format (dump-guest-memory -z, or none)"),
    Magic(b"QEVM", "a QEMU migration stream", advice="take a dump with dump-guest-memory"),
    Magic(b"LibvirtQ", "a libvirt save file", advice="take a dump with virsh dump --memory-only"),
)  # fmt: skip
_LONGEST = max(row.offset + len(row.magic) for row in MAGICS)


def recognised(content: Content) -> Magic | None:
    """The kind of a file; None for one that is not known."""
    start = start_of(content, _LONGEST)
    return next((row for row in MAGICS if start.startswith(row.magic, row.offset)), None)
