"""A machine whose firmware left the local APICs in x2APIC mode, which SeaBIOS does not do: Xen's image does it first.

Xen's multiboot image gets one more segment, with the new entry point. Its code turns x2APIC on, on the boot CPU, and
jumps to Xen's own entry with the registers that multiboot defines, EAX and EBX, as they were.
"""

from __future__ import annotations

import struct

from xen_symbols.formats.elf import ELF32, PT_LOAD, Header, Program
from xencrash.lab.errors import LabError

_RWX = 7
_PAGE = 0x1000
# SDM vol. 3, 10.12.1: IA32_APIC_BASE (MSR 1b), EN (bit 11) and EXTD (bit 10). No stack is defined: ESI keeps EAX.
_CODE = bytes.fromhex(
    "89c6"  # mov %eax,%esi
    "b91b000000"  # mov $0x1b,%ecx
    "0f32"  # rdmsr
    "0d000c0000"  # or $0xc00,%eax
    "0f30"  # wrmsr
    "89f0"  # mov %esi,%eax
    "e9"  # jmp Xen's entry
)


def with_x2apic_on(image: bytes) -> bytes:
    """The ELF32 multiboot image with the code added. Raises LabError for another file."""
    size = ELF32.header.size
    if image[:6] != ELF32.ident[:6] or len(image) < size:
        raise LabError("preparing Xen: its image is not a 32-bit ELF file, so no code can be added")
    header = Header(*ELF32.header.unpack_from(image))
    table_end = header.phoff + header.phnum * ELF32.program.size
    segments = list(ELF32.programs(image[header.phoff : table_end]))
    end = max(segment.paddr + segment.memsz for segment in segments if segment.type == PT_LOAD)
    start = (end + _PAGE - 1) & -_PAGE
    code = _CODE + struct.pack("<i", header.entry - (start + len(_CODE) + 4))
    code_at = len(image) + -len(image) % _PAGE
    segments.append(Program(PT_LOAD, _RWX, code_at, start, start, len(code), len(code), _PAGE))
    header = header._replace(
        entry=start, phoff=code_at + len(code), phentsize=ELF32.program.size, phnum=len(segments)
    )
    padded = ELF32.header.pack(*header) + image[size:] + bytes(code_at - len(image))
    return padded + code + b"".join(map(ELF32.pack_program, segments))
