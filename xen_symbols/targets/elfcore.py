"""ELF cores of a machine: Linux's /proc/vmcore, makedumpfile -E, QEMU's dump-guest-memory.

What identifies them is read from the fields that matter and nothing else: QEMU 7.2 writes
an e_ehsize of 8, and for memory that it left out a p_offset of -1 with a p_filesz of 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.formats import elf
from xen_symbols.formats.content import FILE_END, Content, as_held, ends_early, require
from xen_symbols.formats.elf import ELF64, PT_LOAD, PT_NOTE, Program
from xen_symbols.formats.elfnotes import Note
from xen_symbols.formats.extents import Extents, Stretch
from xen_symbols.targets import PHYSICAL_END, Opened
from xen_symbols.targets.notes import MAX_NOTES, of_a_machine, parse_notes
from xen_symbols.targets.stretches import StretchMemory, disjoint

_TYPES = {elf.ET_REL: "an object file", elf.ET_EXEC: "an executable", elf.ET_DYN: "an executable"}

# A dump by QEMU with paging has a header per mapping: 66,000 for a Xen with 1 GB.
_MAX_HEADERS = 1 << 18
_UNWRITTEN = Program(*bytes(8))
_MAX_NOTE_BYTES = 16 << 20  # 16383 CPUs with QEMU's notes need 14 MB


def read_dump(content: Content) -> Opened:
    """Memory and notes of an ELF64 core of an x86-64 machine; raises Undecidable for any other ELF file."""
    table = _program_headers(content)
    notes = of_a_machine(_read_notes(content, table))  # a process's has all its memory at physical 0
    held, lost = disjoint(_loads(table), "program headers").split(content.held())
    truncated = _truncated(content, table)
    memory = StretchMemory(content, held, Extents(_left_out(table)), lost, truncated)
    return Opened("ELF core", memory, notes, truncated)


def _program_headers(content: Content) -> bytes:
    """The bytes of their table: there may be very many."""
    if elf.layout_of(content) is not ELF64:
        raise Undecidable("an ELF file that is not 64-bit little-endian; a dump of an x86-64 machine is needed")
    header = ELF64.read_header(content)
    if header.type != elf.ET_CORE:
        what = _TYPES.get(header.type, f"an ELF file of type {header.type}")
        raise Undecidable(f"{what}, not a dump; a file of Xen's symbols goes with --symbols")
    if header.machine == elf.EM_386:  # QEMU's cpu_get_dump_info, of the first CPU alone
        raise Undecidable(
            "an ELF core of an i386 machine: QEMU writes one while the first CPU runs 32-bit code, as that of an HVM "
            "guest: take it again at another moment"
        )
    if header.machine != elf.EM_X86_64:
        raise Undecidable(f"an ELF core of machine type {header.machine}; x86-64 ({elf.EM_X86_64}) is needed")
    count, size = header.phnum, ELF64.program.size
    if not count:
        raise Undecidable(
            "an ELF core without program headers: a core of a Xen domain (xl dump-core) holds no Xen"
            if header.shnum
            else "an ELF core without program headers: it holds no memory"
        )
    if header.phentsize != size:
        raise Undecidable(f"ELF header +0x36: program headers of {header.phentsize} bytes; they have {size}")
    if count == elf.PN_XNUM:
        count = _extended_count(content, header.shoff)
    if count > _MAX_HEADERS:
        raise Undecidable(f"{count} program headers; more than {_MAX_HEADERS} are too many")
    if header.phoff + count * size > content.size:
        return require(content, header.phoff, count * size, f"{count} program headers")
    try:
        return content.read(header.phoff, count * size)
    except Unreadable:
        return b"".join(_program_header(content, header.phoff + at) for at in range(0, count * size, size))


def _program_header(content: Content, at: int) -> bytes:
    """One that its writer did not come to is zeros: makedumpfile writes them last, and a flattened file has a hole."""
    try:
        return content.read(at, ELF64.program.size)
    except Unreadable:
        return bytes(ELF64.program.size)


def _truncated(content: Content, table: bytes) -> str | None:
    """Why not all is there that the headers announce; None if it is."""
    if content.truncated:
        return content.truncated
    segments = list(ELF64.programs(table))
    if unwritten := sum(segment == _UNWRITTEN for segment in segments):
        return f"the file is truncated: {unwritten} of its {len(segments)} program headers were never written"
    end = max((segment.offset + segment.filesz for segment in segments if segment.filesz), default=0)
    return ends_early(content, end, "memory") if end > content.size else None


def _extended_count(content: Content, sections_at: int) -> int:
    """The number of program headers where e_phnum is too small for it."""
    if not sections_at:
        raise Undecidable(
            "ELF header +0x28: section header 0 would count the program headers, and there is none; "
            "the file is damaged"
        )
    what = "section header 0, which counts the program headers"
    (section,) = ELF64.sections(require(content, sections_at, ELF64.section.size, what))
    return section.info


def _read_notes(content: Content, table: bytes) -> list[Note]:
    notes: list[Note] = []
    total = 0
    for number, segment in enumerate(ELF64.programs(table)):
        if segment.type != PT_NOTE:
            continue
        total += segment.filesz
        where = f"program header {number} (notes)"
        if total > _MAX_NOTE_BYTES:
            raise Undecidable(f"{where}: {total} bytes of notes; more than {_MAX_NOTE_BYTES} are too many")
        if segment.offset + segment.filesz > FILE_END:
            raise Undecidable(f"{where}: they end at offset {segment.offset + segment.filesz:#x}; the file is damaged")
        notes += parse_notes(as_held(content, segment.offset, segment.filesz), where, segment.filesz)
        if len(notes) > MAX_NOTES:
            raise Undecidable(f"{where}: more than {MAX_NOTES} notes; the file is damaged")
    return notes


def _loads(table: bytes) -> Iterator[Stretch]:
    for number, (kind, _, offset, _, paddr, filesz, memsz, _) in enumerate(ELF64.programs(table)):
        if kind != PT_LOAD or not filesz:
            continue
        if filesz > memsz or paddr + memsz > PHYSICAL_END:
            raise Undecidable(
                f"program header {number}: {filesz:#x} bytes of file for {memsz:#x} bytes at physical {paddr:#x}; "
                "the file is damaged"
            )
        if offset + filesz > FILE_END:
            raise Undecidable(
                f"program header {number}: its memory ends at offset {offset + filesz:#x}; the file is damaged"
            )
        yield paddr, paddr + filesz, offset


def _left_out(table: bytes) -> Iterator[Stretch]:
    """Memory that has a program header and no bytes: QEMU's of devices, makedumpfile's of excluded pages."""
    for kind, _, _, _, paddr, filesz, memsz, _ in ELF64.programs(table):
        if kind == PT_LOAD and filesz < memsz and paddr + memsz <= PHYSICAL_END:
            yield paddr + filesz, paddr + memsz, paddr + filesz
