"""The outcome of an experiment: from what was observed alone, without a table of what each Xen should do."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from xen_symbols.report.blocks import show
from xen_symbols.report.model import Finding
from xen_symbols.text import cpu_list
from xencrash.lab.storm.course import Course, End, Injected
from xencrash.lab.storm.experiment import Action
from xencrash.lab.storm.scene import Scene

_COUNTS = "waiting-cpus"  # includes the CPUs that are held
_SAID_ONCE = "shootdown-report"  # of how things were when the wait was over, which may be long before the handover
_PRESENT = "not present"


class Verdict(enum.IntEnum):
    """`WINDOW`: the machine was lost, and the crash path could not have prevented it."""

    PASS = 0
    WINDOW = 1
    UNDECIDED = 2
    FAIL = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Outcome:
    """`what` is one of a few words for counting; `says` is the line shown."""

    verdict: Verdict
    what: str
    says: str


PASSED = Outcome(Verdict.PASS, "handed-over", "handed over, and the crash kernel started")


def judge(course: Course, scene: Scene) -> Outcome:
    window = _window(course, scene)
    problem = _problem(course, scene)
    if problem is None:
        return PASSED
    what, says = problem
    if window is not None:
        reason, why = window
        return Outcome(Verdict.WINDOW, reason, f"{says}: {why}")
    return Outcome(Verdict.FAIL, what, says)


def _window(course: Course, scene: Scene) -> tuple[str, str] | None:
    """Why the machine was lost whatever the crash path does."""
    for seen in course.injected:
        cpu, name = seen.event.target, "NMI" if seen.event.action is Action.NMI else "machine check"
        obstacle = seen.foreseen.obstacle
        if obstacle and _PRESENT not in obstacle:
            return "unreachable", f"CPU {cpu} cannot take an {name}: {obstacle}".replace("an machine", "a machine")
        if seen.event.action is not Action.MC:
            continue
        if seen.said:
            return "ends-machine", f"CPU {cpu} cannot take a machine check: QEMU said {seen.said!r}"
        if seen.taken and seen.foreseen.handler == scene.own_handlers["mc"] and not _went_on(seen, course):
            return "own-mc-handler", f"the machine check reached Xen's own handler on CPU {cpu}"
        if seen.taken and not scene.is_xen(seen.foreseen.handler or 0):
            return "kernel-mc-handler", f"the machine check reached the crash kernel's own handler on CPU {cpu}"
    return None


def _went_on(seen: Injected, course: Course) -> bool:
    """Whether the CPU came to its end on the crash path all the same: what is wrong then, the handler has not done."""
    return course.end is End.HANDOVER and seen.event.target not in course.running


def _problem(course: Course, scene: Scene) -> tuple[str, str] | None:
    """The first thing that is wrong."""
    if course.end is End.RESET:
        return ("reset" if "reset" in course.how else "qemu-died"), course.how
    if course.end is End.PANIC:
        return "panic", f"{course.how} within the crash{_said(course)}"
    if course.end is End.HANG:
        return "hang", f"no handover: {_places(course, scene)}{_said(course)}"
    for seen in course.injected:
        if (wrong := _badly_taken(seen, scene)) is not None:
            return wrong
    if failed := _unexcused(course.at_handover, course):
        return "check", _of_findings(failed)
    if course.kernel is False:
        return "no-kernel", f"handed over, but the crash kernel does not start: {_places(course, scene)}"
    if failed := _unexcused_at_end(course.at_end, course):
        return "check", _of_findings(failed)
    if course.notes_changed:
        return "notes-changed", f"{cpu_list(course.notes_changed)}: notes written again after halting"
    if course.running:
        cpu, why = next(iter(course.running.items()))
        return "not-parked", f"CPU {cpu} is not parked after the handover: {why} (at {course.where[cpu]})"
    return None


def _badly_taken(seen: Injected, scene: Scene) -> tuple[str, str] | None:
    cpu, name = seen.event.target, seen.event.action.value
    if not seen.taken:
        blocked = seen.nmi_blocked and seen.event.action is Action.NMI
        return None if blocked else ("not-taken", f"CPU {cpu} did not take the {name} sent to it")
    if seen.frame != seen.foreseen.frame:
        return "wrong-stack", f"CPU {cpu} took the {name} on the stack at {seen.frame or 0:#x}, not as its gate says"
    if cpu == scene.crashing and not seen.returned and scene.is_xen(seen.pc):
        at = scene.symbols.describe(seen.pc)
        return "no-return", f"the handler of the {name} did not return to {at} on the crashing CPU"
    return None


def _unexcused(findings: Iterable[Finding], course: Course) -> list[Finding]:
    """Without failures that follow from CPUs that the experiment itself held."""
    return [
        finding
        for finding in findings
        if finding.follows is None
        and not (course.held and finding.check == _SAID_ONCE)
        and finding.cpu not in course.late
        and not (course.late and finding.check == _COUNTS)
    ]


def _unexcused_at_end(findings: Iterable[Finding], course: Course) -> list[Finding]:
    """Once the held CPUs are done, all is as it should be, but for those that never were let go."""
    return [
        finding
        for finding in findings
        if finding.follows is None
        and finding.cpu not in course.stopped
        and not (course.held and finding.check == _SAID_ONCE)
        and not (course.stopped and finding.check == _COUNTS)
    ]


def _of_findings(findings: Iterable[Finding]) -> str:
    return "; ".join(dict.fromkeys(map(_of_finding, findings)))


def _of_finding(finding: Finding) -> str:
    whose = "" if finding.cpu is None else f" of CPU {finding.cpu}"
    if finding.observed is None:
        return f"{finding.check}{whose}: {finding.reason}"
    return f"{finding.check}{whose}: {show(finding.observed)}, not {show(finding.expected)}"


def _places(course: Course, scene: Scene) -> str:
    if scene.crashing not in course.where:
        return "no CPU makes progress"
    return f"CPU {scene.crashing} is {_at(course.where[scene.crashing])}"


def _at(where: str) -> str:
    return where if where.startswith("halted") else f"at {where}"


def _said(course: Course) -> str:
    return f" (the console ends: {course.console!r})" if course.console else ""
