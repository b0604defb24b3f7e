"""A machine whose firmware left the local APICs in x2APIC mode, which SeaBIOS does not do: Xen's image does it first.

Xen's multiboot image gets one more segment, with the new entry point. Its code turns x2APIC on, on the boot CPU, and
goes on to Xen's own entry with the registers that multiboot defines, EAX and EBX, as they were.
"""

from __future__ import annotations

import struct

from xencrash.lab.errors import LabError

_EHDR = struct.Struct("<16sHHIIIIIHHHHHH")  # gABI, Elf32_Ehdr
_PHDR = struct.Struct("<8I")  # Elf32_Phdr: type, offset, vaddr, paddr, filesz, memsz, flags, align
_PT_LOAD, _RWX = 1, 7
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
    """The ELF32 multiboot image with the code in front. Raises LabError for another file."""
    if image[:6] != b"\x7fELF\x01\x01" or len(image) < _EHDR.size:
        raise LabError("preparing Xen: its image is no 32-bit ELF file, to which code could be added")
    header = list(_EHDR.unpack_from(image))
    entry, at, size, count = header[4], header[5], header[9], header[10]
    segments = [_PHDR.unpack_from(image, at + size * number) for number in range(count)]
    end = max(paddr + memory for kind, _, _, paddr, _, memory, _, _ in segments if kind == _PT_LOAD)
    start = (end + _PAGE - 1) & -_PAGE
    code = _CODE + struct.pack("<i", entry - (start + len(_CODE) + 4))
    code_at = len(image) + -len(image) % _PAGE
    segments.append((_PT_LOAD, code_at, start, start, len(code), len(code), _RWX, _PAGE))
    header[4], header[5], header[9], header[10] = start, code_at + len(code), _PHDR.size, len(segments)
    padded = _EHDR.pack(*header) + image[_EHDR.size :] + bytes(code_at - len(image))
    return padded + code + b"".join(_PHDR.pack(*segment) for segment in segments)
