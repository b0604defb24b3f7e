"""ELF cores of a machine: Linux's /proc/vmcore, makedumpfile -E, QEMU's dump-guest-memory.

What identifies them is read from the fields that matter and nothing else: QEMU 7.2 writes
an e_ehsize of 8, and for memory that it left out a p_offset of -1 with a p_filesz of 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.targets import PHYSICAL_END, Note, bounded
from xen_symbols.targets.image import Conflict, Extents, Image, Ranges, Stretch, require
from xen_symbols.targets.notes import MAX_NOTES, of_a_machine, parse_notes

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")  # type, flags, offset, vaddr, paddr, filesz, memsz, align
_SECTION_SIZE = 64
_SECTION_INFO = 44  # sh_info in Elf64_Shdr
_PN_XNUM = 0xFFFF  # the count is in section header 0's sh_info (gABI, e_phnum)
_ET_CORE = 4
_EM_386 = 3
_EM_X86_64 = 62
_PT_LOAD, _PT_NOTE = 1, 4
_TYPES = {1: "an object file", 2: "an executable", 3: "an executable"}

# A dump by QEMU with paging has a header per mapping: 66,000 for a Xen with 1 GB.
_MAX_HEADERS = 1 << 18
_MAX_NOTE_BYTES = 16 << 20  # 16383 CPUs with QEMU's notes need 14 MB


class ElfMemory:
    """Physical memory in the PT_LOAD segments of an ELF core."""

    def __init__(self, image: Image, loads: Extents, left_out: Extents) -> None:
        self._image, self._loads, self._left_out = image, loads, left_out

    def read(self, address: int, size: int) -> bytes:
        bounded(address, size)
        whole = self._loads.position(address, size)
        if whole is not None:
            return self._image.read(whole, size)
        parts = []
        for position, length in self._loads.pieces(address, size):
            if position is None:
                known, _ = next(self._left_out.pieces(address, 1))
                why = "is not in the dump" if known is None else "was left out when the dump was written"
                raise Unreadable(f"physical {address:#x} {why}")
            parts.append(self._image.read(position, length))
            address += length
        return b"".join(parts)

    def ranges(self) -> Ranges:
        return self._loads.ranges()


def read_elf(image: Image) -> tuple[ElfMemory, list[Note]]:
    """Memory and notes of an ELF64 core of an x86-64 machine; raises Undecidable for any other ELF file."""
    ident = require(image, 0, 16, "ELF header")
    if ident[4] != 2 or ident[5] != 1:
        raise Undecidable("an ELF file that is not 64-bit little-endian; a dump of an x86-64 machine is needed")
    fields = _HEADER.unpack(require(image, 0, _HEADER.size, "ELF header"))
    _, kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum, _, shnum, _ = fields
    if kind != _ET_CORE:
        what = _TYPES.get(kind, f"an ELF file of type {kind}")
        raise Undecidable(f"{what}, not a dump; a file of Xen's symbols goes with --symbols")
    if machine == _EM_386:  # QEMU's cpu_get_dump_info, of the first CPU alone
        raise Undecidable(
            "an ELF core of an i386 machine: QEMU writes one while the first CPU runs 32-bit code, as that of an HVM "
            "guest: take it again at another moment"
        )
    if machine != _EM_X86_64:
        raise Undecidable(f"an ELF core of machine type {machine}; x86-64 ({_EM_X86_64}) is needed")
    if not phnum:
        raise Undecidable(
            "an ELF core without program headers: a core of a Xen domain (xl dump-core) holds no Xen"
            if shnum
            else "an ELF core without program headers: it holds no memory"
        )
    if phentsize != _PROGRAM_HEADER.size:
        raise Undecidable(f"ELF header +0x36: program headers of {phentsize} bytes; they have {_PROGRAM_HEADER.size}")
    if phnum == _PN_XNUM:
        if not shoff:
            raise Undecidable(
                "ELF header +0x28: section header 0 would count the program headers, and there is none; "
                "the file is damaged"
            )
        section = require(image, shoff, _SECTION_SIZE, "section header 0, which counts the program headers")
        (phnum,) = struct.unpack_from("<I", section, _SECTION_INFO)
    if phnum > _MAX_HEADERS:
        raise Undecidable(f"{phnum} program headers; more than {_MAX_HEADERS} are not believable")
    table = require(image, phoff, phnum * _PROGRAM_HEADER.size, f"{phnum} program headers")
    notes = of_a_machine(_read_notes(image, table))  # a process's has all its memory at physical 0
    try:
        loads, left_out = Extents(_loads(image, table)), Extents(_left_out(table))
    except Conflict as conflict:
        address, one, other = conflict.args
        raise Undecidable(
            f"program headers overlap: physical {address:#x} is at offsets {one:#x} and {other:#x}; the file is damaged"
        ) from None
    if shared := loads.shared():
        offset, one_address, other_address = shared
        raise Undecidable(
            f"program headers overlap: physical {one_address:#x} and {other_address:#x} are both at offset "
            f"{offset:#x}; the file is damaged"
        )
    return ElfMemory(image, loads, left_out), notes


def _read_notes(image: Image, table: bytes) -> list[Note]:
    notes: list[Note] = []
    total = 0
    for number, (kind, _, offset, _, _, filesz, _, _) in enumerate(_PROGRAM_HEADER.iter_unpack(table)):
        if kind != _PT_NOTE:
            continue
        total += filesz
        where = f"program header {number} (notes)"
        if total > _MAX_NOTE_BYTES:
            raise Undecidable(f"{where}: {total} bytes of notes; more than {_MAX_NOTE_BYTES} are not believable")
        notes += parse_notes(require(image, offset, filesz, where), where)
        if len(notes) > MAX_NOTES:
            raise Undecidable(f"{where}: more than {MAX_NOTES} notes; the file is damaged")
    return notes


def _loads(image: Image, table: bytes) -> Iterator[Stretch]:
    for number, (kind, _, offset, _, paddr, filesz, memsz, _) in enumerate(_PROGRAM_HEADER.iter_unpack(table)):
        if kind != _PT_LOAD or not filesz:
            continue
        if filesz > memsz or paddr + memsz > PHYSICAL_END:
            raise Undecidable(
                f"program header {number}: {filesz:#x} bytes of file for {memsz:#x} bytes at physical {paddr:#x}; "
                "the file is damaged"
            )
        if offset + filesz > image.size:
            raise Undecidable(
                f"program header {number}: its memory ends at offset {offset + filesz:#x}, "
                f"the file at {image.size:#x}; the file is truncated or damaged"
            )
        yield paddr, paddr + filesz, offset


def _left_out(table: bytes) -> Iterator[Stretch]:
    """Memory that has a program header and no bytes: QEMU's of devices, makedumpfile's of excluded pages."""
    for kind, _, _, _, paddr, filesz, memsz, _ in _PROGRAM_HEADER.iter_unpack(table):
        if kind == _PT_LOAD and filesz < memsz:
            yield paddr + filesz, paddr + memsz, paddr + filesz
