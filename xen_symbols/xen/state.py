"""The state of the crash path at one moment: every variable, gate and CPU that it touches, with its evidence.

Nothing is judged here. What could not be read is Absent, with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.report.model import Evidence
from xen_symbols.symbols.table import DATA, SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86 import gate
from xen_symbols.xen import crashnotes
from xen_symbols.xen.memory import XenMemory

# xen/include/xen/percpu.h, INVALID_PERCPU_AREA: 0 until 7cfb005362 (4.2.5, 4.3.1), non-canonical since.
INVALID_PERCPU_AREAS = (0, 0x8000_0000_0000_0000)
BAD_APICID = 0xFFFFFFFF  # xen/include/asm-x86/apicdef.h; a free slot of x86_cpu_to_apicid[]
VECTOR_DF = 8
# NMI (2), #DF (8) and #MC (18) in one read: the gates from vector 2 to vector 18.
_GATES_AT = gate.VECTOR_NMI * gate.SIZE
_GATES_SIZE = (gate.VECTOR_MC + 1) * gate.SIZE - _GATES_AT
NR_CPUS_MAX = 16384  # no build of Xen allows more (Kconfig NR_CPUS); a larger nr_cpu_ids is not one


class Read(NamedTuple):
    """A value and where it was read, as every finding that rests on it tells it."""

    value: Any
    evidence: tuple[Evidence, ...] = ()

    @property
    def present(self) -> bool:
        return not isinstance(self.value, Absent)

    @property
    def address(self) -> int | None:
        """Where it lies in Xen's memory; None for what was not read there."""
        return self.evidence[0].address if self.evidence else None

    @property
    def raw(self) -> bytes | None:
        """Its bytes there."""
        return self.evidence[0].raw if self.evidence else None

    @property
    def symbol(self) -> str | None:
        """The name that led there."""
        return self.evidence[0].symbol if self.evidence else None


def in_memory(value: Any, address: int, raw: bytes, symbol: str | None = None) -> Read:
    """A value decoded from `raw`, which lies at `address`."""
    return Read(value, (Evidence("memory", address, raw, symbol),))


def absent(reason: str | Absent, kind: Kind = Kind.UNREAD) -> Read:
    return Read(reason if isinstance(reason, Absent) else Absent(reason, kind))


class Variable(NamedTuple):
    """One variable of Xen's: the names it goes by, newest first, and how its bytes are read.

    `size` 0 stands for a cpumask_t: as many 64-bit words as nr_cpu_ids needs.
    """

    field: str
    names: tuple[str, ...]
    size: int
    decode: Callable[[bytes], Any]
    offset: int = 0
    source: str = ""


