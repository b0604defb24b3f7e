"""Which failures follow from others: everything that one cause affects fails as well."""

from __future__ import annotations

from collections.abc import Container, Sequence

from xen_symbols.crashpath import timeline
from xen_symbols.crashpath.checks.model import Check, Outcome
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.stages import OtherStep, Span
from xen_symbols.crashpath.timeline import ONLINE, SAVE_DONE, WAITING_MASK, Whose
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Finding, Verdict


class Failure(NamedTuple):
    """A failure: the check that can judge it again, what it is called with, and where its finding stands."""

    check: Check
    cpu: int
    outcome: Outcome
    place: int


_DIED = "fatal-trap"
_SILENT = "nmi-answered"
_SAID_ONCE = "shootdown-report"  # of how things were when the wait was over
# The last thing judged for each CPU, in the generations that have it: it has signed off.
_SIGNS = (("waiting-cpus", WAITING_MASK), ("crash-save-done", SAVE_DONE), ("online-cpus", ONLINE))
# What a CPU can have completed that did not answer, and one that died.
_NO_ANSWER = Span(OtherStep.NOTHING, OtherStep.NMI_TAKEN)
_NOT_PARKED = Span(OtherStep.NOTHING, OtherStep.SELF_NMI)


def explain(
    context: Context, findings: list[Finding], failed: Sequence[Failure], earlier: Sequence[Finding]
) -> None:
    """Mark the failures that follow from others, as far as these explain them.

    One that was found before the wait was over may be why a CPU did not answer, and does not follow from that; but from
    its death, which was not seen before it had ended in a halt. What Xen said once stays explained by what explained it
    then.
    """
    before = {finding.observed: finding.follows for finding in earlier if finding.check == _SAID_ONCE}
    own = {(finding.check, finding.cpu) for finding in earlier if finding.follows is None}
    known = {(f.check, f.cpu) for f in (*earlier, *(findings[failure.place] for failure in failed))}
    late = _no_further(context, failed)
    held_up = context.assuming({cpu: span for cpu, (_, span) in late.items()})
    for failure in failed:
        finding = findings[failure.place]
        cpu, follows, reason = finding.cpu, None, finding.reason
        causes = [check for number, (check, _) in late.items() if number == cpu or cpu is None]
        concerned = causes and (cpu is None or causes[0] in (_DIED, _SILENT)) and finding.check not in causes
        if finding.check == _SAID_ONCE and finding.observed in before:
            follows = before[finding.observed]
        elif concerned:
            again = failure.check.judge(held_up, failure.cpu)
            if again.verdict is not Verdict.FAIL:
                follows = None if (finding.check, cpu) in own and causes[0] != _DIED else causes[0]
            elif cpu is None and again.allowed != failure.outcome.allowed:
                whose = ", ".join(f"{check} of CPU {number}" for number, (check, _) in late.items())
                reason = f"{reason}; {whose} would account for {again.allowed} only"
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
    """Each other CPU that has died or not signed off: the check that says so, and what it can have completed."""
    if not context.identified:
        return {}
    sign, last = next(
        (check, timeline.at_stops(written, context.generation, Whose.OTHER)[-1])
        for check, written in _SIGNS
        if context.makes(written)
    )
    assert isinstance(last.when, OtherStep)
    before = Span(OtherStep.NOTHING, OtherStep(last.when - 1))
    reached: dict[int, tuple[str, Span]] = {}
    dead = set()
    for failure in failed:
        if failure.check.id == _DIED:
            dead.add(failure.cpu)
        elif failure.check.id == _SILENT:
            reached[failure.cpu] = (_SILENT, _NO_ANSWER)
        elif failure.check.id == sign and failure.outcome.observed is (not last.to) and context.is_other(failure.cpu):
            reached.setdefault(failure.cpu, (sign, before))
    reached |= {cpu: (_DIED, reached.get(cpu, (_DIED, _NOT_PARKED))[1]) for cpu in dead if context.is_other(cpu)}
    order = (_DIED, _SILENT, sign)
    return dict(sorted(reached.items(), key=lambda item: order.index(item[1][0])))
