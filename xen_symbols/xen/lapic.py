"""The mode of a local APIC, by the register that holds it or by what Xen means it to be."""

from __future__ import annotations

from xen_symbols.absence import Absent
from xen_symbols.x86 import apic
from xen_symbols.xen.state import CpuState, State

BOOT_MODES = {1: apic.Mode.DISABLED, 2: apic.Mode.XAPIC, 3: apic.Mode.X2APIC}  # ef41e4fb40, enum apic_mode


def lapic_mode(state: State, cpu: CpuState) -> tuple[str | None, str]:
    """(mode, where it is known from). Without the register it is inferred from what Xen means it to be."""
    physical = cpu.physical
    lapic = physical if isinstance(physical, Absent) else physical.lapic
    if not isinstance(lapic, Absent) and not isinstance(lapic.apic_base, Absent):
        return apic.mode(lapic.apic_base).value, lapic.source
    online, boot, running = (state.system[name] for name in ("online", "apic_boot_mode", "x2apic_enabled"))
    stopped = cpu.crash_save_done.present and cpu.crash_save_done.value is True
    offline = online.present and cpu.cpu not in online.value
    if (stopped or offline) and boot.present and boot.value in BOOT_MODES:
        why = "it has been stopped" if stopped else "it is not online"
        return BOOT_MODES[boot.value].value, f"inferred from apic_boot_mode: {why}"
    if running.present:
        mode = apic.Mode.X2APIC if running.value else apic.Mode.XAPIC
        return mode.value, "inferred from x2apic_enabled"
    return None, "not known"
