"""The state of the crash path at one moment: every variable, gate and CPU that it touches, with its evidence.

Nothing is judged here. What could not be read is Absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86 import gate
from xen_symbols.xen import crashnotes, idt, savedcpus
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.percpu import PerCpuAreas, areas_of, ask_areas, cpu_count
from xen_symbols.xen.reads import Asked, Batch, Read, absent, flag, mask, signed, unsigned

_NOTES_OF_XEN = ("Xen", "VMCOREINFO_XEN")
BAD_APICID = 0xFFFFFFFF  # xen/include/asm-x86/apicdef.h; a free slot of x86_cpu_to_apicid[]
_GONE = Absent("possible but not present: it has no per-CPU area", Kind.NOT_APPLICABLE)


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


SYSTEM = (
    Variable("kexecing", ("kexecing",), 1, flag, source="xen/common/kexec.c"),
    Variable("kexec_flags", ("kexec_flags",), 8, unsigned, source="xen/common/kexec.c"),
    Variable("crash_owner", ("kexec.c#crashing_cpu",), 4, signed, source="470f58c159 (4.2.4, 4.3.2, 4.4.0)"),
    Variable("saved", ("crash_saved_cpus",), 0, mask, source="xen/common/kexec.c"),
    Variable("online", ("cpu_online_map",), 0, mask, source="xen/arch/x86/smpboot.c"),
    Variable("waiting_mask", ("waiting_to_crash",), 0, mask, source="f12c1f0b09 (4.3.2, 4.4.0)"),
    Variable("waiting_count", ("waiting_for_crash_ipi",), 4, signed, source="before f12c1f0b09"),
    Variable("exception_table_nmi", ("exception_table",), 8, unsigned, offset=8 * gate.VECTOR_NMI,
             source="removed by 327db3837a (4.17.0)"),
    Variable("nmi_callback", ("traps.c#nmi_callback", "nmi_callback"), 8, unsigned, source="xen/arch/x86/traps.c"),
    Variable("x2apic_enabled", ("x2apic_enabled",), 1, flag, source="xen/arch/x86/apic.c"),
    Variable("apic_boot_mode", ("apic_boot_mode",), 4, unsigned, source="xen/arch/x86/apic.c"),
    Variable("fred", ("opt_fred",), 1, signed, source="bbfb30f649 (4.22.0)"),
)  # fmt: skip


class CpuState(NamedTuple):
    """One of Xen's CPUs. `exists` is false for a possible CPU that is not present: it has no per-CPU area."""

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
    # What the dump's own notes hold of it; `physical` is Xen's memory's where they hold none.
    pair: PhysicalCpu | Absent = Absent("the dump has no notes of Xen's CPUs", Kind.NOT_HELD)


class State(NamedTuple):
    """Everything at one moment."""

    symbols: SymbolTable
    system: Mapping[str, Read]
    cpus: Mapping[int, CpuState]
    unmatched: Sequence[PhysicalCpu] = ()  # physical CPUs that no Xen CPU claims
    warnings: Sequence[str] = ()  # what is wrong with the dump's own notes of CPUs
    by_crash_kernel: bool = False  # a dump with Xen's notes, which the crash kernel alone has

    def of(self, cpu: int) -> CpuState:
        """The state of one of Xen's CPUs, by its number."""
        return self.cpus[cpu]


