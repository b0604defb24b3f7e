"""What notes and CPUs say of where Xen is in a target: no more than these is needed where a dump shows it."""

from __future__ import annotations

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.formats.elfnotes import Note
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu, Target
from xen_symbols.targets.notes import XEN_CRASH_INFO, parse_address, parse_crash_info, parse_vmcoreinfo
from xen_symbols.x86 import paging
from xen_symbols.xen.memory import image_region

BY_INFO = "xen_phys_start in the crash info note"


class Unread:
    """The first place in a dump that should have shown Xen, and could not be read: where none is found, that is why.

    Of a live machine it says nothing: a CPU in a guest has page tables that lead nowhere.
    """

    def __init__(self, target: Target) -> None:
        self.why: str | None = None
        self._is_dump = target.kind == "dump"

    def note(self, named_by: str, error: Unreadable) -> None:
        """A page that is not mapped was read: its page tables were."""
        if self._is_dump and self.why is None and (not isinstance(error, paging.Untranslated) or error.unread):
            self.why = f"what {named_by} points to cannot be read ({error})"


def xen_phys_start_of(note: Note) -> int | None:
    """Where the image begins in physical memory, if the note is Xen's crash info and says so."""
    if (note.name, note.type) != ("Xen", XEN_CRASH_INFO):
        return None
    info = parse_crash_info(note.desc)
    return None if isinstance(info, Absent) else info.xen_phys_start


def pgd_l4(target: Target) -> int | None:
    """The virtual address of ROOT by the note that Xen writes for makedumpfile."""
    for note in target.notes():
        if note.name == "VMCOREINFO_XEN":
            address = parse_address(parse_vmcoreinfo(note.desc).get("SYMBOL(pgd_l4)", ""))
            if address is not None and paging.is_canonical(address):
                return address
    return None


def note_offset(symbols: SymbolTable) -> int | None:
    """Where the build-id's note is in the image, from XEN_VIRT_START on."""
    address = symbols.note_address
    return None if address is None else address - image_region(address)


def by_cr3(cpu: PhysicalCpu) -> str:
    return f"CR3 of CPU {cpu.index} ({cpu.source})"


def and_base(target: Target) -> str:
    if target.memory is not None and target.memory.given:
        return ", and is what is where in the file as --map says"
    return "" if target.base is None else f", with physical {target.base:#x} as its first byte (--base)"
