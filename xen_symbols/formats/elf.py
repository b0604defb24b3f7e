"""ELF's layouts (gABI, chapters 4 and 5). Everything here is little-endian, as on x86."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import starmap

from xen_symbols.formats.content import Content, require
from xen_symbols.records import NamedTuple

MAGIC = b"\x7fELF"
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF  # e_phnum: the count is in section header 0, sh_info
SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS = 2, 3, 7, 8
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
SHN_UNDEF, SHN_LORESERVE, SHN_ABS, SHN_COMMON = 0, 0xFF00, 0xFFF1, 0xFFF2
STB_LOCAL, STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE = 0, 1, 2, 10
STT_OBJECT, STT_FUNC, STT_SECTION, STT_FILE, STT_GNU_IFUNC = 1, 2, 3, 4, 10


class Header(NamedTuple):
    """The file header: Elf32_Ehdr or Elf64_Ehdr, the names without `e_`."""

    ident: bytes
    type: int
    machine: int
    version: int
    entry: int
    phoff: int
    shoff: int
    flags: int
    ehsize: int
    phentsize: int
    phnum: int
    shentsize: int
    shnum: int
    shstrndx: int


class Program(NamedTuple):
    """A program header, in the order of Elf64_Phdr: a segment."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Section(NamedTuple):
    """A section header: Elf32_Shdr or Elf64_Shdr."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


class Layout(NamedTuple):
    """Where ELFCLASS32 and ELFCLASS64 differ. `program_order`: the fields of Program as this class has them."""

    ident: bytes
    header: struct.Struct
    program: struct.Struct
    program_order: tuple[int, ...]
    section: struct.Struct
    symbol: struct.Struct  # of 64 bits: st_name, st_info, st_other, st_shndx, st_value, st_size

    def read_header(self, content: Content) -> Header:
        """Raises Undecidable where the file ends before it."""
        return Header(*self.header.unpack(require(content, 0, self.header.size, "ELF header")))

    def programs(self, table: bytes) -> Iterator[Program]:
        """The program headers in the bytes of their table."""
        rows = self.program.iter_unpack(table)
        if self.program_order == _AS_IN_64:
            return starmap(Program, rows)
        places = [self.program_order.index(field) for field in _AS_IN_64]
        return (Program(*(row[place] for place in places)) for row in rows)

    def pack_program(self, program: Program) -> bytes:
        return self.program.pack(*(program[field] for field in self.program_order))

    def sections(self, table: bytes) -> Iterator[Section]:
        """The section headers in the bytes of their table."""
        return starmap(Section, self.section.iter_unpack(table))


_AS_IN_64 = tuple(range(8))
ELF32 = Layout(
    MAGIC + b"\1\1\1",
    struct.Struct("<16sHHIIIIIHHHHHH"),
    struct.Struct("<8I"),
    (0, 2, 3, 4, 5, 6, 1, 7),
    struct.Struct("<10I"),
    struct.Struct("<IIIBBH"),
)
ELF64 = Layout(
    MAGIC + b"\2\1\1",
    struct.Struct("<16sHHIQQQIHHHHHH"),
    struct.Struct("<IIQQQQQQ"),
    _AS_IN_64,
    struct.Struct("<IIQQQQIIQQ"),
    struct.Struct("<IBBHQQ"),
)
_LAYOUTS = {(1, 1): ELF32, (2, 1): ELF64}  # by EI_CLASS and EI_DATA


def layout_of(content: Content) -> Layout | None:
    """By e_ident; None for a file of another byte order or class. Raises Undecidable where the file ends before it."""
    ident = require(content, 0, 16, "ELF header")
    return _LAYOUTS.get((ident[4], ident[5]))
