"""What is written into Xen so that it crashes: code at the entry of a hypercall that nothing makes by itself, and no
crash path; or the banks that its machine-check handler looks at.

It is written by QEMU's gdbstub, while the machine stands still, and before a trace is attached.
"""

from __future__ import annotations

from pathlib import Path

from xen_symbols.absence import Unreadable
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import TEXT, SymbolTable
from xencrash.lab.errors import LabError
from xencrash.lab.storm.rsp import Rsp

WHERE, _TRIGGER, _BANKS = "do_kexec_op", "do_nmi_trigger", "mca_allbanks"
MAKES_IT = "kexec -p -u"  # in dom0: the hypercall
# In the directmap, beyond all memory: neither Xen nor a guest maps anything there (xen/include/asm-x86/config.h).
_UNMAPPED = (0xFFFF87F000000000).to_bytes(8, "little")
_FAULTS = {
    "bug": bytes.fromhex("0f0b"),  # ud2, as BUG() has it
    "page-fault": b"\x48\xa1" + _UNMAPPED,  # mov (_UNMAPPED), %rax
    # mov $_UNMAPPED, %rsp; push %rax: the fault's own frame cannot be pushed either (SDM vol. 3, 6.15, interrupt 8)
    "double-fault": b"\x48\xbc" + _UNMAPPED + b"\x50",
}
_NEEDS: dict[str, dict[str, str | None]] = {
    **{kind: {WHERE: TEXT} for kind in _FAULTS},
    "watchdog": {WHERE: TEXT, _TRIGGER: TEXT},
    "mce": {_BANKS: None},
}


def lacks(kind: str, symbols: SymbolTable) -> str | None:
    """Why a Xen with these symbols cannot be crashed in this way; None if it can."""
    for name, kinds in _NEEDS.get(kind, {}).items():
        if (symbols.text_only and kinds is None) or not symbols.has(name, kinds):
            return f"--how {kind} needs {name}, which its symbols do not have"
    return None


def ways_it_lacks(symbols: Path) -> dict[str, str]:
    """Why a Xen cannot be crashed in some ways, by way."""
    table = load_symbols(str(symbols))
    return {kind: why for kind in _NEEDS if (why := lacks(kind, table))}


def plant(kind: str, stub: Path, symbols: Path, cpus: int, where: str = WHERE) -> str | None:
    """Write what this way of crashing needs, and return what is to be known about it; `where` is the function whose
    code it replaces. The machine is left standing still. Raises LabError."""
    table = load_symbols(str(symbols))
    if why := lacks(kind, table):
        raise LabError(f"crashing Xen: {why}: {symbols}: use another way")
    with Rsp(stub) as rsp:
        for cpu in range(cpus):  # one in a guest's address space does not have Xen's
            try:
                if kind == "mce":
                    return _have_banks_looked_at(rsp, cpu, table)
                rsp.write_virtual(cpu, _address(table, where), _code(kind, table))
            except Unreadable:
                continue
            return None
    raise LabError("crashing Xen: all CPUs are in guests now, and none maps Xen: try again")


def _code(kind: str, symbols: SymbolTable) -> bytes:
    if kind != "watchdog":
        return _FAULTS[kind]
    # 1: mov $do_nmi_trigger, %rax; call *%rax; jmp 1b. It is the debug key 'n', which sends an NMI to its own CPU.
    return b"\x48\xb8" + _address(symbols, _TRIGGER).to_bytes(8, "little") + b"\xff\xd0\xeb\xf2"


def _have_banks_looked_at(rsp: Rsp, cpu: int, symbols: SymbolTable) -> str | None:
    """Fill an empty `mca_allbanks`, a pointer to {int num; unsigned long *bank_map}."""
    banks = _number(rsp, cpu, _address(symbols, _BANKS))
    count, bitmap = _number(rsp, cpu, banks, 4), _number(rsp, cpu, banks + 8)
    size = (count + 63) // 64 * 8
    if _number(rsp, cpu, bitmap, size):
        return None
    rsp.write_virtual(cpu, bitmap, ((1 << count) - 1).to_bytes(size, "little"))
    return (
        f"this Xen ignores every machine check, since {_BANKS}, the banks that its handler looks at, is empty "
        '(560cf418c845; fixed by "x86/mcheck: fix mca_allbanks updating"): all are set in it now'
    )


def _number(rsp: Rsp, cpu: int, address: int, size: int = 8) -> int:
    data = rsp.read_virtual(cpu, address, size)
    if len(data) != size:
        raise Unreadable(f"CPU {cpu} does not map {address:#x}")
    return int.from_bytes(data, "little")


def _address(symbols: SymbolTable, name: str) -> int:
    address = symbols.get(name)
    assert address is not None  # `lacks` has been asked
    return address
