"""The crash notes that Xen keeps per CPU in its own memory (xen/common/kexec.c), the source of a dump's notes."""

from __future__ import annotations

from xen_symbols.absence import Absent, Kind, Undecidable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, SymbolTable
from xen_symbols.targets.notes import (
    NT_PRSTATUS,
    XEN_CRASH_INFO,
    XEN_CRASH_REGS,
    CrashInfo,
    parse_crash_info,
    parse_crash_regs,
    parse_notes,
    parse_prstatus,
)
from xen_symbols.xen.reads import Asked, Batch, Read

_SIZE = 404  # CORE (20 + 336) and CRASH_REGS (16 + 32); the same from 4.2 to 4.22
_INFO_SIZE = 96  # CRASH_INFO (16 + 80), appended to CPU 0's
_NOT_RESERVED = Absent("no crashkernel memory was reserved: Xen has no crash notes")
_NO_BUFFER = Absent("it has no buffer for crash notes", Kind.NOT_APPLICABLE)
# elf_core_save_regs() stores them among the last (rip, cs, rsp); none of them is ever 0 in Xen.
_NEVER_ZERO = ("rip", "cs", "rsp")


class CpuNotes(NamedTuple):
    """One CPU's buffer. What was never filled in is Absent, not zero. `damaged`: the headers are not Xen's."""

    registers: dict[str, int] | Absent
    control: dict[str, int] | Absent
    info: CrashInfo | Absent
    damaged: bool = False

    @property
    def progress(self) -> str:
        """How far kexec_crash_save_cpu() came, registers before control registers: empty, half written, or saved."""
        if self.damaged:
            return "damaged"
        if isinstance(self.registers, Absent) and isinstance(self.control, Absent):
            return "empty"
        return "half written" if self.missing else "saved"

    @property
    def saved(self) -> dict[str, int]:
        """Every register in it; none where the CPU saved nothing, or the buffer is damaged."""
        parts = (self.registers, self.control)
        return {name: value for part in parts if not isinstance(part, Absent) for name, value in part.items()}

    @property
    def missing(self) -> list[str]:
        """What a saved buffer has, and this one has not."""
        if isinstance(self.registers, Absent):
            missing = ["NT_PRSTATUS"]
        else:
            missing = [name for name in _NEVER_ZERO if not self.registers[name]]
        return missing + ["CRASH_REGS"] * isinstance(self.control, Absent)


def ask_array(batch: Batch, symbols: SymbolTable) -> Asked:
    """Ask where the array is that `crash_notes` points to."""
    pointer = symbols.get("crash_notes", DATA)
    return batch.ask(Absent("the symbols do not name crash_notes", Kind.NO_SYMBOL) if pointer is None else pointer, 8)


def ask_buffers(batch: Batch, array: Asked, count: int) -> Asked:
    """Ask where each CPU's buffer is: an array of {start, size}, a crash_note_range_t each."""
    return batch.follow(array, 0, 16 * count, _NOT_RESERVED)


def ask_notes(batch: Batch, buffers: Asked, cpu: int) -> Asked:
    """Ask for what a CPU's buffer holds."""
    return batch.follow(buffers.part(16 * cpu, 8), 0, _SIZE + (_INFO_SIZE if cpu == 0 else 0), _NO_BUFFER)


def notes_of(buffer: Asked) -> Read:
    """A CPU's notes, CpuNotes."""
    return buffer.read(parse, "crash_notes")


def parse(raw: bytes) -> CpuNotes:
    """A CPU's buffer of notes. Headers that are not Xen's make all of it Absent."""
    try:
        notes = {(note.name, note.type): note.desc for note in parse_notes(raw, "crash_notes")}
        return CpuNotes(
            parse_prstatus(notes["CORE", NT_PRSTATUS]),
            parse_crash_regs(notes["Xen", XEN_CRASH_REGS]),
            parse_crash_info(notes["Xen", XEN_CRASH_INFO])
            if ("Xen", XEN_CRASH_INFO) in notes
            else Absent("only CPU 0's buffer holds it", Kind.NOT_APPLICABLE),
        )
    except (Undecidable, KeyError):
        absent = Absent("the buffer does not have Xen's note headers")
        return CpuNotes(absent, absent, absent, damaged=True)
