"""The kernel inside the Linux image of a distribution, unpacked once instead of at each boot.

Under TCG Linux takes several seconds to unpack itself.
"""

from __future__ import annotations

import struct

from xen_symbols.absence import Undecidable
from xen_symbols.formats.content import Content, Held, require
from xen_symbols.formats.elf import ELF64, ET_DYN, PT_LOAD, layout_of
from xen_symbols.symbols.load import unpacked as without_compression
from xencrash.lab.errors import LabError

# The kernel's Documentation/arch/x86/boot.rst: offsets in the setup header of a bzImage.
_SETUP_SECTS, _MAGIC, _PAYLOAD = 0x1F1, 0x202, 0x248
_SECTOR = 512


def unpacked(image: bytes) -> bytes:
    """The ELF file that a bzImage has inside. Raises LabError for a file that is none."""
    try:
        return _compact(without_compression(Held(_payload(Held(image)))))
    except Undecidable as error:
        raise LabError(f"making the images: the Linux in the package: {error}") from None


def _payload(image: Content) -> bytes:
    header = require(image, 0, _PAYLOAD + 8, "the setup header of a bzImage")
    if header[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise Undecidable("not a bzImage")
    offset, size = struct.unpack_from("<II", header, _PAYLOAD)
    return require(image, (header[_SETUP_SECTS] + 1) * _SECTOR + offset, size, "the payload of a bzImage")


def _compact(elf: Content) -> bytes:
    """Only the segments, without the zeros that whoever loads it writes: two thirds of the file."""
    if layout_of(elf) is not ELF64:
        raise Undecidable("no 64-bit ELF file inside")
    header = ELF64.read_header(elf)
    table = require(elf, header.phoff, header.phnum * ELF64.program.size, "program headers")
    first = ELF64.header.size
    rows, body = b"", bytearray()
    for row in ELF64.programs(table):
        data = require(elf, row.offset, row.filesz, "a segment")
        if row.type == PT_LOAD:
            data = data.rstrip(b"\0")
        body += bytes(-(first + len(table) + len(body) - row.offset) % (row.align or 1))
        rows += ELF64.pack_program(row._replace(offset=first + len(table) + len(body), filesz=len(data)))
        body += data
    return ELF64.header.pack(*header._replace(phoff=first, shoff=0, shnum=0, shstrndx=0)) + rows + bytes(body)


def movable(elf: bytes) -> bytes:
    """The same as a file of a type that kexec loads where there is room: x86-64's Linux runs wherever it is."""
    return ELF64.header.pack(*ELF64.read_header(Held(elf))._replace(type=ET_DYN)) + elf[ELF64.header.size :]
