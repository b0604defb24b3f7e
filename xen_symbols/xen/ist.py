"""Which entry of the interrupt stack table (SDM vol. 3, 6.14.5) each exception of Xen's uses, by its gates."""

from __future__ import annotations

from xen_symbols.absence import Absent
from xen_symbols.records import NamedTuple
from xen_symbols.x86 import gate
from xen_symbols.xen.state import State

VECTOR_DB = 1


class IstNumbers(NamedTuple):
    """Which IST entry each exception uses. The #DF gate, which the crash path never touches, shows it.

    `first_page` is the page of a CPU's stack that IST 1 has; pages below it hold shadow stacks.
    """

    df: int
    nmi: int
    mc: int
    db: int
    first_page: int
    source: str

    def vector(self, ist: int) -> int | None:
        """The exception that uses an IST entry."""
        vectors = {self.df: gate.VECTOR_DF, self.nmi: gate.VECTOR_NMI, self.mc: gate.VECTOR_MC, self.db: VECTOR_DB}
        return vectors.get(ist)


IST_NUMBERS = (
    # #DB has one since 4.7.6, 4.8.4, 4.9.3, 4.10.2 and 4.11; before, the TSS holds poison there.
    IstNumbers(df=1, nmi=2, mc=3, db=4, first_page=0, source="xen/include/asm-x86/processor.h (4.2 - 4.13)"),
    IstNumbers(df=4, nmi=2, mc=1, db=3, first_page=1, source="6001660473 (4.14.0)"),
)


def ist_numbers(state: State) -> IstNumbers | Absent:
    """By the #DF gates of all CPUs: an AMD CPU that holds an HVM guest's state has IST 0 there."""
    seen = {cpu.df_gate.value.ist for cpu in state.cpus.values() if cpu.df_gate.present and cpu.df_gate.value.ist}
    rows = [row for row in IST_NUMBERS if row.df in seen]
    if len(rows) == 1 and len(seen) == 1:
        return rows[0]
    return Absent(f"the #DF gates use IST {sorted(seen) or 'none'}, which fits no known Xen")