def read_state(memory: XenMemory, *, notes: bool = True) -> State:
    """Read the whole state, in three batches: what symbols lead to, what that leads to, and the gates and notes.

    `notes` also reads the crash notes of each CPU (404 bytes per CPU), as is always done of a dump. Raises Unreadable
    when not even the list of CPUs can be read.
    """
    symbols, count, batch = memory.symbols, cpu_count(memory), Batch(memory)
    notes = notes or memory.target.kind == "dump"
    variables = [(variable, *_ask_variable(batch, symbols, variable, count)) for variable in SYSTEM]
    offsets = ask_areas(batch, symbols, count)
    apic_ids = batch.ask(_data(symbols, "x86_cpu_to_apicid"), 4 * count)
    note_array = crashnotes.ask_array(batch, symbols) if notes else batch.ask(Absent("not read"), 0)
    batch.read()

    system = {variable.field: _variable(variable, name, asked, count) for variable, name, asked in variables}
    areas = areas_of(symbols, offsets)
    pointers = idt.ask_pointers(batch, symbols, areas)
    done = _ask_save_done(batch, symbols, areas)
    note_buffers = crashnotes.ask_buffers(batch, note_array, count)
    batch.read()

    tables = {cpu: pointers(cpu) for cpu in areas.existing}
    gates = {cpu: idt.ask_gates(batch, table) for cpu, table in tables.items()}
    buffers = {cpu: crashnotes.ask_notes(batch, note_buffers, cpu) for cpu in areas.existing}
    batch.read()

    ids = [_apic_id(apic_ids, cpu) for cpu in range(count)]
    idts = {cpu: idt.table_of(table) for cpu, table in tables.items()}
    saved = {cpu: crashnotes.notes_of(buffers[cpu]) for cpu in tables}
    tss = _tss(symbols)
    tss_of = {cpu: tss if isinstance(tss, Absent) else areas.address(tss, cpu) for cpu in tables}
    known = _known_cpus(memory, ids, idts, saved, tss_of, count)
    cpus = {}
    for cpu, offset in enumerate(areas.offsets):
        if cpu not in tables:
            cpus[cpu] = _missing_cpu(cpu, offset, ids[cpu])
            continue
        cpus[cpu] = CpuState(
            cpu=cpu,
            exists=True,
            per_cpu_offset=offset,
            apic_id=ids[cpu],
            idt=idts[cpu],
            nmi_gate=idt.gate_of(gates[cpu], tables[cpu], gate.VECTOR_NMI),
            mc_gate=idt.gate_of(gates[cpu], tables[cpu], gate.VECTOR_MC),
            df_gate=idt.gate_of(gates[cpu], tables[cpu], gate.VECTOR_DF),
            crash_save_done=done[cpu].read(flag, "per_cpu(crash_save_done)"),
            tss=tss_of[cpu],
            notes=saved[cpu],
            physical=known.physical[cpu],
            pair=known.pairs[cpu],
        )
    by_crash_kernel = any(note.name in _NOTES_OF_XEN for note in memory.target.notes())
    return State(symbols, system, cpus, tuple(known.unmatched), known.warnings, by_crash_kernel)


# -- variables --------------------------------------------------------------------------------


def _data(symbols: SymbolTable, name: str) -> int | Absent:
    address = symbols.get(name, DATA)
    return Absent(f"no {name}", Kind.NO_SYMBOL) if address is None else address


