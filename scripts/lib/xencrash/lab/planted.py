"""Code that faults, planted in Xen: at the entry of a hypercall that nothing makes by itself, and no crash path.

It is written by QEMU's gdbstub, while the machine stands still, and before a trace is attached.
"""

from __future__ import annotations

from pathlib import Path

from xen_symbols.absence import Unreadable
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import TEXT
from xencrash.lab.errors import LabError
from xencrash.lab.storm.rsp import Rsp

# In the directmap, beyond all memory: neither Xen nor a guest maps anything there (xen/include/asm-x86/config.h).
_UNMAPPED = (0xFFFF87F000000000).to_bytes(8, "little")
CODE = {
    "bug": bytes.fromhex("0f0b"),  # ud2, as BUG() has it
    "page-fault": b"\x48\xa1" + _UNMAPPED,  # mov (_UNMAPPED),%rax
    # mov $_UNMAPPED,%rsp; push %rax: the fault's own frame cannot be pushed either (SDM vol. 3, 6.15, interrupt 8)
    "double-fault": b"\x48\xbc" + _UNMAPPED + b"\x50",
}
WHERE = "do_kexec_op"
MAKES_IT = "kexec -p -u"  # in dom0


def plant(kind: str, stub: Path, symbols: Path, cpus: int) -> None:
    """Have the hypercall fault. The machine is left standing still. Raises LabError."""
    code = CODE[kind]
    address = load_symbols(str(symbols)).get(WHERE, TEXT)
    if address is None:
        raise LabError(f"crashing Xen: --how {kind} needs {WHERE}, which {symbols} does not name: use another way")
    with Rsp(stub) as rsp:
        for cpu in range(cpus):  # one in a guest's address space does not have Xen's
            try:
                rsp.write_virtual(cpu, address, code)
            except Unreadable:
                continue
            return
    raise LabError(f"crashing Xen: all CPUs are in guests now, and none maps {WHERE}: try again")
