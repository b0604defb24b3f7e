"""The kernel inside the Linux image of a distribution, unpacked once instead of at each boot.

Under TCG Linux takes several seconds to unpack itself: a crash, from its key to the vmcore, takes half as long without.
"""

from __future__ import annotations

import lzma
import struct

from xencrash.lab.errors import LabError

# The kernel's Documentation/arch/x86/boot.rst: offsets in the setup header of a bzImage.
_SETUP_SECTS, _MAGIC, _PAYLOAD = 0x1F1, 0x202, 0x248
_SECTOR = 512
_XZ = b"\xfd7zXZ\0"
# ELF-64 (System V gABI, chapter 4 and 5).
_TYPE, _PHOFF, _SHOFF, _PHENTSIZE, _SHNUM = 16, 32, 40, 54, 60
_HEADER = struct.Struct("<IIQQQQQQ")  # of a segment: type, flags, offset, vaddr, paddr, filesz, memsz, align
_PT_LOAD, _ET_DYN = 1, 3
_BAD = "making the images: the Linux in the package"


def unpacked(image: bytes) -> bytes:
    """The ELF file that a bzImage, compressed by xz as Debian's are, has inside. Raises LabError for another file."""
    if image[_MAGIC : _MAGIC + 4] != b"HdrS" or len(image) < _PAYLOAD + 8:
        raise LabError(f"{_BAD} is no bzImage")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    payload = image[(image[_SETUP_SECTS] + 1) * _SECTOR + offset :][:length]
    if payload[: len(_XZ)] != _XZ:
        raise LabError(f"{_BAD} is not compressed by xz")
    unpacker = lzma.LZMADecompressor()
    try:
        elf = unpacker.decompress(payload)  # its size follows, which is no part of the stream
    except lzma.LZMAError as error:
        raise LabError(f"{_BAD} is broken: {error}") from None
    if not unpacker.eof:
        raise LabError(f"{_BAD} is broken: its xz data end early")
    try:
        return _compact(elf)
    except struct.error:
        raise LabError(f"{_BAD} is broken: not a whole ELF file inside") from None


def _compact(elf: bytes) -> bytes:
    """Only the segments, without the zeros that whoever loads it writes: an eighth to a half of the file."""
    (first,) = struct.unpack_from("<Q", elf, _PHOFF)
    size, count = struct.unpack_from("<HH", elf, _PHENTSIZE)
    head = bytearray(elf[: first + size * count])
    struct.pack_into("<Q", head, _SHOFF, 0)
    struct.pack_into("<HH", head, _SHNUM, 0, 0)
    body = bytearray()
    for at in range(first, first + size * count, size):
        kind, flags, offset, *addresses, filesz, memsz, align = _HEADER.unpack_from(head, at)
        data = elf[offset : offset + filesz]
        if kind == _PT_LOAD:
            data = data.rstrip(b"\0")
        body += bytes(-(len(head) + len(body) - offset) % (align or 1))
        _HEADER.pack_into(head, at, kind, flags, len(head) + len(body), *addresses, len(data), memsz, align)
        body += data
    return bytes(head + body)


def movable(elf: bytes) -> bytes:
    """The same as a file of a type that kexec loads where there is room: x86-64's Linux runs wherever it is."""
    return elf[:_TYPE] + struct.pack("<H", _ET_DYN) + elf[_TYPE + 2 :]
