"""The JSON contract as types: what schema.json says, field by field; a test holds the two together.

Types alone: modules import this for type checking only, as making the classes would take longer than judging a dump's
CPUs.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Json = dict[str, Any]  # what the contract says no more of

VerdictWord = Literal["pass", "skip", "unknown", "fail"]
Address = str  # 0x and lower-case hex digits
Hex = str  # bytes, two digits each


class Tool(TypedDict):
    name: Literal["xencrash"]
    version: str


class _Target(TypedDict):
    kind: Literal["live", "dump"]
    format: str
    location: str


class Target(_Target, total=False):
    """`found_by`: what led to Xen's page tables; `crashing_cpu_by`: the evidence for crashing_cpu; `warnings`: what is
    wrong with the dump itself."""

    accelerator: Literal["tcg", "kvm"] | None
    accelerator_absent: str
    xen_phys_start: Address | None
    found_by: str
    crashing_cpu_by: list[str]
    warnings: list[str]


class _Symbols(TypedDict):
    path: str | None
    build_id: Hex | None
    match: bool | None  # null when one of the two build-ids is not known


class Symbols(_Symbols, total=False):
    aliases: dict[str, str]  # that were given: what this build calls a name of the crash path
    source: str
    target_build_id: Hex | None


class _Generation(TypedDict):
    id: str
    evidence: list[str]


class Generation(_Generation, total=False):
    introduced: str  # commit
    releases: str  # that have it
    given: bool  # by who asked; else it was recognised


class NearGeneration(TypedDict):
    """One that does not fit: how many of the statements about it hold, and those that do not."""

    id: str
    introduced: str
    releases: str
    holds: int
    differs: list[str]


class Place(TypedDict):
    """Where a CPU is in Xen's text."""

    symbol: str | None
    pc: Address


class Handler(TypedDict):
    address: Address
    symbol: str | None


class Gate(TypedDict):
    handler: Handler
    selector: Address
    type: int
    dpl: int
    present: bool
    ist: int
    raw: Hex


class _Lapic(TypedDict):
    mode: Literal["disabled", "xapic", "x2apic", "invalid"] | None
    source: str


class Lapic(_Lapic, total=False):
    """`absent` says why a field is null, by its name."""

    apic_base: Address | None
    spiv: Address | None
    icr_low: Address | None
    icr_high: Address | None
    absent: dict[str, str]


class _Cpu(TypedDict):
    cpu: int
    role: Literal["crashing", "other", "offline"]
    nmi_gate: Gate | None
    mc_gate: Gate | None
    apic_id: int | None
    crash_save_done: bool | None
    lapic: Lapic | None


class Cpu(_Cpu, total=False):
    """One of Xen's CPUs. `absent` says why a field is null, by its name."""

    halted: bool | None
    nmi_blocked: bool | None
    nmi_pending: bool | None
    guest_mode: bool | None
    at: Place | None
    absent: dict[str, str]


class Stage(TypedDict):
    """A stage at which the machine was looked at, and where its CPU was."""

    stage: str
    cpu: int | None
    at: Place | None


class _Evidence(TypedDict):
    source: str


class Evidence(_Evidence, total=False):
    address: Address
    symbol: str
    raw: Hex


class _Finding(TypedDict):
    check: str
    stage: str
    cpu: int | None
    verdict: VerdictWord
    expected: Any
    observed: Any
    evidence: list[Evidence]
    source: str


class Finding(_Finding, total=False):
    stop: int
    reason: str
    follows: str


class Writer(TypedDict):
    """`at` is after the instruction that wrote."""

    cpu: int
    at: Place


class GateChange(TypedDict):
    """What changed a gate from what to what, and who was seen to write to it."""

    cpu: int
    vector: int  # 2 or 18
    changed: list[str]  # handler, selector, ist, type, dpl, present, reserved
    before: Gate
    after: Gate
    writers: list[Writer]


class TracedChange(GateChange):
    """A change between two stops of a trace."""

    since: str | None
    stage: str
    stop: int


class _Report(TypedDict):
    schema: Literal[1]
    tool: Tool
    target: Target
    symbols: Symbols
    generation: Generation | None
    crashing_cpu: int | None
    cpus: list[Cpu]
    stages: list[Stage]
    findings: list[Finding]
    verdict: VerdictWord


class Report(_Report, total=False):
    nearest: list[NearGeneration]  # where generation is null
    gate_changes: list[TracedChange]
    writers_absent: str
    undecided: str