def _unsigned(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _flag(raw: bytes) -> bool:
    return raw != bytes(len(raw))


def mask(raw: bytes) -> frozenset[int]:
    """The CPU numbers in a cpumask_t."""
    bits = int.from_bytes(raw, "little")
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return frozenset(found)


SYSTEM = (
    Variable("kexecing", ("kexecing",), 1, _flag, source="xen/common/kexec.c"),
    Variable("kexec_flags", ("kexec_flags",), 8, _unsigned, source="xen/common/kexec.c"),
    Variable("crash_owner", ("kexec.c#crashing_cpu",), 4, _signed, source="470f58c159 (4.2.4, 4.3.2, 4.4.0)"),
    Variable("saved", ("crash_saved_cpus",), 0, mask, source="xen/common/kexec.c"),
    Variable("online", ("cpu_online_map",), 0, mask, source="xen/arch/x86/smpboot.c"),
    Variable("waiting_mask", ("waiting_to_crash",), 0, mask, source="f12c1f0b09 (4.3.2, 4.4.0)"),
    Variable("waiting_count", ("waiting_for_crash_ipi",), 4, _signed, source="before f12c1f0b09"),
    Variable("exception_table_nmi", ("exception_table",), 8, _unsigned, offset=8 * gate.VECTOR_NMI,
             source="removed by 327db3837a (4.17.0)"),
    Variable("nmi_callback", ("traps.c#nmi_callback", "nmi_callback"), 8, _unsigned, source="xen/arch/x86/traps.c"),
    Variable("x2apic_enabled", ("x2apic_enabled",), 1, _flag, source="xen/arch/x86/apic.c"),
    Variable("apic_boot_mode", ("apic_boot_mode",), 4, _unsigned, source="xen/arch/x86/apic.c"),
    Variable("fred", ("opt_fred",), 1, _signed, source="bbfb30f649 (4.22.0)"),
)  # fmt: skip


class CpuState(NamedTuple):
    """One of Xen's CPUs. `exists` is false for a number that is announced and has no per-CPU area."""

    cpu: int
    exists: bool
    per_cpu_offset: int
    apic_id: Read
    idt: Read  # address of its table
    nmi_gate: Read  # gate.Gate
    mc_gate: Read
    df_gate: Read
    crash_save_done: Read
    tss: int | Absent  # address of Xen's own TSS (or the page around it) for this CPU
    notes: Read  # crashnotes.CpuNotes: what its buffer of crash notes holds
    physical: PhysicalCpu | Absent


class State(NamedTuple):
    """Everything at one moment."""

    symbols: SymbolTable
    system: Mapping[str, Read]
    cpus: Mapping[int, CpuState]
    unmatched: Sequence[PhysicalCpu] = ()  # physical CPUs that no Xen CPU claims

    def of(self, cpu: int) -> CpuState:
        return self.cpus[cpu]


def read_state(memory: XenMemory, *, notes: bool = True) -> State:
    """Read the whole state. `notes` also reads the crash notes of each CPU (404 bytes per CPU).

    Raises Unreadable when not even the list of CPUs can be read.
    """
    symbols = memory.symbols
    count = cpu_count(memory)
    words = 8 * ((count + 63) // 64)
    offsets_at = symbols.address("__per_cpu_offset")
    apic_ids_at = symbols.get("x86_cpu_to_apicid", DATA)
    tables_at = symbols.get("idt_tables", DATA)
    crash_notes_at = symbols.get("crash_notes", DATA) if notes else None
    plan = [_plan(symbols, variable, words) for variable in SYSTEM]
    requests = [(p.address, p.size) for p in plan if not isinstance(p, Absent)]
    requests.append((offsets_at, 8 * count))
    for address, size in ((apic_ids_at, 4), (tables_at, 8), (crash_notes_at, 8)):
        if address is not None:
            requests.append((address, size * (count if address != crash_notes_at else 1)))
    answers = iter(memory.read_many(requests))
    system = {
        variable.field: absent(p) if isinstance(p, Absent) else _decoded(variable, p, next(answers), count)
        for variable, p in zip(SYSTEM, plan, strict=True)
    }
    offsets = next(answers)
    apic_ids = next(answers) if apic_ids_at is not None else Absent("no x86_cpu_to_apicid", Kind.NO_SYMBOL)
    tables = next(answers) if tables_at is not None else None
    crash_notes = next(answers) if crash_notes_at is not None else None
    if isinstance(offsets, Absent):
        raise Unreadable(f"__per_cpu_offset could not be read: {offsets}")

    start = symbols.address("__per_cpu_start")
    per_cpu = _words(offsets)
    existing = [cpu for cpu, offset in enumerate(per_cpu) if _has_area(start, cpu, offset)]
    idts = _idt_addresses(memory, existing, per_cpu, tables, tables_at)
    done_at = symbols.get("per_cpu__crash_save_done", DATA)
    tss_at = symbols.get("per_cpu__tss_page", DATA) or symbols.get("per_cpu__init_tss", DATA)

    requests = []
    for cpu in existing:
        if idts[cpu].present:
            requests.append((idts[cpu].value + _GATES_AT, _GATES_SIZE))
        if done_at is not None:
            requests.append(((done_at + per_cpu[cpu]) % (1 << 64), 1))
    answers = iter(memory.read_many(requests))
    note_buffers = _read_notes(memory, existing, crash_notes, count) if notes else {}

    known = memory.target.cpus()
    physical, unmatched = _match(known, existing, apic_ids, idts)
    no_cpu = Absent("no physical CPU could be matched to it")
    if memory.target.kind == "dump" and not known:  # a raw image of memory
        no_cpu = Absent("the dump holds no registers of any CPU", Kind.NOT_HELD)
    cpus = {}
    for cpu, offset in enumerate(per_cpu):
        if cpu not in idts:
            cpus[cpu] = _missing_cpu(cpu, offset, _apic_id(apic_ids, apic_ids_at, cpu))
            continue
        gates = next(answers) if idts[cpu].present else idts[cpu].value
        done: Read = absent("this Xen has no crash_save_done", Kind.NOT_APPLICABLE)
        if done_at is not None:
            raw = next(answers)
            where = (done_at + offset) % (1 << 64)
            name = "per_cpu(crash_save_done)"
            done = absent(raw) if isinstance(raw, Absent) else in_memory(_flag(raw), where, raw, name)
        cpus[cpu] = CpuState(
            cpu=cpu,
            exists=True,
            per_cpu_offset=offset,
            apic_id=_apic_id(apic_ids, apic_ids_at, cpu),
            idt=idts[cpu],
            nmi_gate=_gate(gates, idts[cpu], gate.VECTOR_NMI),
            mc_gate=_gate(gates, idts[cpu], gate.VECTOR_MC),
            df_gate=_gate(gates, idts[cpu], VECTOR_DF),
            crash_save_done=done,
            tss=Absent("no symbol names the TSS", Kind.NO_SYMBOL) if tss_at is None else (tss_at + offset) % (1 << 64),
            notes=note_buffers.get(cpu, absent("not read")),
            physical=physical.get(cpu, no_cpu),
        )
    return State(symbols, system, cpus, tuple(unmatched))


def cpu_count(memory: XenMemory) -> int:
    """nr_cpu_ids: how many CPU numbers are announced. Raises Unreadable, also for a number no Xen can have."""
    count = memory.variable("nr_cpu_ids", 4, DATA)
    if not 0 < count <= NR_CPUS_MAX:
        raise Unreadable(f"nr_cpu_ids is {count}, which no Xen has: Xen has not set it yet, or the symbols are wrong")
    return count


def per_cpu_offsets(memory: XenMemory) -> dict[int, int]:
    """The offset of each CPU's per-CPU area, for the CPUs that have one. Raises Unreadable."""
    count = cpu_count(memory)
    raw = memory.read(memory.symbols.address("__per_cpu_offset"), 8 * count)
    start = memory.symbols.address("__per_cpu_start")
    return {cpu: offset for cpu, offset in enumerate(_words(raw)) if _has_area(start, cpu, offset)}


def _words(raw: bytes) -> list[int]:
    """An array of 64-bit words."""
    return [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]


def _has_area(start: int, cpu: int, offset: int) -> bool:
    """Whether __per_cpu_offset[cpu] leads to a per-CPU area; `start` is that of the template, which CPU 0 alone uses
    (percpu_init_areas): an offset of 0 would take CPU 0's variables for another's."""
    return (start + offset) % (1 << 64) not in INVALID_PERCPU_AREAS and (offset != 0 or cpu == 0)


def per_cpu_address(memory: XenMemory, name: str, cpu: int) -> int:
    """The address of a per-CPU variable of one CPU. Raises Unreadable for an absent CPU or an unknown name."""
    plain = name.removeprefix("per_cpu__")
    address = memory.symbols.address(f"per_cpu__{plain}")
    count = cpu_count(memory)
    if not 0 <= cpu < count:
        raise Unreadable(f"CPU {cpu} does not exist: nr_cpu_ids is {count}")
    offset = memory.read_uint(memory.symbols.address("__per_cpu_offset") + 8 * cpu)
    if not _has_area(memory.symbols.address("__per_cpu_start"), cpu, offset):
        raise Unreadable(f"CPU {cpu} is announced and absent: it has no per-CPU area")
    return (address + offset) % (1 << 64)


def idt_address(memory: XenMemory, cpu: int) -> int:
    """Where one CPU's IDT lies. Raises Unreadable for a CPU without one."""
    if memory.symbols.has("idt_tables", DATA):
        count = cpu_count(memory)
        if not 0 <= cpu < count:
            raise Unreadable(f"CPU {cpu} does not exist: nr_cpu_ids is {count}")
        table = memory.read_uint(memory.symbols.address("idt_tables", DATA) + 8 * cpu)
    else:  # b7cfb45aaf and following (4.21.0)
        table = memory.read_uint(per_cpu_address(memory, "idt", cpu))
    if not table:
        raise Unreadable(f"CPU {cpu} has no IDT")
    return table


class _Plan(NamedTuple):
    address: int
    size: int
    name: str


def _plan(symbols: SymbolTable, variable: Variable, words: int) -> _Plan | Absent:
    for name in variable.names:
        try:
            address = symbols.get(name, DATA)
        except Unreadable as error:
            return error.absent
        if address is not None:
            return _Plan(address + variable.offset, variable.size or words, name)
    return Absent(f"the symbols do not name {variable.names[0]}", Kind.NO_SYMBOL)


def _decoded(variable: Variable, plan: _Plan, raw: bytes | Absent, count: int) -> Read:
    if isinstance(raw, Absent):
        return absent(raw)
    value = variable.decode(raw)
    if isinstance(value, frozenset):
        value = frozenset(cpu for cpu in value if cpu < count)
    return in_memory(value, plan.address, raw, plan.name)


def _idt_addresses(
    memory: XenMemory, existing: list[int], per_cpu: list[int], tables: bytes | Absent | None, tables_at: int | None
) -> dict[int, Read]:
    """Each existing CPU's table: idt_tables[] until 9c20d3c591 (4.21.0), per_cpu(idt) since."""
    if tables_at is not None:
        if tables is None or isinstance(tables, Absent):
            return dict.fromkeys(existing, absent(tables or "idt_tables was not read"))
        raws: list[bytes | Absent] = [tables[8 * cpu : 8 * cpu + 8] for cpu in existing]
        places = [tables_at + 8 * cpu for cpu in existing]
        name = "idt_tables"
    else:
        symbol = memory.symbols.get("per_cpu__idt", DATA)
        if symbol is None:
            reason = "the symbols name neither idt_tables nor per_cpu__idt"
            return dict.fromkeys(existing, absent(reason, Kind.NO_SYMBOL))
        places = [(symbol + per_cpu[cpu]) % (1 << 64) for cpu in existing]
        raws = memory.read_many([(place, 8) for place in places])
        name = "per_cpu(idt)"
    found = {}
    for cpu, place, raw in zip(existing, places, raws, strict=True):
        if isinstance(raw, Absent):
            found[cpu] = absent(raw)
        elif not any(raw):
            found[cpu] = absent("it has no IDT", Kind.NOT_APPLICABLE)
        else:
            found[cpu] = in_memory(int.from_bytes(raw, "little"), place, raw, name)
    return found


def _gate(gates: bytes | Absent, idt: Read, vector: int) -> Read:
    if isinstance(gates, Absent):
        return absent(gates)
    at = vector * gate.SIZE - _GATES_AT
    raw = gates[at : at + gate.SIZE]
    return in_memory(gate.decode(raw), idt.value + vector * gate.SIZE, raw, idt.symbol)


def _apic_id(apic_ids: bytes | Absent, at: int | None, cpu: int) -> Read:
    if isinstance(apic_ids, Absent) or at is None:
        return absent(apic_ids if isinstance(apic_ids, Absent) else "no x86_cpu_to_apicid")
    raw = apic_ids[4 * cpu : 4 * cpu + 4]
    value = int.from_bytes(raw, "little")
    if value == BAD_APICID:
        return absent("it has no APIC id", Kind.NOT_APPLICABLE)
    return in_memory(value, at + 4 * cpu, raw, "x86_cpu_to_apicid")


def _missing_cpu(cpu: int, offset: int, apic_id: Read) -> CpuState:
    gone = Absent("announced and absent: it has no per-CPU area", Kind.NOT_APPLICABLE)
    none = absent(gone)
    return CpuState(cpu, False, offset, apic_id, none, none, none, none, none, gone, none, gone)


def _match(
    physical: Sequence[PhysicalCpu], existing: list[int], apic_ids: bytes | Absent, idts: Mapping[int, Read]
) -> tuple[dict[int, PhysicalCpu], list[PhysicalCpu]]:
    """Physical CPUs by Xen's numbers, and those left over.

    As the source says; else by initial APIC id; else by IDTR, which names one CPU's table; the last one by elimination.
    """
    by_apic: dict[int, int] = {}
    if not isinstance(apic_ids, Absent):
        for cpu in existing:
            by_apic.setdefault(int.from_bytes(apic_ids[4 * cpu : 4 * cpu + 4], "little"), cpu)
    by_idt = {idt.value: cpu for cpu, idt in idts.items() if idt.present}
    matched: dict[int, PhysicalCpu] = {}
    left = []
    for candidate in physical:
        number = candidate.xen_cpu
        if number is None and isinstance(candidate.apic_id, int):
            number = by_apic.get(candidate.apic_id)
        elif number is None and not isinstance(candidate.idtr, Absent):
            number = by_idt.get(candidate.idtr[0])
        if number is None or number in matched:
            left.append(candidate)
        elif number in idts:
            matched[number] = candidate
        elif candidate.registers:  # an absent CPU's notes are there, and empty
            left.append(candidate)
    unclaimed = [cpu for cpu in existing if cpu not in matched]
    if len(unclaimed) == len(left) == 1 and left[0].xen_cpu is None and len(physical) == len(existing):
        matched[unclaimed[0]] = left.pop()
    return matched, left


def _read_notes(memory: XenMemory, existing: list[int], pointer: bytes | Absent | None, count: int) -> dict[int, Read]:
    """Each CPU's buffer of crash notes, through `crash_notes`: an array of {start, size} (xen/common/kexec.c)."""
    if pointer is None:
        return dict.fromkeys(existing, absent("the symbols do not name crash_notes", Kind.NO_SYMBOL))
    if isinstance(pointer, Absent):
        return dict.fromkeys(existing, absent(pointer))
    array = int.from_bytes(pointer, "little")
    if not array:
        return dict.fromkeys(existing, absent("no crashkernel memory was reserved: Xen has no crash notes"))
    try:
        entries = memory.read(array, 16 * count)
    except Unreadable as error:
        return dict.fromkeys(existing, absent(error.absent))
    starts = {cpu: int.from_bytes(entries[16 * cpu : 16 * cpu + 8], "little") for cpu in existing}
    raws = memory.read_many([(starts[cpu], crashnotes.size_of(cpu)) for cpu in existing])
    found = {}
    for cpu, raw in zip(existing, raws, strict=True):
        if not starts[cpu]:
            found[cpu] = absent("it has no buffer for crash notes", Kind.NOT_APPLICABLE)
        elif isinstance(raw, Absent):
            found[cpu] = absent(raw)
        else:
            found[cpu] = in_memory(crashnotes.parse(raw), starts[cpu], raw, "crash_notes")
    return found
