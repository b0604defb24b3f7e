"""What is the same in all experiments of a run: which Xen crashes, on which CPU, and the places that matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.engine import judge
from xen_symbols.crashpath.identification import Identification, identify
from xen_symbols.crashpath.position import anchor_address, infer
from xen_symbols.crashpath.stages import BY_ID
from xen_symbols.report.model import Finding, Verdict
from xen_symbols.symbols.table import TEXT, SymbolTable
from xen_symbols.targets import Target
from xen_symbols.x86 import gate
from xen_symbols.xen.idt import idt_address
from xen_symbols.xen.locate import locate
from xen_symbols.xen.memory import IMAGE_REGION, XenMemory, image_region
from xen_symbols.xen.state import read_state
from xencrash.lab.errors import LabError

# Reaching one of these ends the crash: Xen gives up, or starts again.
_ENDS = {"panic": "Xen panics", "machine_restart": "Xen restarts the machine", "__start_xen": "Xen boots again"}
_NOTE_SIZE = 404  # xen/common/kexec.c: the notes of registers, of each CPU


@dataclass
class Scene:
    """CPUs are QEMU's here, which are Xen's: the lab's machines number them alike."""

    symbols: SymbolTable
    memory_root: int
    found_by: str
    build_id: bytes | Absent
    identification: Identification
    crashing: int
    apic_ids: tuple[int, ...]
    begins: int  # kexec_crash
    send: int  # smp_send_nmi_allbutself
    handover: int  # kexec_reloc
    ends: Mapping[int, str]
    own_handlers: Mapping[str, int]  # Xen's own handlers of NMIs and machine checks, by the name of the event
    notes: Mapping[int, int]  # address of each CPU's
    kernel_sign: bytes | None  # what the crash kernel prints when it starts; None: see kernel_at
    # From the recording:
    sent: int = 0  # where smp_send_nmi_allbutself returns to: the other CPUs have something to do
    parks: dict[int, int] = field(default_factory=dict)  # the instruction at which each halts for good
    waiting: frozenset[int] = frozenset()  # of the crashing CPU, while it waits for others
    kernel_at: int | None = None  # an instruction of the crash image

    @property
    def cpus(self) -> int:
        return len(self.apic_ids)

    @property
    def others(self) -> list[int]:
        return [cpu for cpu in range(self.cpus) if cpu != self.crashing]

    def memory(self, target: Target) -> XenMemory:
        memory = XenMemory(target, self.symbols, self.memory_root, self.found_by)
        memory.build_id = self.build_id
        return memory

    def failures(self, target: Target) -> tuple[Finding, ...]:
        """What the checks find wrong now, with the CPU that crashes known: late in old crash paths nothing names it."""
        memory, generation = self.memory(target), self.identification.generation
        try:
            state = read_state(memory)
            position = infer(state, generation, self.crashing)
        except (Undecidable, Unreadable) as error:
            return (Finding("judged", "handover", None, Verdict.FAIL, None, None, "", reason=str(error)),)
        findings = judge(Context(memory, state, position, generation))
        return tuple(finding for finding in findings if finding.verdict is Verdict.FAIL)

    def is_xen(self, pc: int) -> bool:
        region = image_region(self.handover)
        return region <= pc < region + IMAGE_REGION

    def note_size(self) -> int:
        return _NOTE_SIZE


def set_scene(target: Target, symbols: SymbolTable, crashing: int, kernel_sign: bytes | None) -> Scene:
    """From a machine at the beginning of its crash. Raises LabError if a storm cannot use it."""
    try:
        memory = locate(target, symbols)
        identification = identify(memory)
        notes = memory.variable("crash_notes")
        cpus = range(len(target.cpus()))
        apic_ids = [memory.read_uint(memory.symbols.address("x86_cpu_to_apicid") + 4 * cpu, 4) for cpu in cpus]
        idts = [idt_address(memory, cpu) for cpu in cpus]
        own = [gate.decode(memory.read(idts[0] + gate.SIZE * vector, gate.SIZE)).handler for vector in (2, 18)]
        found = {cpu: memory.read_uint(notes + 16 * cpu) for cpu in cpus}
    except (Unreadable, Undecidable) as error:
        raise LabError(f"storm: {error}") from error
    if apic_ids != [cpu.apic_id for cpu in target.cpus()]:
        raise LabError(f"storm: Xen's CPUs are not in QEMU's order: their APIC IDs are {apic_ids}")
    places = {stage: anchor_address(symbols, BY_ID[stage]) for stage in ("crash-entry", "shootdown", "handover")}
    begins, send, handover = places.values()
    if begins is None or send is None or handover is None:
        missing = ", ".join(BY_ID[stage].anchors[0] for stage, address in places.items() if address is None)
        raise LabError(f"storm: this Xen has no {missing}")
    ends = {address: says for name, says in _ENDS.items() if (address := symbols.get(name, TEXT)) is not None}
    return Scene(
        symbols, memory.root, memory.found_by, memory.build_id, identification, crashing, tuple(apic_ids), begins, send,
        handover, ends, dict(zip(("nmi", "mc"), own, strict=True)), found, kernel_sign,
    )  # fmt: skip
