"""Reads IA32_APIC_BASE with an rdmsr in Xen's own text, executed on each CPU in turn.

This changes registers of a CPU for one instruction and restores them; it happens only after `set xen rdmsr on`. A
halted CPU would never finish the step, and is left alone.
"""

from __future__ import annotations

import gdb

from gdbplugin.kept import kept_selection, setting
from gdbplugin.target import LiveTarget, cpu_index
from xen_symbols.absence import Absent, Undecidable, Unreadable
from xen_symbols.xen.memory import XenMemory, image_region

_RDMSR = b"\x0f\x32"
_FUNCTION = "current_local_apic_mode"
_IA32_APIC_BASE = 0x1B  # SDM vol. 4, table 2-2
_CHANGED = ("rip", "rax", "rcx", "rdx", "eflags")


def measure_modes(memory: XenMemory) -> dict[int, int | Absent]:
    """IA32_APIC_BASE by QEMU's CPU index; for a CPU on which it cannot be read, why. Raises Undecidable."""
    target = memory.target
    assert isinstance(target, LiveTarget)
    if target.accelerator == "kvm":
        raise Undecidable("set xen rdmsr is on: under KVM a step from another rip never ends; use set xen qmp-socket")
    address = _instruction(memory)
    region = image_region(address)
    awake = {cpu.index for cpu in target.cpus() if cpu.halted is False}
    found: dict[int, int | Absent] = {}
    # Without the second, gdb prints where each step ended.
    with kept_selection(), setting("scheduler-locking", "on"), setting("suppress-cli-notifications", "on"):
        for thread in gdb.selected_inferior().threads():
            index = cpu_index(thread)
            if index not in awake:
                found[index] = Absent("it is halted: an instruction stepped there would not finish")
                continue
            thread.switch()
            frame = gdb.newest_frame()
            if image_region(frame.pc()) != region or int(frame.read_register("cs")) & 3:
                found[index] = Absent("it does not run Xen: Xen's text may not be mapped there")
                continue
            found[index] = _step(address)
    return found


def _instruction(memory: XenMemory) -> int:
    try:
        start, end = memory.symbols.extent(_FUNCTION)
        with memory.target.batch():
            at = memory.read(start, end - start).find(_RDMSR)
    except Unreadable as error:
        raise Undecidable(f"set xen rdmsr on: no rdmsr to use: {error}") from None
    if at < 0:
        raise Undecidable(f"set xen rdmsr on: {_FUNCTION} has no rdmsr")
    return start + at


def _step(address: int) -> int | Absent:
    frame = gdb.newest_frame()
    saved = {name: int(frame.read_register(name)) for name in _CHANGED}
    try:
        gdb.execute(f"set $rcx = {_IA32_APIC_BASE}")
        gdb.execute(f"set $rip = {address}")
        gdb.execute("stepi", to_string=True)
        frame = gdb.newest_frame()
        if frame.pc() != address + len(_RDMSR):
            return Absent(f"the step ended at {frame.pc():#x}, not after the rdmsr")
        low, high = (int(frame.read_register(name)) & 0xFFFFFFFF for name in ("rax", "rdx"))
        return high << 32 | low
    finally:
        for name, value in saved.items():
            gdb.execute(f"set ${name} = {value}")
