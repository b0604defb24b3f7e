"""Where a CPU's stacks are, by its TSS, and struct cpu_info at their end (xen/include/asm-x86/current.h)."""

from __future__ import annotations

from xen_symbols.records import NamedTuple
from xen_symbols.x86.tss import Tss

STACK_SIZE = 32 << 10  # STACK_ORDER 3, in every release
IST_SSP_SIZE = 64  # struct tss_page begins with the shadow-stack table ist_ssp[8] since 4.14


class CpuInfo(NamedTuple):
    """struct cpu_info, by how far rsp0 (which is &guest_cpu_user_regs.es) lies from its end; offsets from the end."""

    above_rsp0: int
    processor_id: int
    current: int
    source: str


_CPU_INFOS = (
    CpuInfo(64, 32, 24, "xen/include/asm-x86/current.h up to 4.10.0"),
    CpuInfo(96, 64, 56, "xen/include/asm-x86/current.h with XPTI's fields: 4.11 to 4.20, fixed releases since 4.7.5"),
    CpuInfo(80, 64, 56, "xen/arch/x86/include/asm/current.h without the segment registers of vm86 mode (4.21.0)"),
)


def base_by(tss: Tss) -> tuple[int, CpuInfo] | None:
    """Where the stacks begin, and what lies at their end; None where this is not a TSS of Xen's."""
    base = (tss.rsp[0] - 1) & -STACK_SIZE
    info = next((row for row in _CPU_INFOS if base + STACK_SIZE - tss.rsp[0] == row.above_rsp0), None)
    if info is None or not all(base < tss.ist[ist - 1] <= base + STACK_SIZE for ist in (1, 2, 3)):
        return None
    return base, info
