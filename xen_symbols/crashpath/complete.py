"""The one check of a trace as a whole: that the crash path reached its end, and that every stage could be seen."""

from __future__ import annotations

from collections.abc import Mapping

from xen_symbols.crashpath.checks.model import NO_DUMP
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Evidence, Finding, Verdict

_SHOOTDOWN = "xen/arch/x86/crash.c, nmi_shootdown_cpus"


class TraceCheck(NamedTuple):
    """What a trace judges besides CHECKS; `sources` says where the crash path continues from the last stage reached."""

    id: str
    subject: str
    sources: Mapping[str, str]
    consequence: str


COMPLETE = TraceCheck(
    "trace-complete", "the crashing CPU, at the end of a trace; a stage for which no hardware breakpoint is left",
    {
        "crash-entry": "xen/common/kexec.c, kexec_crash and kexec_common_shutdown",
        **dict.fromkeys(
            ("shutdown-entry", "shootdown", "nmi-taken", "cpu-save", "cpu-stop"), f"{_SHOOTDOWN} and its wait"
        ),
        "shootdown-done": f"{_SHOOTDOWN} after its wait: __stop_this_cpu, disable_IO_APIC, hpet_disable",
        "crash-info": "xen/arch/x86/crash.c, machine_crash_shutdown after kexec_crash_save_info",
        "exec-entry": "xen/arch/x86/machine_kexec.c, machine_kexec",
    },
    NO_DUMP,
)  # fmt: skip


def completeness(
    stage: str,
    cpu: int | None,
    verdict: Verdict,
    observed: str | None,
    reason: str | None,
    stop: int,
    *,
    last: str = "",
    follows: str | None = None,
) -> Finding:
    """The finding at a stage; `last` is the last stage reached, where the path went no further."""
    return Finding(
        COMPLETE.id, stage, cpu, verdict, stage, observed, COMPLETE.sources.get(last, COMPLETE.sources["exec-entry"]),
        (Evidence("breakpoint"),), reason, follows, stop,
    )  # fmt: skip
