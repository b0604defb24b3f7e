"""The crash notes that Xen keeps per CPU in its own memory (xen/common/kexec.c), the source of a dump's notes."""

from __future__ import annotations

from dataclasses import dataclass

from xen_symbols.absence import Absent, Kind, Undecidable
from xen_symbols.target.notes import (
    NT_PRSTATUS,
    XEN_CRASH_INFO,
    XEN_CRASH_REGS,
    CrashInfo,
    parse_crash_info,
    parse_crash_regs,
    parse_notes,
    parse_prstatus,
)

_SIZE = 404  # CORE (20 + 336) and CRASH_REGS (16 + 32); the same from 4.2 to 4.22
_INFO_SIZE = 96  # CRASH_INFO (16 + 80), appended to CPU 0's


@dataclass(frozen=True)
class CpuNotes:
    """One CPU's buffer. What was never filled in is Absent, not zero."""

    registers: dict[str, int] | Absent
    control: dict[str, int] | Absent
    info: CrashInfo | Absent


def size_of(cpu: int) -> int:
    """Bytes of a CPU's buffer."""
    return _SIZE + (_INFO_SIZE if cpu == 0 else 0)


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
        damaged = Absent("the buffer has no note headers of Xen's")
        return CpuNotes(damaged, damaged, damaged)
