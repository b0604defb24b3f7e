"""Writes dumps for the tests: what Linux, makedumpfile and QEMU write of a machine with Xen in it.

A machine here is `ranges` ((start, end) of physical memory) and `content` (physical address → bytes;
the rest is zeros and takes no room in a file). Every writer writes to a seekable binary file;
`made` returns the bytes instead.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO

PAGE = 4096
Ranges = Sequence[tuple[int, int]]
Content = Mapping[int, bytes]

PRSTATUS_ORDER = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax "
    "rip cs rflags rsp ss fs_base gs_base ds es fs gs"
)
QEMU_ORDER = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"


def made(write: Callable[..., None], *args: object, **options: object) -> bytes:
    """What a writer writes, as bytes."""
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


# Notes


def note(name: str, kind: int, desc: bytes) -> bytes:
    label = name.encode() + b"\0"
    return struct.pack("<3I", len(label), len(desc), kind) + _padded(label) + _padded(desc)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def prstatus(registers: Mapping[str, int]) -> bytes:
    values = [registers.get(name, 0) for name in PRSTATUS_ORDER.split()]
    return bytes(112) + struct.pack("<27Q", *values) + bytes(8)


def crash_regs(registers: Mapping[str, int]) -> bytes:
    return struct.pack("<4Q", *(registers.get(name, 0) for name in ("cr0", "cr2", "cr3", "cr4")))


def crash_info(version: tuple[int, int] = (4, 17), xen_phys_start: int = 0) -> bytes:
    text = xen_phys_start + (3 << 20)  # somewhere in the image
    return struct.pack("<10Q", *version, *[text] * 5, 0, xen_phys_start, 0)


def xen_notes(
    cpus: Sequence[Mapping[str, int]], info: bytes | None = None, vmcoreinfo: str = "", padding: int = 0
) -> bytes:
    """The notes of a vmcore of Xen: a pair for each CPU in Xen's order, CRASH_INFO after CPU 0's."""
    parts = []
    for number, registers in enumerate(cpus):
        parts += [note("CORE", 1, prstatus(registers)), note("Xen", 0x1000002, crash_regs(registers))]
        if number == 0 and info is not None:
            parts.append(note("Xen", 0x1000001, info))
    if vmcoreinfo:
        parts.append(note("VMCOREINFO_XEN", 0, vmcoreinfo.encode().ljust(4068, b"\0")))
    return b"".join(parts) + bytes(padding)


def qemu_cpu(registers: Mapping[str, int], idtr: tuple[int, int] = (0, 0), tr_base: int = 0) -> bytes:
    """QEMUCPUState, with `idtr` as base and limit."""
    desc = struct.pack("<II", 1, 440) + struct.pack("<18Q", *(registers.get(name, 0) for name in QEMU_ORDER.split()))
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        desc += struct.pack("<IIIIQ", registers.get(name, 0), 0, 0, 0, registers.get(f"{name}_base", 0))
    for base, limit in ((0, 0), (tr_base, 0x67), (0, 0), idtr):
        desc += struct.pack("<IIIIQ", 0, limit, 0, 0, base)
    desc += struct.pack("<5Q", *(registers.get(name, 0) for name in ("cr0", "cr1", "cr2", "cr3", "cr4")))
    return desc + struct.pack("<Q", registers.get("k_gs_base", 0))


def qemu_notes(cpus: Iterable[bytes], registers: Sequence[Mapping[str, int]]) -> bytes:
    """QEMU's notes: all NT_PRSTATUS, then all QEMU notes, by cpu_index."""
    return b"".join(note("CORE", 1, prstatus(each)) for each in registers) + b"".join(
        note("QEMU", 0, cpu) for cpu in cpus
    )


# ELF


def elf_header(
    phnum: int, *, phoff: int = 64, shoff: int = 0, shnum: int = 0, ehsize: int = 64, kind: int = 4
) -> bytes:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", kind, 62, 1, 0, phoff, shoff, 0, ehsize, 56, phnum, 64, shnum, 0)


def program_header(kind: int, offset: int, paddr: int, filesz: int, memsz: int, vaddr: int = 0) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 0, offset, vaddr, paddr, filesz, memsz, 0)


def write_elf(
    file: IO[bytes],
    ranges: Ranges,
    content: Content,
    notes: bytes,
    *,
    ehsize: int = 64,
    left_out: Ranges = (),
    extended_count: bool = False,
) -> None:
    """An ELF core: PT_NOTE, then a PT_LOAD per range. `left_out` is memory without content in the file,
    as QEMU describes it. With `extended_count` the number of headers stands in section header 0.
    """
    count = 1 + len(ranges) + len(left_out)
    table_end = 64 + 56 * count + (64 if extended_count else 0)
    at = table_end + len(notes)
    headers = [program_header(4, table_end, 0, len(notes), len(notes))]
    for start, end in ranges:
        headers.append(program_header(1, at, start, end - start, end - start))
        _write_range(file, at, start, end, content)
        at += end - start
    headers += [program_header(1, (1 << 64) - 1, start, 0, end - start) for start, end in left_out]
    file.seek(0)
    if extended_count:
        file.write(elf_header(0xFFFF, shoff=64 + 56 * count, shnum=1, ehsize=ehsize))
        headers.append(bytes(44) + struct.pack("<I", count) + bytes(16))
    else:
        file.write(elf_header(count, ehsize=ehsize))
    file.write(b"".join(headers) + notes)
    if file.seek(0, io.SEEK_END) < at:
        file.seek(at - 1)
        file.write(b"\0")


