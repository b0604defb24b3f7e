"""Where on its crash path a Xen is, inferred from its state alone: for a dump, or a machine that was not followed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from xen_symbols.absence import Absent, Kind, Undecidable, Unreadable
from xen_symbols.crashpath.generations import Generation
from xen_symbols.crashpath.stages import (
    ANYWHERE,
    BY_ID,
    CRASHED,
    CRASHING,
    NORMAL,
    STAGES,
    UNBLOCKED,
    CrashStep,
    OtherStep,
    Position,
    Role,
    Span,
    Stage,
)
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import TEXT, SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.xen.memory import IMAGE_REGION, image_region
from xen_symbols.xen.state import State

_RUNNING = Span(OtherStep.NOTHING, OtherStep.NOTHING)
_SHOT = Span(OtherStep.SIGNED_OFF, OtherStep.PARKED)
_PARKED = Span(OtherStep.PARKED, OtherStep.PARKED)

# Functions that only the crashing CPU runs: the anchors of its stages, but for those that another CPU reaches, too. One
# that comes too late to crash stays behind in kexec_crash (one_cpu_only).
_SHARED = {"kexec_crash", *(name for stage in STAGES if stage.role is Role.OTHER for name in stage.anchors)}
# Another CPU is in one of these until it has stopped (xen/arch/x86/smp.c, apic.c).
STOPPING = {"__stop_this_cpu", "disable_local_APIC", "clear_local_APIC"}
ONLY_CRASHING = {name for stage in STAGES if stage.role is Role.CRASHING for name in stage.anchors} - _SHARED


def anchor_address(symbols: SymbolTable, stage: Stage) -> int | None:
    """Where a stage begins in this build; None if no symbol of its names is there."""
    for name in stage.anchors:
        try:
            address = symbols.get(name, TEXT)
        except Unreadable:
            continue
        if address is not None:
            return address
    return None


def at_stage(
    stage: Stage, subject: int, crashing_cpu: int | None, online: frozenset[int], seen: dict[int, Span] | None = None
) -> Position:
    """The position at a stage that `subject` has just reached. `seen` holds what a trace knows of the other CPUs."""
    others = dict.fromkeys(online - {crashing_cpu}, _RUNNING)
    if stage.role is Role.CRASHING:
        # Within a step nothing more is judged than before it: that is done at its end, a few instructions later.
        crash = Span(stage.crash_step, stage.crash_step + (stage is UNBLOCKED))
        if stage.crash_step >= CrashStep.WAITED:
            others = dict.fromkeys(others, _SHOT)
    else:
        crash = Span(stage.crash_step, stage.crash_step + 1)
        others = dict.fromkeys(others, ANYWHERE) | (seen or {})
        assert stage.other_step is not None
        others[subject] = Span(stage.other_step, stage.other_step)
    return Position(stage, subject, crashing_cpu, crash, others, online)


def once_left(stage: Stage, crashing_cpu: int, online: frozenset[int], parked: Container[int] = ()) -> Position:
    """The position once the crash kernel runs. `parked`: the other CPUs that were seen in the halt loop before."""
    others = {cpu: _PARKED if cpu in parked else _SHOT for cpu in online - {crashing_cpu}}
    return Position(stage, None, crashing_cpu, Span(CrashStep.LEFT, CrashStep.LEFT), others, online)


class Vote(NamedTuple):
    """One piece of evidence for which CPU crashed."""

    says: str
    cpu: int


def votes(state: State, generation: Generation | None) -> list[Vote]:
    """Each piece of evidence that names a CPU as the crashing one, as far as the generation, if known, makes it one."""
    found = []
    owner = state.system["crash_owner"]
    if owner.present and owner.value in state.cpus:
        found.append(Vote("kexec.c's crashing_cpu", owner.value))
    saved = state.system["saved"]
    if saved.present and generation is not None and generation.has_save_done:
        without = [
            cpu for cpu in saved.value
            if cpu in state.cpus and state.of(cpu).crash_save_done.present and not state.of(cpu).crash_save_done.value
        ]  # fmt: skip
        if len(without) == 1:
            found.append(Vote("notes saved without crash_save_done", without[0]))
        trap_nop = state.symbols.get("trap_nop", TEXT)
        if generation.own_nmi_gate and trap_nop is not None:
            own = [
                cpu for cpu in saved.value
                if cpu in state.cpus and state.of(cpu).nmi_gate.present
                and state.of(cpu).nmi_gate.value.handler == trap_nop
            ]  # fmt: skip
            if len(own) == 1:
                found.append(Vote("the only NMI gate of an online CPU with trap_nop", own[0]))
    for number, known in state.cpus.items():
        function = function_of(state.symbols, known.physical)
        if function in ONLY_CRASHING:
            found.append(Vote(f"its RIP, in {function}", number))
    if saved.present and len(saved.value) == 1:
        found.append(Vote("the only notes saved", *saved.value))
    return found


def crashing_cpu(state: State, generation: Generation | None) -> tuple[int, tuple[str, ...]]:
    """The crashing CPU and the evidence for it. Raises Undecidable without evidence, or when it is divided."""
    found = votes(state, generation)
    if not found:
        raise Undecidable("which CPU crashed could not be determined: neither memory nor registers name exactly one")
    (cpu, most), *rest = Counter(vote.cpu for vote in found).most_common()
    if rest and rest[0][1] == most:
        listed = ", ".join(f"{vote.says}: CPU {vote.cpu}" for vote in found)
        raise Undecidable(f"the evidence for which CPU crashed is contradictory: {listed}")
    return cpu, tuple(vote.says for vote in found if vote.cpu == cpu)


def online_at_crash(state: State, generation: Generation | None, crashing: int | None) -> frozenset[int]:
    """Every CPU that was online when the crash began: cpu_online_map is emptied on the way."""
    found = set() if crashing is None else {crashing}
    for name in ("online", "saved", "waiting_mask"):
        read = state.system[name]
        if read.present:
            found |= read.value
    for number, known in state.cpus.items():
        save_done = known.crash_save_done.present and known.crash_save_done.value
        shot = generation is not None and (
            function_of(state.symbols, known.physical) == generation.parks_in
            or (generation.frees_offline_cpus and known.nmi_gate.present)
        )
        if save_done or shot:
            found.add(number)
    return frozenset(found & set(state.cpus))


def infer(state: State, generation: Generation | None, crashing: int | None = None) -> Position:
    """Where this machine or dump is, on an unknown path roughly. `crashing`: the CPU that crashes, if that is known.

    Raises Undecidable when its state does not say.
    """
    kexecing = state.system["kexecing"]
    if isinstance(kexecing.value, Absent):
        raise Undecidable(f"whether Xen has begun to crash could not be read: {kexecing.value}")
    saved = state.system["saved"]
    if not kexecing.value and not (saved.present and saved.value):
        online = online_at_crash(state, generation, None)
        stage = _stage_of_any(state)
        if stage is not None:
            return at_stage(*stage, crashing_cpu=None, online=online)
        nothing = Span(CrashStep.NOTHING, CrashStep.NOTHING)
        return Position(NORMAL, None, None, nothing, dict.fromkeys(online, _RUNNING), online)

    try:
        cpu = crashing_cpu(state, generation)[0] if crashing is None else crashing
    except Undecidable:
        if generation is not None:
            raise
        return _somewhere(state)
    online = online_at_crash(state, generation, cpu)
    physical = state.of(cpu).physical
    if not isinstance(physical, Absent):
        stage_here = _stage_at(state.symbols, physical, Role.CRASHING)
        if stage_here is not None:
            return at_stage(stage_here, cpu, cpu, online)
    if handed_over(state, physical):
        return once_left(CRASHED, cpu, online)
    others = {number: _by_registers(state.symbols, generation, state.of(number).physical) for number in online - {cpu}}
    other = _stage_of_any(state)
    if other is not None and other[1] != cpu:
        position = at_stage(*other, crashing_cpu=cpu, online=online, seen=others)
        return Position(position.stage, other[1], cpu, Span(CrashStep.NOTHING, CrashStep.NEUTRALISED),
                        position.others, online)  # fmt: skip
    if is_memory_alone(state) and _neutralised(state, generation):
        done = Span(CrashStep.NEUTRALISED, CrashStep.NEUTRALISED)
        return Position(BY_ID["handover"], None, cpu, done, dict.fromkeys(online - {cpu}, _SHOT), online)
    anywhere = Span(CrashStep.NOTHING, CrashStep.NEUTRALISED)
    return Position(CRASHING, None, cpu, anywhere, others, online)


def _somewhere(state: State) -> Position:
    """On an unknown path that does not show which CPU crashed."""
    online = online_at_crash(state, None, None)
    stage = CRASHED if state.by_crash_kernel else CRASHING
    return Position(stage, None, None, Span(CrashStep.NOTHING, CrashStep.LEFT), dict.fromkeys(online, ANYWHERE), online)


def _by_registers(symbols: SymbolTable, generation: Generation | None, physical: PhysicalCpu | Absent) -> Span:
    """Where another CPU is on a path that was not followed: all is done by one that has halted in the handler."""
    function = function_of(symbols, physical)
    if function in STOPPING:
        return Span(OtherStep.NOTES_SAVED, OtherStep.STOPPED)
    halted = not isinstance(physical, Absent) and physical.halted is True
    return _PARKED if halted and generation is not None and function == generation.parks_in else ANYWHERE


def is_memory_alone(state: State) -> bool:
    """Whether this is an image of memory without any CPU's registers."""
    if state.by_crash_kernel:
        return False
    physical = [cpu.physical for cpu in state.cpus.values() if cpu.exists]
    return all(one.kind is Kind.NOT_HELD if isinstance(one, Absent) else one.of_memory for one in physical)


