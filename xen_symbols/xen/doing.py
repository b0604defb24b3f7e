"""What a CPU was doing before it came to the crash path: the newest place on its way back that is not part of that."""

from __future__ import annotations

from xen_symbols.absence import Absent
from xen_symbols.records import NamedTuple
from xen_symbols.xen.backtrace import Backtrace, Step

# What is run because of a crash, from its beginning to the end of a CPU.
_OF_A_CRASH = {
    "kexec_crash_save_cpu", "elf_core_save_regs", "kexec_crash", "panic", "machine_crash_shutdown", "machine_kexec",
    "kexec_reloc", "kexec_crash_save_info", "one_cpu_only", "kexec_common_shutdown", "nmi_shootdown_cpus",
}  # fmt: skip
# Handlers that lead to a crash, or stop a CPU for one: what they interrupted is what the CPU was doing.
_HANDLERS = {
    "do_nmi", "do_nmi_crash", "nmi_crash", "crash_nmi_callback", "handle_ist_exception", "fatal_trap", "do_page_fault",
    "do_invalid_op", "do_double_fault", "do_general_protection", "do_trap", "do_reserved_trap", "do_unhandled_trap",
    "do_machine_check", "do_int3", "do_debug", "do_stack_segment", "do_device_not_available",
    "__stop_this_cpu", "stop_this_cpu", "disable_local_APIC",
}  # fmt: skip
_BEGIN = {"kexec_crash", "do_nmi_crash", "nmi_crash", "crash_nmi_callback"}


class Doing(NamedTuple):
    """`at` is a place in Xen (name+offset), or None in a guest; `event` what interrupted it there, if anything did.

    `step` is that of the way back which has it.
    """

    at: str | None
    event: str | None
    step: Step | None


def function(place: str) -> str:
    """The function of `name+0x12`, or of `name+0x12/0x80`."""
    return place.partition("+")[0]


def doing(trace: Backtrace) -> Doing | Absent:
    """Absent with the reason where its registers are not known, or show nothing."""
    if not trace.steps:
        return trace.registers or Absent(trace.end or "its registers are not known")
    # Another exception may have come on the crash path: the outermost part of it is what interrupted the CPU.
    began = [at for at, step in enumerate(trace.steps) if _BEGIN.intersection(map(function, _places(step)))]
    first, *others = trace.steps[max(began, default=0) :]
    if first.cs & 3:
        return Doing(None, None, first)
    handled = False
    for place in _places(first):
        name = function(place)
        handled = handled or name in _HANDLERS
        if handled and (others or trace.guest is not None):
            break
        if name not in _HANDLERS | _OF_A_CRASH:
            return Absent(trace.end) if place.startswith("0x") else Doing(place, None, first)
    if others:
        step = others[0]
        return Doing(None if step.cs & 3 else step.name, step.frame and step.frame.name, step)
    if trace.guest is not None:
        return Doing(None, trace.guest.name, None)
    return Absent(f"only the crash path is on its stack: {trace.end}")


def _places(step: Step) -> list[str]:
    return [step.name, *(call.name for call in step.calls)]
