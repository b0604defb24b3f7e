"""The crash notes: what each CPU saved in Xen's memory, whether the dump's own notes agree, and CRASH_INFO."""

from __future__ import annotations

from collections.abc import Sequence

from xen_symbols.absence import Absent, Kind
from xen_symbols.crashpath.checks import registers
from xen_symbols.crashpath.checks.model import (
    NOT_IDENTIFIED,
    ByGeneration,
    Check,
    Need,
    Outcome,
    Subject,
    because,
    expect,
    from_absence,
    skip,
    unknown,
)
from xen_symbols.crashpath.context import MACHINE, Context
from xen_symbols.crashpath.timeline import CRASH_INFO, NOTES
from xen_symbols.report.model import Verdict
from xen_symbols.xen.memory import IMAGE_MAX
from xen_symbols.xen.reads import Read
from xen_symbols.xen.savedcpus import NO_PAIR


def _crash_notes(context: Context, cpu: int) -> Outcome:
    read = context.state.of(cpu).notes
    if context.on_unknown_path:
        return _as_saved(context, cpu, read)
    allowed = context.allowed(NOTES, cpu)
    if isinstance(read.value, Absent) or isinstance(allowed, Absent):
        return expect(read, allowed)
    observed = read.value.progress
    if observed == "saved" and cpu in context.position.online and "saved" in allowed:
        parts = registers.parts(context, cpu, read.value)
        if len(allowed) == 1:
            return registers.outcome(parts, read.evidence)
        observed = "saved" if all(part.right is True for part in parts) else _NOT_ITS_OWN
    if len(allowed) > 1:  # it may be writing them right now
        allowed = (*allowed, "half written", _NOT_ITS_OWN)
    outcome = expect(Read(observed, read.evidence), allowed)
    return because(outcome, "saved-cpus") if observed == "empty" else outcome


def _as_saved(context: Context, cpu: int, read: Read) -> Outcome:
    """Of notes that an unknown path has filled in, whether they can be its registers; when it does so is not known."""
    if isinstance(read.value, Absent):
        return from_absence(read.value)
    if read.value.progress != "saved":
        return unknown(NOT_IDENTIFIED, None, read.value.progress)
    return registers.outcome(registers.parts(context, cpu, read.value), read.evidence)


_NOT_ITS_OWN = "not Xen's registers"
CRASH_NOTES = Check(
    "crash-notes", Subject.CPUS, "xen/common/kexec.c, kexec_crash_save_cpu",
    "its registers are missing from the dump, or are not its own", _crash_notes,
    {"empty": "the dump shows registers of this CPU that this crash did not save"}, by_generation=ByGeneration.NEVER,
)  # fmt: skip

_AS_SAVED = "what Xen's memory holds"


def _dump_notes(context: Context, cpu: int) -> Outcome:
    state = context.state.of(cpu)
    pair = state.pair
    if isinstance(pair, Absent) and pair != NO_PAIR:
        return from_absence(pair)
    if not isinstance(pair, Absent) and pair.current:
        return skip("its registers do not come from the notes that Xen saved")
    notes = state.notes.value
    if isinstance(notes, Absent):
        return from_absence(notes, _AS_SAVED)
    if notes.damaged:
        return unknown(f"in Xen's memory {notes.registers}", _AS_SAVED)
    held = notes.saved
    if isinstance(pair, Absent):
        if not held:
            return skip("neither Xen's memory nor the file has notes of it")
        return expect(Read("no notes", state.notes.evidence), (_AS_SAVED,))
    theirs = pair.registers
    observed = _AS_SAVED
    if theirs and pair.xen_cpu != cpu:  # gdb and crash(8) go by it
        observed = f"at the place of CPU {pair.xen_cpu}"
    elif theirs != held:
        lost = [f"no {name}" for name in held if name not in theirs]
        other = [f"other {name}" for name in theirs if theirs[name] != held.get(name)]
        observed = _few([*other, *lost]) if theirs else "empty"
    return expect(Read(observed, state.notes.evidence), (_AS_SAVED,))


def _few(words: Sequence[str]) -> str:
    shown, more = words[:4], len(words) - 4
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


DUMP_NOTES = Check(
    "dump-notes", Subject.ONLINE, "xen/common/kexec.c, kexec_crash_save_cpu; the dump's own ELF notes",
    "the registers that gdb or crash(8) show for this CPU are not those that Xen saved", _dump_notes,
    needs=Need.NOTES, by_generation=ByGeneration.NEVER,
)  # fmt: skip


def _crash_info_note(context: Context, _cpu: int) -> Outcome:
    read = context.state.of(0).notes
    if isinstance(read.value, Absent):  # it has one on every Xen that has crash notes
        return unknown(read.value.reason)
    info = read.value.info
    if read.value.damaged:
        return unknown(info.reason)
    if isinstance(info, Absent) and info.kind is Kind.NOT_APPLICABLE:
        return unknown("CPU 0's buffer of crash notes holds no CRASH_INFO")
    value = None if isinstance(info, Absent) else info.xen_phys_start
    allowed = context.allowed(CRASH_INFO, MACHINE)
    if context.on_unknown_path:
        if value is None:
            return unknown(NOT_IDENTIFIED, None, "empty")
        allowed = (context.memory.xen_phys_start,)
    outcome = expect(
        Read(value, read.evidence),
        allowed,
        lambda start: "empty" if start is None else {"xen_phys_start": hex(start)},
    )
    if outcome.verdict is not Verdict.PASS or isinstance(info, Absent):
        return outcome
    elsewhere = {name: hex(address) for name, address in info.strings.items()
                 if not 0 <= address - context.memory.xen_phys_start < IMAGE_MAX}  # fmt: skip
    if elsewhere:
        return Outcome(Verdict.FAIL, dict.fromkeys(elsewhere, "in Xen's image"), elsewhere, read.evidence)
    return outcome


CRASH_INFO_NOTE = Check(
    "crash-info-note", Subject.MACHINE, "xen/common/kexec.c, kexec_crash_save_info",
    "tools cannot find Xen in the dump", _crash_info_note,
    by_generation=ByGeneration.NEVER,
)  # fmt: skip

CHECKS = (CRASH_NOTES, DUMP_NOTES, CRASH_INFO_NOTE)