def _neutralised(state: State, generation: Generation | None) -> bool:
    """Whether memory shows the crashing CPU's last write: no #MC gate is left with its handler (77ad1faa6b)."""
    if generation is None or not generation.swaps_mc:
        return False
    trap_nop = state.symbols.get("trap_nop", TEXT)
    gates = [cpu.mc_gate for cpu in state.cpus.values() if cpu.mc_gate.present]
    return bool(gates) and all(read.value.handler == trap_nop for read in gates)


def handed_over(state: State, crashing: PhysicalCpu | Absent) -> bool:
    """Whether Xen has handed the machine over: its CPU runs outside Xen, or the dump is the kernel's."""
    if state.by_crash_kernel:
        return True  # booted after the jump
    if isinstance(crashing, Absent) or crashing.of_memory:
        return False
    if not crashing.current:
        return True
    rip = crashing.registers.get("rip")
    if rip is None:
        return False
    region = image_region(state.symbols.address("idle_pg_table"))
    return not region <= rip < region + IMAGE_REGION


def function_of(symbols: SymbolTable, physical: PhysicalCpu | Absent) -> str | None:
    """The function of Xen's that a CPU is in; None for one that is elsewhere, or whose registers are not known."""
    rip = None if isinstance(physical, Absent) or not physical.current else physical.registers.get("rip")
    found = None if rip is None else symbols.lookup(rip)
    return found[0].name if found else None


def _stage_at(symbols: SymbolTable, physical: PhysicalCpu, role: Role) -> Stage | None:
    if not physical.current:
        return None
    rip = physical.registers.get("rip")
    return next((s for s in STAGES if s.role is role and rip is not None and anchor_address(symbols, s) == rip), None)


def _stage_of_any(state: State) -> tuple[Stage, int] | None:
    for cpu, known in state.cpus.items():
        if isinstance(known.physical, Absent):
            continue
        for stage in STAGES:
            if stage.id == "crash-entry" or stage.role is Role.OTHER:
                found = _stage_at(state.symbols, known.physical, stage.role)
                if found is stage:
                    return stage, cpu
    return None
