"""What each feature needs of a build's symbols, and which of it a given build has.

A need is met by the first of its names, newest first, that the symbols hold. Some are of one
generation only; that a build lacks those says what it is, not that anything is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.table import TEXT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xen_symbols.symbols.table import Symbol, SymbolTable

DATA = "dDbBrRvV"


class Need(NamedTuple):
    """A symbol that `feature` uses; `source` is the file, or the commit and release, that explains its names."""

    feature: str
    names: tuple[str, ...]
    kinds: str
    source: str


class Have(NamedTuple):
    need: Need
    symbol: Symbol | Absent


NEEDS = (
    Need("translation", ("idle_pg_table",), DATA, "arch/x86/mm.c"),
    Need("translation", ("xen_phys_start",), DATA, "arch/x86/setup.c"),
    Need("build", ("__note_gnu_build_id_start",), DATA, "arch/x86/xen.lds.S (4.7)"),
    Need("cpus", ("nr_cpu_ids",), DATA, "common/cpu.c, common/smp.c"),
    Need("cpus", ("cpu_online_map",), DATA, "arch/x86/smpboot.c, common/cpu.c"),
    Need("cpus", ("x86_cpu_to_apicid",), DATA, "arch/x86/smpboot.c"),
    Need("per-cpu", ("__per_cpu_offset",), DATA, "arch/x86/percpu.c"),
    Need("per-cpu", ("__per_cpu_start",), DATA, "arch/x86/xen.lds.S"),
    Need("gates", ("per_cpu__idt", "idt_tables"), DATA, "per_cpu(idt) since 9c20d3c591 (4.21.0)"),
    Need("gates", ("entry_NMI", "nmi"), TEXT, "renamed by abe93fc8aa (4.18.0)"),
    Need("gates", ("entry_MC", "machine_check"), TEXT, "renamed by abe93fc8aa (4.18.0)"),
    Need("gates", ("trap_nop",), TEXT, "77ad1faa6b (4.3.0)"),
    Need("tss", ("per_cpu__tss_page", "per_cpu__init_tss"), DATA, "renamed by 7888440625 (4.13.0)"),
    Need("nmi-dispatch", ("do_nmi_crash", "crash_nmi_callback"), TEXT, "do_nmi_crash since 77ad1faa6b (4.3.0)"),
    Need("nmi-dispatch", ("traps.c#nmi_callback", "nmi_callback"), DATA, "arch/x86/traps.c"),
    Need("nmi-dispatch", ("exception_table",), DATA, "removed by 327db3837a (4.17.0)"),
    Need("bookkeeping", ("waiting_to_crash", "waiting_for_crash_ipi"), DATA, "a mask since f12c1f0b09 (4.3.2, 4.4.0)"),
    Need("bookkeeping", ("per_cpu__crash_save_done",), DATA, "77ad1faa6b (4.3.0)"),
    Need("bookkeeping", ("crash_saved_cpus",), DATA, "common/kexec.c"),
    Need("bookkeeping", ("kexec.c#crashing_cpu",), DATA, "470f58c159 (4.2.4, 4.3.2, 4.4.0)"),
    Need("bookkeeping", ("kexecing",), DATA, "common/kexec.c"),
    Need("stages", ("kexec_crash",), TEXT, "common/kexec.c"),
    Need("stages", ("machine_crash_shutdown",), TEXT, "arch/x86/crash.c"),
    Need("stages", ("smp_send_nmi_allbutself",), TEXT, "arch/x86/smp.c, arch/x86/crash.c"),
    Need("stages", ("kexec_crash_save_cpu",), TEXT, "common/kexec.c"),
    Need("stages", ("__stop_this_cpu",), TEXT, "arch/x86/smp.c"),
    Need("stages", ("kexec_crash_save_info",), TEXT, "common/kexec.c"),
    Need("stages", ("machine_kexec",), TEXT, "arch/x86/machine_kexec.c"),
    Need("stages", ("kexec_reloc",), TEXT, "arch/x86/x86_64/kexec_reloc.S (4.4.0)"),
    Need("lapic", ("x2apic_enabled",), DATA, "arch/x86/apic.c, arch/x86/genapic/x2apic.c"),
    Need("lapic", ("apic_boot_mode",), DATA, "arch/x86/apic.c"),
    Need("notes", ("crash_notes",), DATA, "common/kexec.c"),
    Need("console", ("conring",), DATA, "drivers/char/console.c"),
    Need("console", ("conring_size",), DATA, "drivers/char/console.c"),
    Need("console", ("conringc",), DATA, "drivers/char/console.c"),
    Need("console", ("conringp",), DATA, "drivers/char/console.c"),
)


def survey(table: SymbolTable, needs: Sequence[Need] = NEEDS) -> tuple[Have, ...]:
    """Each need with the symbol that meets it, or why none does."""
    return tuple(Have(need, _first(table, need)) for need in needs)


def _first(table: SymbolTable, need: Need) -> Symbol | Absent:
    absences = []
    for name in need.names:
        try:
            return table.find(name, need.kinds)
        except Unreadable as error:
            absences.append(error.absent)
    return absences[0]
