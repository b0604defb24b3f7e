"""The shootdown: whether the NMI leads to the path, who answered, and how far each CPU got by its own signs."""

from __future__ import annotations

from xen_symbols.absence import Absent, Kind
from xen_symbols.crashpath.checks.model import (
    ByGeneration,
    Check,
    Need,
    Outcome,
    Shows,
    Subject,
    as_written,
    because,
    bit,
    expect,
    skip,
    unknown,
)
from xen_symbols.crashpath.context import MACHINE, Context
from xen_symbols.crashpath.generations import GENERATIONS
from xen_symbols.crashpath.stages import CrashStep
from xen_symbols.crashpath.timeline import (
    EXCEPTION_TABLE,
    NMI_CALLBACK,
    NMI_ENTRIES,
    ONLINE,
    SAVE_DONE,
    SAVED,
    WAITING_COUNT,
    WAITING_MASK,
)
from xen_symbols.report.model import Evidence, Verdict
from xen_symbols.xen.reads import Read, absent

# What an NMI leads to before a crash: no callback, one of another part of Xen, or do_nmi itself.
_DISPATCHED_BEFORE = (
    None, "do_nmi",
    *dict.fromkeys(name.rpartition("#")[2] for generation in GENERATIONS for name in generation.idle_callbacks),
)  # fmt: skip


def _dispatch(context: Context, _cpu: int) -> Outcome:
    for hook in (EXCEPTION_TABLE, NMI_CALLBACK):
        if context.makes(hook):
            return expect(context.state.system[hook.field], context.allowed(hook, MACHINE), context.show_code)
    return skip("this generation hooks the NMI gates themselves")


DISPATCH = Check(
    "nmi-dispatch", Subject.MACHINE, "xen/arch/x86/crash.c, nmi_shootdown_cpus (cbeeaa7da0, e7f147bf4a)",
    "the shootdown NMI runs the normal handler: no other CPU saves its state or stops", _dispatch,
    dict.fromkeys(_DISPATCHED_BEFORE, "an ordinary NMI stops a CPU although the machine has not crashed"),
)  # fmt: skip


def _waiting_count(context: Context, _cpu: int) -> Outcome:
    if not context.makes(WAITING_COUNT):
        return skip("this generation keeps a mask, judged per CPU")
    read = context.state.system[WAITING_COUNT.field]
    armed = context.written(WAITING_COUNT, MACHINE)
    if armed is False:
        return expect(read, (0,))
    signed_off = [context.written(WAITING_COUNT, cpu) for cpu in context.position.online if context.is_other(cpu)]
    most = sum(signed is not True for signed in signed_off)
    least = sum(signed is False for signed in signed_off)
    allowed = tuple(range(least, most + 1))
    return expect(read, allowed if armed else (0, *allowed))


WAITING = (
    Check(
        "waiting-cpus", Subject.MACHINE, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b, and its author's review)",
        "the crashing CPU waits a full second for CPUs that have already answered, or does not wait for those that "
        "have not", _waiting_count,
        {0: "the crashing CPU waits a full second for CPUs that have already answered"}, shows=Shows.SO_ALREADY,
    ),
    Check(
        "waiting-cpus", Subject.CPUS, "xen/arch/x86/crash.c, do_nmi_crash (f12c1f0b09)",
        "the crashing CPU waits a full second for it although it answered, or leaves while it still runs",
        # Done is set just before a CPU signs off: without it, it did not get that far.
        as_written(WAITING_MASK, bit(WAITING_MASK), never="this generation counts the CPUs that it waits for",
                   because_of={True: ("crash-save-done",)}),
        {False: "the crashing CPU waits a full second for it, and says that it could not shoot it down",
         True: "the crashing CPU does not wait for it: it leaves while this CPU still runs"}, shows=Shows.SO_ALREADY,
    ),
)  # fmt: skip


