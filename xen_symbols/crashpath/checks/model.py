"""What a check is: one invariant of the crash path, as a row that names what it judges, and what it found."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from xen_symbols.absence import Absent, Kind
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.timeline import Object
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.xen.reads import Read

NO_DUMP = "no crash kernel starts, and the dump is lost"


class Outcome(NamedTuple):
    """What a judge found. `allowed` and `observed` are JSON values."""

    verdict: Verdict
    allowed: Any
    observed: Any
    evidence: tuple[Evidence, ...] = ()
    reason: str | None = None
    # What explains this failure: any of these groups of checks, where all of a group fail for the same CPU. What fails
    # for the whole machine explains each CPU's failure, and what fails for the crashing CPU the machine's.
    because_of: tuple[tuple[str, ...], ...] = ()


class Subject(enum.Enum):
    MACHINE = "the machine"
    TABLES = "each CPU that has an IDT"
    FOLLOWED = "each CPU that has an IDT, from stop to stop of a trace"
    ONLINE = "each CPU that was online"
    CRASHING = "the crashing CPU"
    OTHERS = "each other CPU that was online"
    CPUS = "each CPU that exists, or was online"
    DIED = "each CPU that died on the crash path, and no other"


class Need(enum.Enum):
    """What a target must have for a check; without it the check is skipped or unknown."""

    MEMORY = "Xen's memory"  # every target has it
    REGISTERS = "each CPU's registers as they are now: a live machine, or QEMU's notes in a dump"
    NOTES = "the dump's notes by Xen"
    LAPIC = "the LAPIC's registers: QEMU's device state or monitor"
    DEVICE_STATE = "the LAPIC's mode, or the NMI latch: QEMU's device state"
    TRACE = "a crash followed from its start"


class Shows(enum.Enum):
    """What a check's pass, at the end of a trace, shows of the promise that it is named after."""

    KEPT = "it was seen to be kept: a Xen that has done nothing for it fails"
    SO_ALREADY = "it is so now, and may have been so before the crash"
    NOT_BROKEN = "it was not seen to be broken at any stop; what comes and goes between two stops is not seen"


class ByGeneration(enum.Enum):
    """When the generation of the crash path decides what is right: without one a check is made only where it does not.
    """

    NEVER = "never: it is the same on every path"
    ONCE_BEGUN = "once Xen has begun to crash: before, no path has written to it"
    ALWAYS = "always"


Judge = Callable[[Context, int], Outcome]


class Check(NamedTuple):
    """One invariant. `source` says where to look, `consequence` what its failure would do to a real crash; where that
    depends on what should have been there, `instead_of` says it by the expected value, a handler's by its name.
    `shows` says what a pass shows, `by_generation` when it needs to be known which generation the path is;
    `unidentified` is the judge where it needs to be and is not: most can say no more than that."""

    id: str
    subject: Subject
    source: str
    consequence: str
    judge: Judge
    instead_of: Mapping[Any, str] = MappingProxyType({})
    needs: Need = Need.MEMORY
    shows: Shows = Shows.KEPT
    by_generation: ByGeneration = ByGeneration.ALWAYS
    unidentified: Judge | None = None

    def made_of(self, context: Context) -> Judge:
        """The judge; where the generation would decide and is not known, one that says so."""
        if context.identified or self.by_generation is ByGeneration.NEVER:
            return self.judge
        decides = context.on_unknown_path or self.by_generation is ByGeneration.ALWAYS
        return (self.unidentified or _not_identified) if decides else self.judge

    def explain(self, outcome: Outcome) -> str:
        """What a failure would do to a real crash."""
        expected = outcome.allowed
        several = expected["one_of"] if isinstance(expected, dict) and "one_of" in expected else [expected]
        said = {self._instead_of(each) for each in several}
        return said.pop() if len(said) == 1 else self.consequence

    def _instead_of(self, expected: Any) -> str:
        if isinstance(expected, list):
            return self.consequence
        value = expected.get("symbol") if isinstance(expected, dict) else expected
        return self.instead_of.get(value, self.consequence)


# -- Outcomes ---------------------------------------------------------------------------------


@lru_cache
def skip(reason: str) -> Outcome:
    return Outcome(Verdict.SKIP, None, None, reason=reason)


def unknown(reason: str, allowed: Any = None, observed: Any = None) -> Outcome:
    return Outcome(Verdict.UNKNOWN, allowed, observed, reason=reason)


NOT_IDENTIFIED = "the generation of the crash path is not known, and with it what should be there"


def _not_identified(_context: Context, _cpu: int) -> Outcome:
    return unknown(NOT_IDENTIFIED)


def from_absence(absence: Absent, allowed: Any = None) -> Outcome:
    verdict = Verdict.SKIP if absence.kind in (Kind.NOT_HELD, Kind.NOT_APPLICABLE) else Verdict.UNKNOWN
    return Outcome(verdict, allowed, None, (), absence.reason)


def one_of(allowed: Sequence[Any]) -> Any:
    """What is allowed, as JSON."""
    return allowed[0] if len(allowed) == 1 else {"one_of": list(allowed)}


def expect(
    read: Read,
    allowed: Sequence[Any] | Absent,
    show: Callable[[Any], Any] | None = None,
    of: Callable[[Any], Any] | None = None,
) -> Outcome:
    """Pass when what was read, or what `of` takes out of it, is one of those allowed; `show` makes JSON of them."""
    if isinstance(allowed, Absent):
        return from_absence(allowed)
    if len(allowed) == 1:
        shown = allowed[0] if show is None else show(allowed[0])
    else:
        allowed = tuple(dict.fromkeys(allowed))
        shown = one_of(allowed if show is None else [show(value) for value in allowed])
    value, evidence = read
    if of is not None and not isinstance(value, Absent):
        value = of(value)
    if isinstance(value, Absent):
        return from_absence(value, shown)
    if value not in allowed:
        return Outcome(Verdict.FAIL, shown, value if show is None else show(value), evidence)
    if show is not None:
        value = shown if len(allowed) == 1 else show(value)
    return Outcome(Verdict.PASS, shown, value, evidence)


def because(outcome: Outcome, *checks: str) -> Outcome:
    """The same outcome; if it is a failure, one of any of the checks explains it."""
    if outcome.verdict is not Verdict.FAIL:
        return outcome
    return outcome._replace(because_of=tuple((check,) for check in checks))


# -- Checks that follow from the timeline -----------------------------------------------------


def as_written(
    written: Object,
    read: Callable[[Context, int], Read],
    *,
    never: str = "",
    because_of: Mapping[Any, tuple[str, ...]] = MappingProxyType({}),
) -> Judge:
    """A judge of one object of the timeline, which `read` finds in the state.

    `never`: the reason for a skip where the generation does not write it. `because_of`: the checks that explain a
    failure, by what was observed.
    """

    def judge(context: Context, cpu: int) -> Outcome:
        if never and not context.makes(written):
            return skip(never)
        outcome = expect(read(context, cpu), context.allowed(written, cpu))
        causes = because_of.get(outcome.observed, ()) if because_of else ()
        return because(outcome, *causes) if causes else outcome

    return judge


def variable(written: Object) -> Callable[[Context, int], Read]:
    """Reads one of Xen's variables."""
    return lambda context, _cpu: context.state.system[written.field]


def bit(written: Object) -> Callable[[Context, int], Read]:
    """Reads a CPU's bit in one of Xen's cpumask_t."""

    def read(context: Context, cpu: int) -> Read:
        cpus, evidence = context.mask_word(written.field, cpu)
        return Read(cpus if isinstance(cpus, Absent) else cpu in cpus, evidence)

    return read
