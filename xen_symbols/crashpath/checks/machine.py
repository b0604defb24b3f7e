"""The machine as a whole: who crashed, what Xen says it is doing, and its report of the shootdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xen_symbols.absence import Absent, Kind
from xen_symbols.crashpath import timeline
from xen_symbols.crashpath.checks.model import (
    NOT_IDENTIFIED,
    ByGeneration,
    Check,
    Need,
    Outcome,
    Subject,
    as_written,
    expect,
    from_absence,
    skip,
    unknown,
    variable,
)
from xen_symbols.crashpath.context import MACHINE, Context
from xen_symbols.crashpath.stages import CrashStep, OtherStep
from xen_symbols.crashpath.timeline import CRASH_OWNER, IN_PROGRESS, KEXECING, REPORT
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.xen.kexec import is_in_progress
from xen_symbols.xen.reads import Read


def _crash_owner(context: Context, _cpu: int) -> Outcome:
    read = context.state.system[CRASH_OWNER.field]
    nameless = isinstance(read.value, Absent) and read.value.kind is Kind.NO_SYMBOL
    if nameless and not timeline.exists_in(CRASH_OWNER, context.generation):
        return skip("this generation may have no owner variable (470f58c159)")
    return expect(read, context.allowed(CRASH_OWNER, MACHINE))


OWNER = Check(
    "crash-owner", Subject.MACHINE, "xen/common/kexec.c, one_cpu_only (470f58c159)",
    "one_cpu_only() let in another CPU than it recorded: two may walk the crash path at once", _crash_owner,
)  # fmt: skip

ON_ITS_WAY = Check(
    "kexecing", Subject.MACHINE, "xen/common/kexec.c, kexec_crash; read by disable_local_APIC",
    "the local APICs are not returned to the mode in which the firmware left them, as the crash kernel expects",
    as_written(KEXECING, variable(KEXECING)), {False: "Xen behaves as if on its way into a crash kernel, but is not"},
    by_generation=ByGeneration.ONCE_BEGUN,
)  # fmt: skip


def _in_progress(context: Context, _cpu: int) -> Outcome:
    read = context.state.system[IN_PROGRESS.field]
    return expect(read, context.allowed(IN_PROGRESS, MACHINE), of=is_in_progress)


FLAGS = Check(
    "kexec-in-progress", Subject.MACHINE, "xen/common/kexec.c, one_cpu_only: KEXEC_FLAG_IN_PROGRESS",
    "kexec hypercalls are still let in: a crash image may be unloaded or replaced while Xen is on its way into it",
    _in_progress, {False: "kexec hypercalls are refused with EBUSY, and no other crash image can be loaded"},
)  # fmt: skip


def _shootdown_report(context: Context, _cpu: int) -> Outcome:
    if not context.makes(REPORT):
        return skip("this generation does not report the shootdown")
    if not context.written(REPORT, MACHINE):
        return skip("the wait is not over")
    tail = context.console_tail
    if isinstance(tail, Absent):
        return from_absence(tail, "Shot down all CPUs")
    lines = [line for line in _not_of_domains(tail) if "hot down all CPUs" in line or _NOT_ALL in line]
    others = [cpu for cpu in sorted(context.position.online) if context.is_other(cpu)]
    missing = [cpu for cpu in others if context.other(cpu).before(OtherStep.SIGNED_OFF)]
    expected = f"Failed to shoot down CPUs {{{','.join(map(str, missing))}}}" if missing else "Shot down all CPUs"
    if not lines:
        return unknown("the end of Xen's console ring does not hold the report", expected)
    verdict = Verdict.PASS if _reports(lines[-1], missing) else Verdict.FAIL
    return Outcome(verdict, expected, lines[-1].strip(), (Evidence("Xen's console ring"),))


def _shootdown_failed(context: Context, _cpu: int) -> Outcome:
    """Without a generation, what Xen itself said is all that is known, and that of a failure is enough."""
    tail = context.console_tail
    lines = [] if isinstance(tail, Absent) else [line for line in _not_of_domains(tail) if _NOT_ALL in line]
    if not lines:
        return unknown(NOT_IDENTIFIED)
    return Outcome(Verdict.FAIL, "Shot down all CPUs", lines[-1].strip(), (Evidence("Xen's console ring"),))


_NOT_ALL = "o shoot down CPUs"
_A_DOMAINS = re.compile(r"\(d\d+\)")


def _not_of_domains(console: str) -> list[str]:
    """What a domain prints may be in the ring, too, as (d0) and so on."""
    return [line for line in console.splitlines() if not _A_DOMAINS.match(line)]


def _reports(line: str, missing: Sequence[int]) -> bool:
    """Whether Xen's report names just these CPUs, as a list of ranges: `{1,4-6}`."""
    if "Shot down all CPUs" in line:
        return not missing
    named = re.search(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}", line)
    if named is None:
        return False
    bounds = [[int(number) for number in one.split("-")] for one in named[1].split(",")]
    size = sum(one[-1] - one[0] + 1 for one in bounds)
    return size == len(missing) and all(any(one[0] <= cpu <= one[-1] for one in bounds) for cpu in missing)


SHOOTDOWN_REPORT = Check(
    "shootdown-report", Subject.MACHINE, "xen/arch/x86/crash.c, nmi_shootdown_cpus (f12c1f0b09)",
    "Xen itself said that it could not shoot down these CPUs: they were still waited for after a second",
    _shootdown_report, unidentified=_shootdown_failed,
)  # fmt: skip

_EXECUTED = "executed"


def _enable_nmis(context: Context, _cpu: int) -> Outcome:
    if not context.generation.swaps_mc:
        return skip("this generation does not unblock NMIs")
    if context.followed is None:
        return skip("only a trace sees what is executed")
    if not context.crash.reached(CrashStep.NEUTRALISED):
        return skip("Xen has not handed over")
    return expect(Read(context.followed.unblocked, (Evidence("breakpoint after the IRET"),)), (_EXECUTED,))


ENABLE_NMIS = Check(
    "enable-nmis", Subject.MACHINE, "xen/arch/x86/machine_kexec.c, enable_nmis (77ad1faa6b)",
    "machine_kexec left out the IRET that unblocks NMIs: after a crash that began in an NMI handler the crash kernel "
    "starts with NMIs blocked", _enable_nmis, needs=Need.TRACE,
)  # fmt: skip

CHECKS = (OWNER, ON_ITS_WAY, FLAGS, SHOOTDOWN_REPORT, ENABLE_NMIS)
