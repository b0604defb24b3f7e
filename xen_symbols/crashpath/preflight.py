"""Would a crash work? Asked of a Xen that runs, before one is needed: of a live machine, or of a dump of a healthy one.

Besides every check of the crash path for a running Xen, what is not part of the path and decides whether it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xen_symbols.absence import Absent, Kind, Undecidable, Unreadable
from xen_symbols.crashpath.checks.model import NOT_IDENTIFIED, Outcome, expect, from_absence, one_of, unknown
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.engine import add_stage, new_report
from xen_symbols.crashpath.generations import Hook
from xen_symbols.crashpath.identification import Identification, identify
from xen_symbols.crashpath.position import infer
from xen_symbols.crashpath.stages import NORMAL
from xen_symbols.crashpath.timeline import NMI_CALLBACK, Value
from xen_symbols.records import NamedTuple
from xen_symbols.report.model import Evidence, Finding, Report, Verdict
from xen_symbols.symbols.table import DATA
from xen_symbols.xen.kexec import CrashArea, crash_area, crash_image_loaded, image_size
from xen_symbols.xen.lapic import lapic_mode
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import in_memory
from xen_symbols.xen.state import read_state

STAGE = "preflight"  # of the findings that are no check's of the crash path

NO_IMAGE = (
    "no crash kernel is loaded: kexec_crash() returns at once and the crash path does not run; "
    "load one with kexec -p in dom0"
)


# What only a Xen that was built with CONFIG_KEXEC has: xen/common/kexec.c, xen/arch/x86/machine_kexec.c.
_OF_KEXEC = ("kexec_crash", "machine_kexec", "kexecing", "kexec_flags")


class Promise(NamedTuple):
    """One thing that a crash needs. `consequence` is what becomes of a crash without it; `ends_trace`: the path is not
    seen to its end then."""

    id: str
    source: str
    consequence: str
    judge: Callable[[Context], Outcome]
    ends_trace: bool = False


def _image(context: Context) -> Outcome:
    read = context.state.system["kexec_flags"]
    return expect(read, ("loaded",), of=lambda flags: "loaded" if crash_image_loaded(flags) else "not loaded")


def _area(context: Context) -> Outcome:
    """Its size, and how much of it the image takes."""
    try:
        read = crash_area(context.memory)
    except Unreadable as error:
        return from_absence(error.absent, "reserved")
    area: CrashArea = read.value
    if not area.size:
        return Outcome(Verdict.FAIL, "reserved", "nothing", read.evidence)
    observed: dict[str, Any] = {"start": hex(area.start), "size": area.size}
    flags = context.state.system["kexec_flags"]
    if flags.present and crash_image_loaded(flags.value):
        image = image_size(context.memory, flags.value, area)
        if image is not None:
            observed["image"] = image
    return Outcome(Verdict.PASS, "reserved", observed, read.evidence)


def _cpus(context: Context) -> Outcome:
    """Which are online, parked (up to their per-CPU area), and possible but not present."""
    online = context.state.system["online"]
    if isinstance(online.value, Absent):
        return from_absence(online.value)
    known = context.state.cpus.values()
    absent = [cpu.cpu for cpu in known if not cpu.exists]
    parked = [cpu.cpu for cpu in known if cpu.exists and cpu.cpu not in online.value]
    observed = {"online": sorted(online.value), "parked": parked, "absent": absent}
    if absent and not context.identified:
        return unknown(f"{NOT_IDENTIFIED}: one kind of path faults on a CPU that is absent", {"absent": []}, observed)
    reads_all = context.identified and context.generation.reads_absent_idts
    faults = bool(absent) and reads_all
    expected: Any = {"absent": []} if reads_all else None
    return Outcome(Verdict.FAIL if faults else Verdict.PASS, expected, observed, online.evidence)


def _lapic(context: Context) -> Outcome:
    """The mode now, on each CPU that is online, and that in which the crash kernel finds it."""
    now = sorted({mode or "not known" for cpu in _online(context) for mode in [lapic_mode(context.state, cpu)[0]]})
    after = context.boot_mode
    if isinstance(after, Absent):
        return unknown(f"the mode to which the stop returns is not known: {after}", None, {"now": now})
    observed = {"now": now, "after": after}
    if len(now) != 1:
        why = "no CPU is online" if not now else "the CPUs are not in one mode"
        return unknown(why, None, observed)
    if after == "x2apic" and not (context.identified and context.generation.hook is Hook.CALLBACK):
        return unknown(
            "releases before 4.5.0 return to x2APIC mode by a transition that faults (fixed by 77ffa26374), and this "
            "crash path has releases of both kinds", None, observed,
        )  # fmt: skip
    return Outcome(Verdict.PASS, None, observed)


def _online(context: Context) -> Iterator[Any]:
    online = context.state.system["online"]
    return (context.state.of(cpu) for cpu in (online.value if online.present else ()) if cpu in context.state.cpus)


def _policy(context: Context) -> Outcome:
    """`nmi=` on Xen's command line: what an NMI does that nobody else takes."""
    words = ("dom0", "fatal", "ignore")
    memory = context.memory
    try:
        address = memory.symbols.address("opt_nmi", DATA)
        raw = memory.read(address, 10)
    except Unreadable as error:
        return from_absence(error.absent, one_of(words))
    said = raw.split(b"\0", 1)[0].decode("ascii", "backslashreplace")
    # do_nmi and its helpers look at the first letter alone; any other one is taken for fatal.
    policy = next((word for word in words if word[0] == said[:1]), "fatal")
    evidence = in_memory(said, address, raw, "opt_nmi").evidence
    return Outcome(Verdict.PASS, one_of(words), policy, evidence)


