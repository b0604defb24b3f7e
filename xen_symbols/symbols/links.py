"""The two links of one build of Xen: `xen.gz` and `xen.efi`. Their functions have the same addresses, their variables
other ones (xen/arch/x86/xen.lds.S: SECTION_ALIGN), so the symbols of one are wrong for a machine that booted the other.
"""

from __future__ import annotations

from enum import Enum

from xen_symbols.absence import Unreadable
from xen_symbols.symbols.table import SymbolTable

_DUMMY = 8  # bytes: an empty block, as efi/relocs-dummy.S has it in the link that needs none


class Link(Enum):
    """The value is the file that boots."""

    GZ = "xen.gz"
    EFI = "xen.efi"

    @property
    def symbols(self) -> str:
        """The files with its symbols."""
        return "its xen-syms or xen-syms.map" if self is Link.GZ else "its xen.efi, xen.efi.elf or xen.efi.map"

    @property
    def other(self) -> Link:
        return Link.GZ if self is Link.EFI else Link.EFI


def link_of(table: SymbolTable) -> Link | None:
    """Whose symbols these are; None if they do not show it. Only xen.efi has base relocations."""
    try:
        size = table.address("__base_relocs_end") - table.address("__base_relocs_start")
    except Unreadable:
        return None
    return Link.EFI if size > _DUMMY else Link.GZ
