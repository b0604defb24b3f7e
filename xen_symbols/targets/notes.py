"""ELF notes of a dump, and what they say of each CPU. Pure functions on bytes.

Xen's notes: xen/include/xen/elfcore.h and common/kexec.c (kexec_crash_save_cpu,
kexec_crash_save_info); the same from 4.2 to today. QEMU's note: QEMUCPUState in
QEMU's target/i386/arch_dump.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from xen_symbols.absence import Absent, Undecidable
from xen_symbols.formats.elfnotes import BadNote, Note, pack_size, walk
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PhysicalCpu

NT_PRSTATUS = 1
XEN_CRASH_INFO = 0x1000001
XEN_CRASH_REGS = 0x1000002

_NT_OF_A_PROCESS = {3, 6, 0x46494C45}  # PRPSINFO, AUXV, FILE (Linux, include/uapi/linux/elf.h)
_XEN_DUMPCORE = 2  # types 0x2000000… (Xen, xen/include/public/elfnote.h)
# Two notes for each of the 16383 CPUs that Xen can be built for, and some for the machine.
MAX_NOTES = 40_000

_NOTHING_SAVED = Absent("the note was never filled in: this CPU saved nothing")

_PRSTATUS_SIZE = 336
_PRSTATUS_REGISTERS = struct.Struct("<27Q")  # struct elf_prstatus.pr_reg, user_regs_struct order
_PRSTATUS_OFFSET = 112
_PRSTATUS_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)

_QEMU_GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
_QEMU_HEAD = struct.Struct("<II18Q")
_QEMU_SEGMENT = struct.Struct("<IIIIQ")  # selector, limit, flags, padding, base
_QEMU_TAIL = struct.Struct("<5Q")  # cr0 to cr4
_QEMU_SIZE = _QEMU_HEAD.size + len(_QEMU_SEGMENTS) * _QEMU_SEGMENT.size + _QEMU_TAIL.size


class CrashInfo(NamedTuple):
    """Xen's CRASH_INFO note (struct crash_xen_info). Addresses are physical."""

    xen_major: int
    xen_minor: int
    extra_version: int  # address of a string, as the next four
    changeset: int
    compiler: int
    compile_date: int
    compile_time: int
    tainted: int
    xen_phys_start: int
    dom0_pfn_to_mfn_frame_list_list: int

    @property
    def strings(self) -> dict[str, int]:
        """The addresses of its strings, which are in Xen's image."""
        names = ("extra_version", "changeset", "compiler", "compile_date", "compile_time")
        return {name: getattr(self, name) for name in names}


def parse_notes(data: bytes, where: str = "notes", size: int | None = None) -> list[Note]:
    """All notes of one segment, in order. Zeros after the last (Linux pads to a page) end it.

    `where` names the segment in the error: Undecidable for a size that points outside. `size` is the segment's, of
    which the file may have lost some: those that it holds whole are given.
    """
    size = len(data) if size is None else size
    notes: list[Note] = []
    try:
        for _, note in walk(data):
            if len(notes) == MAX_NOTES:
                raise Undecidable(f"{where}: more than {MAX_NOTES} notes; the file is damaged")
            notes.append(note)
    except BadNote as bad:
        position, name_size, desc_size = bad.args
        if len(data) < position + pack_size(name_size, desc_size) <= size:
            return notes
        raise Undecidable(
            f"{where}: the note at +{position:#x} claims {name_size} bytes of name and {desc_size} of content, "
            f"the segment has {size}; the file is truncated or damaged"
        ) from None
    return notes


def of_a_machine(notes: list[Note]) -> list[Note]:
    """The notes. Raises Undecidable if they say that there cannot be a Xen in the dump."""
    names = {note.name for note in notes}
    if any(note.name == "CORE" and note.type in _NT_OF_A_PROCESS for note in notes):
        raise Undecidable("a core of a process, not of a machine")
    if any(note.name == "Xen" and note.type >> 24 == _XEN_DUMPCORE for note in notes):
        raise Undecidable("a core of a Xen domain (xl dump-core): it holds no Xen")
    if "VMCOREINFO" in names and not names & {"Xen", "VMCOREINFO_XEN", "QEMU"}:
        raise Undecidable("a dump of Linux without Xen: it has VMCOREINFO and no note of Xen's")
    return notes


def parse_prstatus(desc: bytes) -> dict[str, int] | Absent:
    """NT_PRSTATUS of x86-64: registers by name; Absent when all of it is zero.

    orig_rax is never written by Xen. The FS and GS bases are written since 4.15 (1e15dcfbae)
    only, so a zero there is not a value and is left out.
    """
    _require_size("CORE/NT_PRSTATUS", desc, _PRSTATUS_SIZE, exact=True)
    values = _PRSTATUS_REGISTERS.unpack_from(desc, _PRSTATUS_OFFSET)
    if not any(values):
        return _NOTHING_SAVED
    registers = dict(zip(_PRSTATUS_NAMES, values, strict=True))
    del registers["orig_rax"]
    for base in ("fs_base", "gs_base"):
        if not registers[base]:
            del registers[base]
    return registers


