"""The notes of a dump's file that are about the machine, CRASH_INFO and VMCOREINFO, held against Xen's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.checks.model import ByGeneration, Check, Need, Outcome, Subject, from_absence, skip, unknown
from xen_symbols.crashpath.context import Context
from xen_symbols.formats.elfnotes import Note
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.symbols.table import DATA
from xen_symbols.targets.notes import (
    XEN_CRASH_INFO,
    XEN_CRASH_REGS,
    CrashInfo,
    parse_crash_info,
    parse_vmcoreinfo,
)
from xen_symbols.xen.memory import ROOT

AS_IN_MEMORY = "what Xen's memory holds"
_VMCOREINFO, _ROOT = "VMCOREINFO_XEN", "SYMBOL(pgd_l4)"
# vmcoreinfo_data[] holds the whole note: its header, its name, padded, and the text.
_VMCOREINFO_DESC = 12 + 16
# Not a failure: kexec-tools leave it out where they cannot ask Xen where it is (kexec/crashdump-elf.c).
_NO_VMCOREINFO = "the file has no VMCOREINFO_XEN note, so makedumpfile -X needs --xen-syms"
_SOURCE = "xen/common/kexec.c, {}; the dump's own ELF notes"


def _of_the_file(context: Context, name: str, kind: int) -> list[Note]:
    return [note for note in context.memory.target.notes() if (note.name, note.type) == (name, kind)]


def _is_xens_vmcore(context: Context) -> bool:
    return bool(_of_the_file(context, "Xen", XEN_CRASH_REGS))


def _compared(
    held: Mapping[str, Any], theirs: Mapping[str, Any], evidence: tuple[Evidence, ...], show: Callable[[Any], str] = str
) -> Outcome:
    """Pass where both say the same; else each entry that differs, as memory has it and as the file has."""
    if held == theirs:
        return Outcome(Verdict.PASS, AS_IN_MEMORY, AS_IN_MEMORY, evidence)
    names = [name for name in dict.fromkeys((*held, *theirs)) if held.get(name) != theirs.get(name)]
    expected, observed = (
        {name: show(values[name]) if name in values else None for name in names} for values in (held, theirs)
    )
    return Outcome(Verdict.FAIL, expected, observed, evidence)


# -- CRASH_INFO -------------------------------------------------------------------------------


def _info(context: Context, _cpu: int) -> Outcome:
    notes = _of_the_file(context, "Xen", XEN_CRASH_INFO)
    if not notes and not _is_xens_vmcore(context):
        return skip("the target has no notes of Xen's")
    read = context.state.of(0).notes
    if isinstance(read.value, Absent):
        return unknown(read.value.reason, AS_IN_MEMORY)
    held = read.value.info
    if isinstance(held, Absent):
        return unknown(f"in Xen's memory: {held.reason}", AS_IN_MEMORY)
    if not notes:
        return Outcome(Verdict.FAIL, AS_IN_MEMORY, "no CRASH_INFO", read.evidence)
    try:
        theirs = parse_crash_info(notes[-1].desc)
    except Undecidable as error:
        return Outcome(Verdict.FAIL, AS_IN_MEMORY, str(error), read.evidence)
    if isinstance(theirs, Absent):
        return Outcome(Verdict.FAIL, AS_IN_MEMORY, "empty", read.evidence)
    return _compared(_fields(held), _fields(theirs), read.evidence, hex)


def _fields(info: CrashInfo) -> dict[str, int]:
    return info._asdict()


INFO = Check(
    "dump-crash-info", Subject.MACHINE, _SOURCE.format("kexec_crash_save_info"),
    "tools that go by the file's CRASH_INFO look in the wrong place: crash(8), libkdumpfile (and what uses it) and "
    "xen-crashdump-analyser find Xen by its xen_phys_start, and dom0's memory by dom0_pfn_to_mfn_frame_list_list",
    _info, needs=Need.NOTES, by_generation=ByGeneration.NEVER,
)  # fmt: skip

# -- VMCOREINFO -------------------------------------------------------------------------------


def _vmcoreinfo(context: Context, _cpu: int) -> Outcome:
    notes = _of_the_file(context, _VMCOREINFO, 0)
    if not notes:
        return skip(_NO_VMCOREINFO if _is_xens_vmcore(context) else "the target has no notes of Xen's")
    theirs = notes[-1].desc.split(b"\0", 1)[0]
    try:
        address = context.symbols.address("vmcoreinfo_data", DATA)
        # A NUL more: there Xen's text must end, too.
        raw = context.memory.read(address, _VMCOREINFO_DESC + len(theirs) + 1)
    except Unreadable as error:
        return from_absence(error.absent, AS_IN_MEMORY)
    evidence = (Evidence("memory", address, raw[:_VMCOREINFO_DESC], "vmcoreinfo_data"),)
    if _VMCOREINFO.encode() not in raw[:_VMCOREINFO_DESC]:
        return unknown("vmcoreinfo_data in Xen's memory does not begin with its header", AS_IN_MEMORY)
    if raw[_VMCOREINFO_DESC:] == theirs + b"\0":
        root = parse_vmcoreinfo(theirs).get(_ROOT)
        own = f"{context.symbols.address(ROOT):x}"
        verdict = Verdict.PASS if root == own else Verdict.FAIL
        return Outcome(verdict, {_ROOT: own}, {_ROOT: root}, evidence)
    with contextlib.suppress(Unreadable):  # to compare line by line
        raw = context.memory.read(address, _VMCOREINFO_SIZE)
    held = parse_vmcoreinfo(raw[_VMCOREINFO_DESC:])
    outcome = _compared(held, parse_vmcoreinfo(theirs), evidence)
    if outcome.verdict is Verdict.PASS:  # the same lines, otherwise laid out
        return outcome._replace(verdict=Verdict.FAIL, observed="the same lines in another order")
    return outcome


_VMCOREINFO_SIZE = 4096  # vmcoreinfo_data[], a page
VMCOREINFO = Check(
    "dump-vmcoreinfo", Subject.MACHINE, _SOURCE.format("crash_save_vmcoreinfo"),
    "tools that go by the file's VMCOREINFO_XEN read the wrong memory: makedumpfile -X finds domains and pages by it "
    "and leaves out the wrong ones, and xen-crashdump-analyser and libkdumpfile start at its pgd_l4", _vmcoreinfo,
    needs=Need.NOTES, by_generation=ByGeneration.NEVER,
)  # fmt: skip

CHECKS = (INFO, VMCOREINFO)