def _ask_variable(batch: Batch, symbols: SymbolTable, variable: Variable, count: int) -> tuple[str, Asked]:
    """(the name that it has in this build, its read)."""
    name, address = _find(symbols, variable)
    at = address if isinstance(address, Absent) else address + variable.offset
    return name, batch.ask(at, variable.size or 8 * ((count + 63) // 64))


def _find(symbols: SymbolTable, variable: Variable) -> tuple[str, int | Absent]:
    for name in variable.names:
        try:
            address = symbols.get(name, DATA)
        except Unreadable as error:
            return name, error.absent
        if address is not None:
            return name, address
    return variable.names[0], Absent(f"the symbols do not name {variable.names[0]}", Kind.NO_SYMBOL)


def _variable(variable: Variable, name: str, asked: Asked, count: int) -> Read:
    read = asked.read(variable.decode, name)
    if isinstance(read.value, frozenset):
        return read._replace(value=frozenset(cpu for cpu in read.value if cpu < count))
    return read


# -- CPUs -------------------------------------------------------------------------------------


def _ask_save_done(batch: Batch, symbols: SymbolTable, areas: PerCpuAreas) -> dict[int, Asked]:
    variable = symbols.get("per_cpu__crash_save_done", DATA)
    none = Absent("this Xen has no crash_save_done", Kind.NOT_APPLICABLE)
    return {cpu: batch.ask(none if variable is None else areas.address(variable, cpu), 1) for cpu in areas.existing}


def _tss(symbols: SymbolTable) -> int | Absent:
    """Of the template."""
    found = symbols.get("per_cpu__tss_page", DATA) or symbols.get("per_cpu__init_tss", DATA)
    return Absent("no symbol names the TSS", Kind.NO_SYMBOL) if found is None else found


def _apic_id(apic_ids: Asked, cpu: int) -> Read:
    read = apic_ids.part(4 * cpu, 4).read(unsigned, "x86_cpu_to_apicid")
    return absent("it has no APIC ID", Kind.NOT_APPLICABLE) if read.value == BAD_APICID else read


def _missing_cpu(cpu: int, offset: int, apic_id: Read) -> CpuState:
    none = absent(_GONE)
    return CpuState(cpu, False, offset, apic_id, none, none, none, none, none, _GONE, none, _GONE, _GONE)


class _Known(NamedTuple):
    """What the target and memory know of each of Xen's CPUs."""

    physical: Mapping[int, PhysicalCpu | Absent]
    pairs: Mapping[int, PhysicalCpu | Absent]
    unmatched: Sequence[PhysicalCpu] = ()
    warnings: Sequence[str] = ()


def _known_cpus(
    memory: XenMemory, ids: Sequence[Read], idts: Mapping[int, Read], notes: Mapping[int, Read],
    tss_of: Mapping[int, int | Absent], possible: int,
) -> _Known:  # fmt: skip
    target = memory.target
    physical = target.cpus()
    if target.kind == "live" or any(one.current for one in physical):
        matched, left = _match(physical, ids, idts)
        none = Absent("no physical CPU could be matched to it")
        found: dict[int, PhysicalCpu | Absent] = {cpu: matched.get(cpu, none) for cpu in idts}
        return _Known(found, found, left)
    of_xen = any(note.name in _NOTES_OF_XEN for note in target.notes())
    if not physical and target.truncated:  # whose notes they were is not known
        lost = Absent(f"the dump holds no registers of any CPU: {target.truncated}")
        return _Known(dict.fromkeys(idts, lost), dict.fromkeys(idts, lost))
    saved = savedcpus.saved_in(notes)
    if not of_xen:  # a raw image of memory
        none = Absent("the dump holds no registers of any CPU", Kind.NOT_HELD)
        return _Known({cpu: _saved(cpu, saved, none) for cpu in idts}, dict.fromkeys(idts, none))
    pairs = savedcpus.match(
        physical, list(idts), possible, saved, savedcpus.StackOwners(memory, tss_of), target.truncated
    )
    found = {cpu: _saved(cpu, saved, pair) for cpu, pair in pairs.of.items()}
    return _Known(found, pairs.of, pairs.left, pairs.warnings)


def _saved(cpu: int, saved: Mapping[int, Mapping[str, int]], pair: PhysicalCpu | Absent) -> PhysicalCpu | Absent:
    """By its own pair, or else by what it saved in Xen's memory."""
    if not isinstance(pair, Absent) and pair.registers:
        return pair
    if saved.get(cpu):
        return savedcpus.from_memory(cpu, saved[cpu])
    return Absent(f"no registers saved: {pair}", pair.kind) if pair == savedcpus.NO_PAIR else pair


def _match(
    physical: Sequence[PhysicalCpu], apic_ids: Sequence[Read], idts: Mapping[int, Read]
) -> tuple[dict[int, PhysicalCpu], list[PhysicalCpu]]:
    """Physical CPUs by Xen's numbers, and those left over.

    By initial APIC id; else by IDTR, which names one CPU's table; the last one by elimination.
    """
    by_apic: dict[int, int] = {}
    for cpu in idts:
        if apic_ids[cpu].present:
            by_apic.setdefault(apic_ids[cpu].value, cpu)
    by_idt = {idt.value: cpu for cpu, idt in idts.items() if idt.present}
    matched: dict[int, PhysicalCpu] = {}
    left = []
    for candidate in physical:
        number = None
        if isinstance(candidate.apic_id, int):
            number = by_apic.get(candidate.apic_id)
        elif not isinstance(candidate.idtr, Absent):
            number = by_idt.get(candidate.idtr[0])
        if number is None or number in matched:
            left.append(candidate)
        else:
            matched[number] = candidate
    unclaimed = [cpu for cpu in idts if cpu not in matched]
    if len(unclaimed) == len(left) == 1 and len(physical) == len(idts):
        matched[unclaimed[0]] = left.pop()
    return matched, left


def owed_by_online(state: State, online: frozenset[int]) -> State:
    """The state, where what a CPU that was online must have and has not is unread: a CPU that was not may be without
    an IDT, a buffer of notes, or a per-CPU area; of one that was, something is lost."""
    changed = {}
    for number in online:
        cpu = state.cpus[number]
        if cpu.exists and cpu.idt.present and cpu.notes.present:
            continue
        owed: tuple[str, ...] = ("idt", "nmi_gate", "mc_gate", "df_gate", "notes")
        if not cpu.exists:
            owed += ("crash_save_done", "tss", "physical", "pair")
        changed[number] = cpu._replace(**{name: _owed(getattr(cpu, name)) for name in owed})
    return state._replace(cpus={**state.cpus, **changed}) if changed else state


def _owed(value: Any) -> Any:
    """A Read or what it holds; where that does not apply, it is unread."""
    inside = value.value if isinstance(value, Read) else value
    if not isinstance(inside, Absent) or inside.kind is not Kind.NOT_APPLICABLE:
        return value
    unread = Absent(f"{inside.reason}, although it was online")
    return absent(unread) if isinstance(value, Read) else unread