def parse_crash_regs(desc: bytes) -> dict[str, int] | Absent:
    """Xen's CRASH_REGS (struct crash_xen_core): cr0, cr2, cr3, cr4; Absent when all zero."""
    _require_size("Xen/CRASH_REGS", desc, 32, exact=True)
    values = struct.unpack("<4Q", desc)
    return dict(zip(("cr0", "cr2", "cr3", "cr4"), values, strict=True)) if any(values) else _NOTHING_SAVED


def parse_crash_info(desc: bytes) -> CrashInfo | Absent:
    """Xen's CRASH_INFO; Absent when all zero (the crash path did not come as far)."""
    _require_size("Xen/CRASH_INFO", desc, 80, exact=True)
    values = struct.unpack("<10Q", desc)
    return CrashInfo(*values) if any(values) else Absent("the note was never filled in")


def parse_vmcoreinfo(desc: bytes) -> dict[str, str]:
    """The KEY=VALUE lines of a VMCOREINFO note, up to its first NUL."""
    text = desc.split(b"\0", 1)[0].decode("ascii", "backslashreplace")
    return dict(line.split("=", 1) for line in text.split("\n") if "=" in line)


def parse_address(text: str) -> int | None:
    """An address as VMCOREINFO has it, in hex; None for anything else."""
    try:
        value = int(text, 16)
    except ValueError:
        return None
    return value if 0 <= value < 1 << 64 else None


def parse_qemu_cpu(desc: bytes, index: int) -> PhysicalCpu:
    """QEMU's note of one CPU, `index` its cpu_index."""
    _require_size("QEMU", desc, _QEMU_SIZE, exact=False)
    version, size, *general = _QEMU_HEAD.unpack_from(desc)
    if version != 1 or not _QEMU_SIZE <= size <= len(desc):
        raise Undecidable(f"the QEMU note of CPU {index} has version {version} and size {size}; version 1 is known")
    registers = dict(zip(_QEMU_GENERAL, general, strict=True))
    segments = dict(zip(_QEMU_SEGMENTS, _qemu_segments(desc), strict=True))
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        registers[name] = segments[name][0]
    registers["fs_base"], registers["gs_base"] = segments["fs"][2], segments["gs"][2]
    cr0, _, cr2, cr3, cr4 = _QEMU_TAIL.unpack_from(desc, _QEMU_SIZE - _QEMU_TAIL.size)
    registers.update(cr0=cr0, cr2=cr2, cr3=cr3, cr4=cr4)
    if size >= _QEMU_SIZE + 8:  # since QEMU 5.0
        (registers["k_gs_base"],) = struct.unpack_from("<Q", desc, _QEMU_SIZE)
    _, idt_limit, idt_base = segments["idt"]
    return PhysicalCpu(
        index=index, registers=registers, idtr=(idt_base, idt_limit), tr_base=segments["tr"][2], source="QEMU's note"
    )


def _qemu_segments(desc: bytes) -> Iterator[tuple[int, int, int]]:
    end = _QEMU_SIZE - _QEMU_TAIL.size
    for selector, limit, _, _, base in _QEMU_SEGMENT.iter_unpack(desc[_QEMU_HEAD.size : end]):
        yield selector, limit, base


def pair_numbers(notes: Sequence[Note]) -> list[int | None]:
    """For each note the number of the pair that it belongs to, an NT_PRSTATUS and Xen's CRASH_REGS after it; None for
    another. One whose other half is missing is a pair by itself."""
    numbers: list[int | None] = []
    count, is_open = 0, False
    for note in notes:
        if (note.name, note.type) == ("CORE", NT_PRSTATUS):
            count, is_open = count + 1, True
        elif (note.name, note.type) == ("Xen", XEN_CRASH_REGS):
            count, is_open = count + (not is_open), False
        else:
            numbers.append(None)
            continue
        numbers.append(count - 1)
    return numbers


def cpus_of(notes: Sequence[Note]) -> list[PhysicalCpu]:
    """One PhysicalCpu per CPU that the notes name.

    Xen's notes: a pair of NT_PRSTATUS and CRASH_REGS for each CPU in the order of Xen's numbers (the crash tools ask
    Xen for CPU 0, 1, … and get headers for every possible CPU). A CPU that saved nothing is there with no registers.
    QEMU's: one per cpu_index. Which of Xen's CPUs each is follows from memory.
    """
    if any(note.name == "QEMU" for note in notes):
        return [parse_qemu_cpu(note.desc, index) for index, note in enumerate(n for n in notes if n.name == "QEMU")]
    if not any(note.name == "Xen" for note in notes):
        return []
    pairs: dict[int, dict[str, int]] = {}
    for note, number in zip(notes, pair_numbers(notes), strict=True):
        if number is not None:
            part = parse_prstatus(note.desc) if note.name == "CORE" else parse_crash_regs(note.desc)
            pairs.setdefault(number, {}).update({} if isinstance(part, Absent) else part)
    return [_xen_cpu(number, registers) for number, registers in pairs.items()]


def _xen_cpu(number: int, registers: dict[str, int]) -> PhysicalCpu:
    source = "Xen's crash notes" if registers else f"Xen's crash notes: {_NOTHING_SAVED}"
    return PhysicalCpu(index=number, xen_cpu=number, registers=registers, current=False, source=source)


def _require_size(what: str, desc: bytes, size: int, *, exact: bool) -> None:
    if len(desc) < size or (exact and len(desc) != size):
        raise Undecidable(f"a {what} note of {len(desc)} bytes, {size} are expected; the dump is damaged, or not Xen's")
