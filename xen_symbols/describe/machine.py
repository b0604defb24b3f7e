"""A target, its symbols and its CPUs as the JSON contract gives them. Unknown values are null, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, cast

from xen_symbols.absence import Absent
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import Lapic
from xen_symbols.x86 import apic
from xen_symbols.x86.gate import Gate
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import CpuState, State

if TYPE_CHECKING:
    from xen_symbols.report import contract


def describe_target(memory: XenMemory) -> contract.Target:
    """Where Xen was found."""
    target = memory.target
    out: contract.Target = {
        "kind": target.kind,
        "format": target.format,
        "location": target.location,
        "accelerator": None,
        "xen_phys_start": hex(memory.xen_phys_start),
        "found_by": memory.found_by,
    }
    out = with_warnings(out, [target.truncated] if target.truncated else [])
    if isinstance(target.accelerator, Absent):
        return {**out, "accelerator_absent": target.accelerator.reason}
    return {**out, "accelerator": target.accelerator}


def with_warnings(described: contract.Target, warnings: Sequence[str]) -> contract.Target:
    """The same target, with what else is wrong with the dump itself."""
    return {**described, "warnings": [*described.get("warnings", []), *warnings]} if warnings else described


def describe_symbols(memory: XenMemory) -> contract.Symbols:
    """The symbols, and whether they are of the build that is in memory."""
    symbols: SymbolTable = memory.symbols
    theirs = memory.build_id
    own = symbols.build_id
    match = None if own is None or isinstance(theirs, Absent) else own == theirs
    described: contract.Symbols = {
        "path": symbols.path,
        "source": symbols.source,
        "build_id": own.hex() if own else None,
        "target_build_id": None if isinstance(theirs, Absent) else theirs.hex(),
        "match": match,
    }
    return {**described, "aliases": dict(symbols.aliases)} if symbols.aliases else described


def describe_generation(
    id: str, introduced: str, releases: str, evidence: Iterable[str], given: bool = False
) -> contract.Generation:
    """A generation of the crash path: the commit that brought it, the releases that have it, the evidence for it."""
    described: contract.Generation = {
        "id": id, "introduced": introduced, "releases": releases, "evidence": list(evidence)
    }  # fmt: skip
    return {**described, "given": True} if given else described


def describe_near(
    id: str, introduced: str, releases: str, holds: int, differs: Sequence[str]
) -> contract.NearGeneration:
    """A generation that does not fit: how many of the statements about it hold, and which do not."""
    return {"id": id, "introduced": introduced, "releases": releases, "holds": holds, "differs": list(differs)}


def describe_gate(symbols: SymbolTable, gate: Gate) -> contract.Gate:
    """A gate, with its handler's name."""
    return {
        "handler": {"address": hex(gate.handler), "symbol": symbols.describe(gate.handler)},
        "selector": hex(gate.selector),
        "type": gate.type,
        "dpl": gate.dpl,
        "present": gate.present,
        "ist": gate.ist,
        "raw": gate.raw.hex(),
    }


def describe_place(symbols: SymbolTable, pc: int) -> contract.Place:
    """Where a CPU is in Xen's text."""
    return {"symbol": symbols.describe(pc), "pc": hex(pc)}


_NO_REGISTERS = Absent("no registers")


def describe_cpus(
    state: State, cpus: Iterable[int], crashing: int | None, online: Container[int]
) -> list[contract.Cpu]:
    """Each of these CPUs; `online` are those that were when the crash began."""
    # Thousands of CPUs have the same few gates, and are in the same few places.
    gates, places = cache(partial(describe_gate, state.symbols)), cache(partial(describe_place, state.symbols))
    roles = {cpu: "crashing" if cpu == crashing else "other" if cpu in online else "offline" for cpu in cpus}
    return [_describe_cpu(state.of(cpu), role, gates, places) for cpu, role in roles.items()]


def _describe_cpu(
    cpu: CpuState, role: str, gates: Callable[[Gate], contract.Gate], places: Callable[[int], contract.Place]
) -> contract.Cpu:
    physical = cpu.physical
    lapic = physical if isinstance(physical, Absent) else physical.lapic
    pc = None if isinstance(physical, Absent) else physical.registers.get("rip")
    described = _with_reasons(
        {
            "cpu": cpu.cpu,
            "role": role,
            "nmi_gate": gates(cpu.nmi_gate.value) if cpu.nmi_gate.present else cpu.nmi_gate.value,
            "mc_gate": gates(cpu.mc_gate.value) if cpu.mc_gate.present else cpu.mc_gate.value,
            "apic_id": cpu.apic_id.value,
            "crash_save_done": cpu.crash_save_done.value,
            **{
                name: physical if isinstance(physical, Absent) else getattr(physical, name)
                for name in ("halted", "nmi_blocked", "nmi_pending", "guest_mode")
            },
            "lapic": lapic if isinstance(lapic, Absent) else _describe_lapic(lapic),
            "at": physical if isinstance(physical, Absent) else places(pc) if pc is not None else _NO_REGISTERS,
        }
    )
    return cast("contract.Cpu", described)


def _with_reasons(values: contract.Json) -> contract.Json:
    """The values as JSON: an Absent is null, and its reason stands in `absent`."""
    reasons = {name: value.reason for name, value in values.items() if isinstance(value, Absent)}
    return {**values, **dict.fromkeys(reasons), "absent": reasons} if reasons else values


def _describe_lapic(lapic: Lapic) -> contract.Lapic:
    base = lapic.apic_base
    registers = {name: getattr(lapic, name) for name in ("apic_base", "spiv", "icr_low", "icr_high")}
    described = _with_reasons(
        {
            "mode": base if isinstance(base, Absent) else apic.mode(base).value,
            "source": lapic.source,
            **{name: value if isinstance(value, Absent) else hex(value) for name, value in registers.items()},
        }
    )
    return cast("contract.Lapic", described)
