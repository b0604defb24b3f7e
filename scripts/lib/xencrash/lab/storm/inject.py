"""An NMI, or a machine check, on one CPU of a stopped machine."""

from __future__ import annotations

from xen_symbols.targets.qmp import Qmp
from xencrash.lab.crash import FATAL_MCE
from xencrash.lab.errors import LabError
from xencrash.lab.storm.rsp import Rsp

_MSI = 0xFEE00000  # SDM vol. 3, "Message Address Register Format"; the destination's APIC ID is in bits 19-12
_MSI_NMI = (0x400).to_bytes(4, "little")  # "Message Data Register Format": delivery mode NMI, edge


def nmi(rsp: Rsp, apic_id: int) -> None:
    """By a message to its local APIC: QMP's inject-nmi takes no CPU, and goes through LINT1, which Xen masks."""
    if apic_id > 0xFE:
        raise LabError(f"an NMI cannot be sent to APIC ID {apic_id:#x}: a message's destination has 8 bits")
    rsp.write(_MSI | apic_id << 12, _MSI_NMI)


def machine_check(qmp: Qmp, cpu: int) -> str:
    """A fatal one, on QEMU's CPU of this index. Returns what QEMU said: if CR4.MCE is clear or one is in progress, it
    ends the machine and says so."""
    said: str = qmp.execute("human-monitor-command", command_line=f"mce {cpu} {FATAL_MCE}")
    return said.strip()
