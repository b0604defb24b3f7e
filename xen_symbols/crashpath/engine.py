"""The one engine: a target, its symbols and a position become findings and a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import Subject
from xen_symbols.crashpath.context import MACHINE, Context
from xen_symbols.crashpath.follows import Failure, explain
from xen_symbols.crashpath.identification import Identification, identify
from xen_symbols.crashpath.position import crashing_cpu, infer, is_memory_alone
from xen_symbols.crashpath.stages import CRASHING
from xen_symbols.describe.machine import (
    describe_cpus,
    describe_generation,
    describe_near,
    describe_symbols,
    describe_target,
    with_warnings,
)
from xen_symbols.report.model import Finding, Report, StageSeen, Verdict
from xen_symbols.version import VERSION
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import CpuState, read_state

if TYPE_CHECKING:
    from xen_symbols.report import contract

TOOL: contract.Tool = {"name": "xencrash", "version": VERSION}


def judge(context: Context, stop: int = 0, earlier: Sequence[Finding] = ()) -> list[Finding]:
    """Every check, for every CPU that it concerns, at one moment; `stop` is its index in the report's stages, and
    `earlier` what was found at the stages before."""
    subjects = {subject: _subjects(subject, context) for subject in Subject}
    findings: list[Finding] = []
    stage = context.position.stage.id
    failed: list[Failure] = []
    for check in CHECKS:
        judged = check.made_of(context)
        for cpu in subjects[check.subject]:
            outcome = judged(context, cpu)
            verdict, expected, observed, evidence, reason, _ = outcome
            if verdict is Verdict.FAIL:
                failed.append(Failure(check, cpu, outcome, len(findings)))
                reason = reason or check.explain(outcome)
            whose = None if cpu == MACHINE else cpu
            findings.append(
                Finding(check.id, stage, whose, verdict, expected, observed, check.source, evidence, reason, None, stop)
            )
    if failed:
        explain(context, findings, failed, [finding for finding in earlier if finding.verdict is Verdict.FAIL])
    return findings


def _subjects(subject: Subject, context: Context) -> list[int]:
    if subject is Subject.MACHINE:
        return [MACHINE]
    if subject is Subject.FOLLOWED and context.followed is None:
        return []
    if subject in (Subject.TABLES, Subject.FOLLOWED):
        return [cpu for cpu in context.cpus if _may_have_table(context.state.of(cpu))]
    if subject is Subject.CPUS:
        return context.cpus
    if subject is Subject.CRASHING:
        return [] if context.position.crashing_cpu is None else [context.position.crashing_cpu]
    if subject is Subject.OTHERS:
        return [] if context.position.crashing_cpu is None else context.others
    if subject is Subject.DIED:
        return sorted(context.deaths)
    return sorted(context.position.online)


def _may_have_table(cpu: CpuState) -> bool:
    return cpu.idt.present or cpu.idt.value.kind.name != "NOT_APPLICABLE"


def new_report(memory: XenMemory, identification: Identification | None = None) -> Report:
    """A report with its context and no findings."""
    report = Report(tool=TOOL, target=describe_target(memory), symbols=describe_symbols(memory))
    if identification is None:
        return report
    generation = identification.generation
    if generation is None:
        report.undecided = identification.reason
        report.nearest = [
            describe_near(*near.generation[:3], near.holds, near.differs) for near in identification.nearest
        ]
        return report
    report.generation = describe_generation(
        generation.id, generation.introduced, generation.releases, identification.evidence, identification.given
    )
    return report


def evaluate(memory: XenMemory, identification: Identification | None = None) -> Report:
    """Judge what is there now; where no generation of the crash path fits, what depends on none.

    Raises Undecidable when which Xen this is, or where it stands, cannot be determined.
    """
    identification = identification or identify(memory)
    report = new_report(memory, identification)
    try:
        state = read_state(memory)
        position = infer(state, identification.generation)
    except (Undecidable, Unreadable) as error:
        raise Undecidable(identification.reason or f"{memory.target.location}: {error}") from None
    context = Context(memory, state, position, identification.generation)
    add_stage(report, context)
    stuck = position.stage is CRASHING and position.crashing_cpu not in context.deaths
    if stuck and identification.generation is not None:
        why = "no CPU is at the beginning of a stage"
        if is_memory_alone(state):
            why = "the dump holds no registers of any CPU, and memory does not show that Xen handed over"
        report.undecided = (
            f"{memory.target.location}: Xen is on its way through the crash path, or stuck there, and how far it got "
            f"cannot be determined: {why}; every step was allowed"
        )
    report.target = with_warnings(report.target, state.warnings)
    if position.crashing_cpu is not None:
        report.target = {**report.target, "crashing_cpu_by": list(crashing_cpu(state, identification.generation)[1])}
    return report


def evaluate_if_possible(memory: XenMemory) -> Report:
    """The same; of what cannot be judged a report that says why."""
    try:
        return evaluate(memory)
    except (Undecidable, Unreadable) as error:
        report = new_report(memory)
        report.undecided = str(error)
        return report


def add_stage(report: Report, context: Context) -> list[Finding]:
    """Judge one moment and add it to a report. Returns the new findings."""
    position = context.position
    report.crashing_cpu = position.crashing_cpu
    report.stages.append(_seen(context))
    findings = judge(context, len(report.stages) - 1, report.findings)
    # Of a dump these are all: the list of 120,000 is not copied.
    report.findings = [*report.findings, *findings] if report.findings else findings
    report.cpus = describe_cpus(context.state, context.cpus, position.crashing_cpu, position.online)
    return findings


def _seen(context: Context) -> StageSeen:
    position = context.position
    if position.subject is None:
        return StageSeen(position.stage.id, None, None, None)
    physical = context.state.of(position.subject).physical
    pc = None if isinstance(physical, Absent) else physical.registers.get("rip")
    return StageSeen(position.stage.id, position.subject, None if pc is None else context.symbols.describe(pc), pc)