def _answered(context: Context, cpu: int) -> Outcome:
    if not context.crash.reached(CrashStep.WAITED):
        return skip("the wait is not over")
    signs = [(context.mask_word("saved", cpu), True), (context.mask_word("online", cpu), False)]
    if context.makes(SAVE_DONE):
        signs.append((context.state.of(cpu).crash_save_done, True))
    if context.makes(WAITING_MASK):
        signs.append((context.mask_word("waiting_mask", cpu), False))
    answered, unread = False, None
    evidence: tuple[Evidence, ...] = ()
    for (value, where), sign in signs:  # `sign` is what it is once the CPU has answered
        if isinstance(value, Absent):
            unread = unread or value
        else:
            answered |= (cpu in value if isinstance(value, frozenset) else value) is sign
            evidence += where
    if unread is not None and not answered:
        return unknown(unread.reason, "answered")
    verdict = Verdict.PASS if answered else Verdict.FAIL
    outcome = Outcome(verdict, "answered", "answered" if answered else "did not answer", evidence)
    gate = ("nmi-dispatch", "nmi-gate-present", "nmi-gate-handler", "nmi-gate-selector", "idtr")
    return because(outcome, "fatal-trap", *gate)


ANSWERED = Check(
    "nmi-answered", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
    "when the wait was over this CPU had done nothing of what the shootdown NMI makes it do: unless it does so yet, it "
    "runs on under the crash kernel, and its registers are lost",
    _answered, shows=Shows.SO_ALREADY,
)  # fmt: skip


def _entries(context: Context, cpu: int) -> Outcome:
    entered = context.followed and context.followed.nmi_entries
    if entered is None:
        return skip("only a trace counts entries")
    if not context.crash.reached(CrashStep.WAITED):
        return skip("the wait is not over")
    entries = entered.get(cpu, 0)
    evidence = (Evidence("breakpoint at the NMI handler of the crash path"),)
    return expect(Read(entries, evidence), context.allowed(NMI_ENTRIES, cpu))


ENTRIES = Check(
    "nmi-entries", Subject.OTHERS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
    "it did not enter the handler exactly once: more often means that an IRET unblocked NMIs there and a second one "
    "came in; never, that the NMI did not reach it",
    _entries, needs=Need.TRACE,
)  # fmt: skip


def _read_save_done(context: Context, cpu: int) -> Read:
    read = context.state.of(cpu).crash_save_done
    if read.present is False and read.value.kind is Kind.NOT_APPLICABLE:
        return absent("the symbols do not name per_cpu__crash_save_done", Kind.NO_SYMBOL)
    return read


SIGNS = (
    Check(
        "saved-cpus", Subject.CPUS, "xen/common/kexec.c, kexec_crash_save_cpu",
        "its registers are missing from the dump, or would be saved twice", as_written(SAVED, bit(SAVED)),
        {False: "its notes are marked as saved although they are not: its registers are missing from the dump",
         True: "its registers are missing from the dump"}, by_generation=ByGeneration.ONCE_BEGUN,
    ),
    Check(
        "online-cpus", Subject.CPUS, "xen/arch/x86/smp.c, __stop_this_cpu",
        "Xen still counts it as running: later steps are sent to a CPU that is halted, or skip one that is not",
        as_written(ONLINE, bit(ONLINE)),
        {False: "Xen still counts it as running: later steps are sent to a CPU that is halted",
         True: "Xen does not count it as running: later steps of the crash leave it out"},
        by_generation=ByGeneration.ONCE_BEGUN,
    ),
    Check(
        "crash-save-done", Subject.CPUS, "xen/arch/x86/crash.c, do_nmi_crash (77ad1faa6b)",
        "a second NMI stops it twice, or its first one saves nothing",
        as_written(SAVE_DONE, _read_save_done, never="this generation has no crash_save_done",
                   because_of={False: ("online-cpus",)}),  # the stop comes first
        {False: "it is already marked as done: a shootdown NMI then saves nothing and does not stop the LAPIC",
         True: "a second NMI, such as the one it queued to itself, stops it and signs it off again: a count then "
         "leaves out a CPU that has not answered"},
    ),
)  # fmt: skip

CHECKS = (DISPATCH, *WAITING, ANSWERED, ENTRIES, *SIGNS)
