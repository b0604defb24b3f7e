"""The one engine: a target, its symbols and a position become findings and a report."""

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.crashpath.checks import CHECKS, MACHINE, Check, Context, Outcome, Subject
from xen_symbols.crashpath.generations import Bookkeeping, Identification, identify
from xen_symbols.crashpath.position import crashing_cpu, infer, is_memory_alone
from xen_symbols.crashpath.stages import CRASHING, OtherStep, Span
from xen_symbols.describe.machine import describe_cpus, describe_symbols, describe_target
from xen_symbols.report.model import Finding, Report, StageSeen, Verdict
from xen_symbols.version import VERSION
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.state import CpuState, read_state

if TYPE_CHECKING:
    from xen_symbols.report import contract

TOOL: "contract.Tool" = {"name": "xencrash", "version": VERSION}


def judge(context: Context, stop: int = 0, earlier: Sequence[Finding] = ()) -> list[Finding]:
    """Every check, for every CPU that it concerns, at one moment; `stop` is its index in the report's stages, and
    `earlier` what was found at the stages before."""
    subjects = {subject: _subjects(subject, context) for subject in Subject}
    findings: list[Finding] = []
    # Past NamedTuple's own constructor, which takes longer than most checks: there are 120,000 findings on 4096 CPUs.
    found, new = findings.append, tuple.__new__
    stage = context.position.stage.id
    failed: list[Failure] = []
    for check in CHECKS:
        for cpu in subjects[check.subject]:
            outcome = check.judge(context, cpu)
            verdict, expected, observed, evidence, reason, _ = outcome
            if verdict is Verdict.FAIL:
                failed.append(Failure(check, cpu, outcome, len(findings)))
                reason = reason or check.explain(outcome)
            whose = None if cpu == MACHINE else cpu
            found(
                new(Finding, (check.id, stage, whose, verdict, expected, observed, check.source, evidence, reason,
                              None, stop))
            )  # fmt: skip
    if failed:
        _explain(context, findings, failed, [finding for finding in earlier if finding.verdict is Verdict.FAIL])
    return findings


def _subjects(subject: Subject, context: Context) -> list[int]:
    if subject is Subject.MACHINE:
        return [MACHINE]
    if subject is Subject.FOLLOWED and context.gates_before is None:
        return []
    if subject in (Subject.TABLES, Subject.FOLLOWED):
        return [cpu for cpu in context.cpus if _may_have_table(context.state.of(cpu))]
    if subject is Subject.CPUS:
        return context.cpus
    if subject is Subject.OTHERS:
        if context.position.crashing_cpu is None:
            return []
        return sorted(cpu for cpu in context.position.online if context.is_other(cpu))
    return sorted(context.position.online)


def _may_have_table(cpu: CpuState) -> bool:
    return cpu.idt.present or cpu.idt.value.kind.name != "NOT_APPLICABLE"


class Failure(NamedTuple):
    """A failure: the check that can judge it again, what it is called with, and where its finding stands."""

    check: Check
    cpu: int
    outcome: Outcome
    place: int


_SILENT = "nmi-answered"
_SAID_ONCE = "shootdown-report"  # of how things were when the wait was over
# All that a CPU which did not answer can have completed.
_NO_ANSWER = Span(OtherStep.NOTHING, OtherStep.NMI_TAKEN)