def _write_range(file: IO[bytes], at: int, start: int, end: int, content: Content) -> None:
    for address, data in content.items():
        low, high = max(address, start), min(address + len(data), end)
        if low < high:
            file.seek(at + low - start)
            file.write(data[low - address : high - address])


# Kdump


def _nothing(page: bytes) -> bytes:
    return page


COMPRESSORS: dict[int, Callable[[bytes], bytes]] = {0: _nothing, 1: zlib.compress}


def write_kdump(
    file: IO[bytes],
    ranges: Ranges,
    content: Content,
    notes: bytes,
    *,
    compression: int = 1,
    compress: Callable[[bytes], bytes] | None = None,
    excluded: Iterable[int] = (),
    version: int = 6,
    status: int = 0,
    split: bool = False,
) -> None:
    """A kdump: zero pages share one, `excluded` page frames were left out."""
    compress = compress or COMPRESSORS[compression]
    left_out = set(excluded)
    memory = [frame for start, end in ranges for frame in range(start // PAGE, end // PAGE)]
    frames = memory[-1] + 1
    each = -(-frames // (8 * PAGE)) * PAGE
    sub_blocks = 1 + -(-len(notes) // PAGE)
    bitmaps = _bitmap(memory, each) + _bitmap((f for f in memory if f not in left_out), each)
    file.write(_kdump_header(version, status, sub_blocks, len(bitmaps) // PAGE, frames))
    file.seek(PAGE)
    file.write(_kdump_sub_header(split, 2 * PAGE, len(notes), frames))
    file.seek(2 * PAGE)
    file.write(notes)
    file.seek((1 + sub_blocks) * PAGE)
    file.write(bitmaps)
    dumped = [f for f in memory if f not in left_out]
    at = file.tell() + 24 * len(dumped)
    descriptors, pages, zeros = [struct.pack("<QIIQ", at, PAGE, 0, 0)] * len(dumped), [bytes(PAGE)], bytes(PAGE)
    at += PAGE
    for index, frame in enumerate(dumped):
        page = page_of(content, frame)
        if page == zeros:
            continue
        packed, flag = compress(page), compression
        if len(packed) >= PAGE:
            packed, flag = page, 0
        descriptors[index] = struct.pack("<QIIQ", at, len(packed), flag, 0)
        pages.append(packed)
        at += len(packed)
    file.write(b"".join(descriptors) + b"".join(pages))


def page_of(content: Content, frame: int) -> bytes:
    page = bytearray(PAGE)
    for address, data in content.items():
        low, high = max(address, frame * PAGE), min(address + len(data), (frame + 1) * PAGE)
        if low < high:
            page[low - frame * PAGE : high - frame * PAGE] = data[low - address : high - address]
    return bytes(page)


def _bitmap(frames: Iterable[int], size: int) -> bytes:
    bits = bytearray(size)
    for frame in frames:
        bits[frame // 8] |= 1 << frame % 8
    return bytes(bits)


def _kdump_header(version: int, status: int, sub_blocks: int, bitmap_blocks: int, frames: int) -> bytes:
    names = b"".join(name.ljust(65, b"\0") for name in (b"Linux", b"", b"", b"", b"x86_64", b""))
    return b"KDUMP   " + struct.pack(
        "<I390s6x16xIIIIIIIIIi", version, names, status, PAGE, sub_blocks, bitmap_blocks, frames, 0, 0, 0, 0, 1
    )


def _kdump_sub_header(split: bool, notes_at: int, notes_size: int, frames: int) -> bytes:
    return struct.pack("<QIIQQQQQQQQQQQ", 0, 1, split, 0, 0, 0, 0, notes_at, notes_size, 0, 0, 0, 0, frames)


# Flattened


def flattened(data: bytes, piece: int = 16384) -> bytes:
    """`data` as makedumpfile -F sends it through a pipe, in pieces of that size."""
    parts = [b"makedumpfile\0\0\0\0" + struct.pack(">qq", 1, 1) + bytes(4064)]
    for at in range(0, len(data), piece):
        part = data[at : at + piece]
        parts += [struct.pack(">qq", at, len(part)), part]
    return b"".join(parts) + struct.pack(">qq", -1, -1)
