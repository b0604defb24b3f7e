"""Crash notes as the JSON contract gives them: those in Xen's memory, and those of a dump's file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.targets import Target
from xen_symbols.targets.notes import (
    NT_PRSTATUS,
    XEN_CRASH_INFO,
    XEN_CRASH_REGS,
    CrashInfo,
    pair_numbers,
    parse_notes,
)
from xen_symbols.text import escaped
from xen_symbols.xen.crashnotes import CpuNotes
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import CpuState, State

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json

_STRING_MAX = 256
# What a note is, by name and type: xen/include/public/elfnote.h, Linux kernel/crash_core.c, QEMU arch_dump.c.
_KNOWN = {
    ("CORE", NT_PRSTATUS): "NT_PRSTATUS: a CPU's registers",
    ("Xen", XEN_CRASH_REGS): "CRASH_REGS: a CPU's control registers, by Xen",
    ("Xen", XEN_CRASH_INFO): "CRASH_INFO: which Xen, and where it is",
    ("VMCOREINFO_XEN", 0): "Xen's VMCOREINFO: symbols and structures for dump tools",
    ("VMCOREINFO", 0): "Linux's VMCOREINFO",
    ("QEMU", 0): "QEMUCPUState: a CPU's registers, by QEMU",
}


def describe_notes(notes: Sequence[Note]) -> list[Json]:
    """Each note of a file as JSON: name, type, bytes, what it is, and which of those of its kind: Xen's by the number
    of their `pair`, QEMU's by its own of the CPU (`index`)."""
    described = []
    of_qemu = any(note.name == "QEMU" for note in notes)
    seen: Counter[tuple[str, int]] = Counter()
    for note, pair in zip(notes, pair_numbers(notes), strict=True):
        key = (note.name, note.type)
        out: Json = {"name": note.name, "type": hex(note.type), "bytes": len(note.desc),
                               "what": _KNOWN.get(key, "not known here")}  # fmt: skip
        if of_qemu and key in (("CORE", NT_PRSTATUS), ("QEMU", 0)):
            out["index"] = seen[key]
            seen[key] += 1
        elif pair is not None:
            out["pair"] = pair
        described.append(out)
    return described


def describe_crash_notes(memory: XenMemory, state: State) -> Json:
    """The notes in Xen's memory, and on a dump those of the file: {"buffers", "info", "file"}.

    Each note of Xen's in the file says which CPU's it is (`cpu`), and whether it is what memory holds (`in_memory`);
    null where that is not known.
    """
    buffers = [_describe_buffer(state, cpu) for cpu in state.cpus.values()]
    held = {
        (note.name, note.type, cpu.cpu): note.desc
        for cpu in state.cpus.values()
        if cpu.notes.present and not cpu.notes.value.damaged and cpu.notes.raw is not None
        for note in parse_notes(cpu.notes.raw, "crash_notes")
    }
    notes = memory.target.notes()
    whose = {cpu.pair.index: cpu.cpu for cpu in state.cpus.values() if not isinstance(cpu.pair, Absent)}
    return {
        "buffers": buffers,
        "info": _describe_info(memory, state.of(0)),
        "file": [_compared(*pair, held, whose) for pair in zip(describe_notes(notes), notes, strict=True)],
    }


def _compared(out: Json, note: Note, held: dict[tuple[str, int, int], bytes], whose: dict[int, int]) -> Json:
    if "index" in out or (note.name, note.type) not in (
        ("CORE", NT_PRSTATUS),
        ("Xen", XEN_CRASH_REGS),
        ("Xen", XEN_CRASH_INFO),
    ):
        return out
    cpu = whose.get(out["pair"]) if "pair" in out else 0
    theirs = None if cpu is None else held.get((note.name, note.type, cpu))
    if "pair" in out:
        out["cpu"] = cpu
    return out | {"in_memory": None if theirs is None else theirs == note.desc}


def _describe_buffer(state: State, cpu: CpuState) -> Json:
    """One CPU's buffer: `state` is empty, half written, saved or damaged, or null when it could not be read.

    The registers are those of Xen in kexec_crash_save_cpu(), not of what the crash interrupted.
    """
    saved = state.system["saved"].value
    in_mask = None if isinstance(saved, Absent) else cpu.cpu in saved
    out: Json = {"cpu": cpu.cpu, "address": None, "state": None, "in_crash_saved_cpus": in_mask,
                 "at": None, "registers": None, "control": None}  # fmt: skip
    notes = cpu.notes.value
    if isinstance(notes, Absent):
        return out | {"says": notes.reason}
    for name in ("registers", "control"):
        part = getattr(notes, name)
        out[name] = None if isinstance(part, Absent) else {key: hex(value) for key, value in part.items()}
    if not isinstance(notes.registers, Absent):
        pc = notes.registers["rip"]
        out["at"] = {"symbol": state.symbols.describe(pc), "pc": hex(pc)}
    address = cpu.notes.address
    return out | {
        "address": None if address is None else hex(address),
        "state": notes.progress,
        "says": _says(notes, in_mask),
    }


def _says(notes: CpuNotes, in_mask: bool | None) -> str:
    """What a buffer shows, together with its bit in crash_saved_cpus, which Xen sets before it writes."""
    began = {True: ", although crash_saved_cpus has its bit", False: "", None: ""}[in_mask]
    unmarked = ", although crash_saved_cpus lacks its bit" if in_mask is False else ""
    if notes.damaged:
        return str(notes.registers)
    if notes.progress == "empty":
        return f"this CPU saved nothing{began}"
    if notes.progress == "half written":
        return f"without {', '.join(notes.missing)}: it was interrupted, or something overwrote it{unmarked}"
    return f"complete{unmarked}"


def _describe_info(memory: XenMemory, first: CpuState) -> Json:
    notes = first.notes.value
    info = notes if isinstance(notes, Absent) else notes.info
    if isinstance(info, Absent):
        return {"absent": {"info": info.reason}}
    return describe_info(memory.target, info)


_STRINGS = ("extra_version", "changeset", "compiler", "compile_date", "compile_time")


def describe_info(target: Target, info: CrashInfo) -> Json:
    """The CRASH_INFO note with its strings; one that could not be read is null, and `absent` says why."""
    out: Json = {}
    absences = {}
    for name, value in info._asdict().items():
        if name in _STRINGS:
            text = _string(target, value)
            if isinstance(text, Absent):
                absences[name] = text.reason
            out[name] = None if isinstance(text, Absent) else text
        elif name.startswith("xen_m"):
            out[name] = value
        else:
            out[name] = hex(value)
    out["version"] = f"{info.xen_major}.{info.xen_minor}{out['extra_version'] or ''}"
    return out | ({"absent": absences} if absences else {})


def _string(target: Target, address: int) -> str | Absent:
    """A string of Xen's by its physical address, up to its NUL."""
    if not address:
        return Absent("the note has no address for it")
    try:
        # It may lie at the very end of what the target holds: a piece at a time.
        raw = b""
        while len(raw) < _STRING_MAX and b"\0" not in raw:
            room = min(16 - (address + len(raw)) % 16, _STRING_MAX - len(raw))
            raw += target.read_physical(address + len(raw), room)
    except Unreadable as error:
        return error.absent
    return escaped(raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace"))