def _callback(context: Context) -> Outcome:
    read = context.state.system["nmi_callback"]
    if isinstance(read.value, Absent) and read.value.kind is Kind.NO_SYMBOL:
        return from_absence(read.value)
    return expect(read, context.resolve(NMI_CALLBACK, Value.IDLE_CALLBACK), context.show_code)


PROMISES = (
    Promise("crash-image", "xen/common/kexec.c, kexec_crash", NO_IMAGE, _image, ends_trace=True),
    Promise(
        "crash-area", "xen/common/kexec.c, set_kexec_crash_area_size",
        "no crash kernel can be loaded: boot Xen with crashkernel=SIZE", _area,
    ),
    Promise(
        "crash-cpus", "xen/arch/x86/machine_kexec.c, machine_kexec (9c20d3c591, fixed by 2c9829a261)",
        "machine_kexec() reads the IDT of each possible CPU: of one that is not present (those listed as absent) the "
        "address is non-canonical, and the crash ends in #GP: no crash kernel starts", _cpus, ends_trace=True,
    ),
    Promise(
        "crash-lapic", "xen/arch/x86/apic.c, disable_local_APIC",
        "the crash kernel finds the local APICs in a mode that it does not expect", _lapic,
    ),
    Promise("nmi-policy", "xen/arch/x86/traps.c, do_nmi", "", _policy),
    Promise(
        "nmi-callback", "xen/arch/x86/traps.c, set_nmi_callback",
        "something else takes the NMIs: one of a button or a watchdog does not do what nmi= says", _callback,
    ),
)  # fmt: skip

BUILT_IN = Promise(
    "kexec-built-in", "xen/common/kexec.c (CONFIG_KEXEC)",
    "this Xen was built without kexec: it has no crash path, and a crash leaves nothing behind", lambda _: unknown(""),
)  # fmt: skip


def _finding(promise: Promise, outcome: Outcome) -> Finding:
    reason = outcome.reason or (promise.consequence if outcome.verdict is Verdict.FAIL else None)
    return Finding(
        promise.id, STAGE, None, outcome.verdict, outcome.allowed, outcome.observed, promise.source, outcome.evidence,
        reason,
    )  # fmt: skip


def _built_in(memory: XenMemory) -> Finding:
    named = [name for name in _OF_KEXEC if memory.symbols.has(name)]
    evidence = (Evidence(memory.symbols.source, symbol=", ".join(named or _OF_KEXEC)),)
    return _finding(BUILT_IN, Outcome(Verdict.PASS if named else Verdict.FAIL, True, bool(named), evidence))


def preflight(memory: XenMemory, identification: Identification | None = None) -> Report:
    """Whether a crash would work, as a report: of the checks for a running Xen, and of what else a crash needs.

    Raises Undecidable for a Xen that has crashed already, or whose state cannot be read.
    """
    built_in = _built_in(memory)
    if built_in.verdict is Verdict.FAIL:
        report = new_report(memory)
        report.findings = [built_in]
        return report
    try:
        identification = identification or identify(memory)
    except Undecidable as error:  # the symbols name functions only
        report = new_report(memory)
        report.findings, report.undecided = [built_in], str(error)
        return report
    try:
        state = read_state(memory)
    except Unreadable as error:
        raise Undecidable(f"{memory.target.location}: {error}") from None
    position = infer(state, identification.generation)
    if position.stage is not NORMAL:
        raise Undecidable(
            f"{memory.target.location}: Xen has begun to crash (stage {position.stage.id}): preflight is for one that "
            "runs; judge this one with check"
        )
    report = new_report(memory, identification)
    context = Context(memory, state, position, identification.generation)
    judged = [built_in, *(_finding(promise, promise.judge(context)) for promise in PROMISES)]
    add_stage(report, context)
    report.findings = [*judged, *report.findings]
    return report


def ends_early(context: Context) -> list[str]:
    """What will end a trace of this Xen's crash before its end, by what has been read already."""
    found = ((promise, promise.judge(context)) for promise in PROMISES if promise.ends_trace)
    return [_said(promise, outcome.observed) for promise, outcome in found if outcome.verdict is Verdict.FAIL]


def _said(promise: Promise, observed: Any) -> str:
    absent = observed.get("absent") if isinstance(observed, Mapping) else None
    which = f"{promise.consequence} (absent: {', '.join(map(str, absent))})" if absent else promise.consequence
    return f"this trace will end early: {which}"