def _explain(
    context: Context, findings: list[Finding], failed: Sequence[Failure], earlier: Sequence[Finding]
) -> None:
    """Mark the failures that follow from others, as far as these explain them.

    One that was found before the wait was over may be why a CPU did not answer, and does not follow from that; what Xen
    said once stays explained by what explained it then.
    """
    before = {finding.observed: finding.follows for finding in earlier if finding.check == _SAID_ONCE}
    own = {(finding.check, finding.cpu) for finding in earlier if finding.follows is None}
    known = {(f.check, f.cpu) for f in (*earlier, *(findings[failure.place] for failure in failed))}
    late = _no_further(context, failed)
    held_up = _assume(context, {cpu: span for cpu, (_, span) in late.items()})
    for failure in failed:
        finding = findings[failure.place]
        cpu, follows, reason = finding.cpu, None, finding.reason
        causes = [check for number, (check, _) in late.items() if number == cpu or cpu is None]
        concerned = causes and (cpu is None or causes == [_SILENT]) and finding.check != _SILENT
        if finding.check == _SAID_ONCE and finding.observed in before:
            follows = before[finding.observed]
        elif concerned:
            again = failure.check.judge(held_up, failure.cpu)
            if again.verdict is not Verdict.FAIL:
                follows = None if (finding.check, cpu) in own else causes[0]
            elif cpu is None and again.allowed != failure.outcome.allowed:
                whose = ", ".join(f"{check} of CPU {number}" for number, (check, _) in late.items())
                reason = f"{reason}; {whose} would make it {again.allowed}, and no more"
        follows = follows or _because_of(failure.outcome, cpu, known, context.position.crashing_cpu)
        if follows or reason != finding.reason:
            findings[failure.place] = finding._replace(follows=follows, reason=reason)


def _because_of(
    outcome: Outcome, cpu: int | None, known: Container[tuple[str, int | None]], crashing: int | None
) -> str | None:
    """The first check of a group that explains this failure; None if there is none."""
    concerned = (crashing, None) if cpu is None else (cpu, None)
    for group in outcome.because_of:
        if group and all(any((check, whose) in known for whose in concerned) for check in group):
            return group[0]
    return None


def _no_further(context: Context, failed: Sequence[Failure]) -> dict[int, tuple[str, Span]]:
    """Each other CPU that has not signed off: the check which says so, and what it can have completed."""
    generation = context.generation
    if generation.bookkeeping is Bookkeeping.MASK:
        sign, missing, span = "waiting-cpus", True, Span(OtherStep.NOTHING, OtherStep.DONE)
    elif generation.has_save_done:
        sign, missing, span = "crash-save-done", False, Span(OtherStep.NOTHING, OtherStep.STOPPED)
    else:
        sign, missing, span = "online-cpus", True, Span(OtherStep.NOTHING, OtherStep.NOTES_SAVED)
    held: dict[int, tuple[str, Span]] = {}
    for failure in failed:
        if failure.check.id == _SILENT:
            held[failure.cpu] = (_SILENT, _NO_ANSWER)
        elif failure.check.id == sign and failure.outcome.observed is missing and context.is_other(failure.cpu):
            held.setdefault(failure.cpu, (sign, span))
    return dict(sorted(held.items(), key=lambda item: item[1][0] != _SILENT))


def _assume(context: Context, spans: Mapping[int, Span]) -> Context:
    """The same moment, with some of the other CPUs elsewhere."""
    import copy  # where nothing failed its import would cost more than the judging

    assumed = copy.copy(context)
    assumed.position = context.position._replace(others={**context.position.others, **spans})
    return assumed


def new_report(memory: XenMemory, identification: Identification | None = None) -> Report:
    """A report with its context and no findings."""
    report = Report(tool=TOOL, target=describe_target(memory), symbols=describe_symbols(memory))
    if identification is not None:
        report.generation = {
            "id": identification.generation.id,
            "introduced": identification.generation.introduced,
            "evidence": list(identification.evidence),
        }
    return report


def evaluate(memory: XenMemory, identification: Identification | None = None) -> Report:
    """Judge what is there now. Raises Undecidable when it cannot be told which Xen this is or where it stands."""
    identification = identification or identify(memory)
    report = new_report(memory, identification)
    try:
        state = read_state(memory)
    except Unreadable as error:
        raise Undecidable(f"{memory.target.location}: {error}") from None
    position = infer(state, identification.generation)
    add_stage(report, Context(memory, state, position, identification.generation))
    if position.stage is CRASHING:
        why = "no CPU is at the beginning of a stage"
        if is_memory_alone(state):
            why = "the dump holds no registers of any CPU, and memory does not show that Xen handed over"
        report.undecided = (
            f"{memory.target.location}: Xen is on its way through the crash path, or stuck there, and how far it came "
            f"cannot be told: {why}; every step was allowed for"
        )
    if position.crashing_cpu is not None:
        report.target = {**report.target, "crashing_cpu_by": list(crashing_cpu(state, identification.generation)[1])}
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
