"""QEMU's device state, as `xen-save-devices-state` writes it: what no gdb register shows.

The stream has section headers and footers and no payload lengths (QEMU migration/savevm.c); all integers are
big-endian. A payload ends at the footer whose successor is a section header or the end of the file. Sections are
found by name and instance, never by position, and only in the versions whose layout was verified here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.targets import Lapic, PhysicalCpu

_NAME = re.compile(rb"[!-~]+")
_HEADER = b"QEVM" + (3).to_bytes(4, "big")
_SECTION_FULL = 0x04
_FOOTER = 0x7E
_VERSIONS = {"cpu_common": 1, "cpu": 12, "apic": 3}

# target/i386/cpu.h
_INTERRUPT_NMI = 0x200
_HF_GUEST = 1 << 21
_HF2_NMI = 1 << 2

_REGISTERS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
_SEGMENTS = "es cs ss ds fs gs ldt tr gdt idt".split()
_SEGMENT = struct.Struct(">IQII")  # selector, base, limit, flags
# Where the cpu section has what is read of it (target/i386/machine.c, vmstate_x86_cpu).
_CPU = {
    "registers": (0, struct.Struct(">18Q")),  # env.regs, env.eip, env.eflags
    "hflags": (144, struct.Struct(">I")),
    "segments": (236, struct.Struct(f">{_SEGMENT.format[1:] * len(_SEGMENTS)}")),  # env.segs, ldt, tr, gdt, idt
    "control": (456, struct.Struct(">4Q")),  # env.cr[0], cr[2], cr[3], cr[4]
    "efer": (816, struct.Struct(">Q")),
    "hflags2": (876, struct.Struct(">I")),
    "nmi": (1170, struct.Struct(">2B")),  # env.nmi_injected, env.nmi_pending
}
_COMMON = struct.Struct(">II")  # halted, interrupt_request (vmstate_cpu_common)
# hw/intc/apic_common.c, vmstate_apic_common: apicbase, id, arb_id, tpr, spurious_vec, log_dest, dest_mode, isr, tmr,
# irr, lvt, esr, icr.
_APIC = struct.Struct(">I B B B I B B 32x 32x 32x 6I I 2I")


class Section(NamedTuple):
    name: str
    instance: int
    version: int
    payload: bytes


Header = tuple[int, str, int, int, int]  # section id, name, instance, version, payload offset


def _section_header(data: bytes, at: int) -> Header | None:
    """The header of a section that starts at `at`, or None if none does."""
    if at + 6 > len(data) or data[at] != _SECTION_FULL:
        return None
    length = data[at + 5]
    end = at + 6 + length
    name = data[at + 6 : end]
    if not length or end + 8 > len(data) or not _NAME.fullmatch(name):
        return None
    instance, version = struct.unpack_from(">II", data, end)
    if version > 64:
        return None
    return int.from_bytes(data[at + 1 : at + 5], "big"), name.decode(), instance, version, end + 8


def sections(data: bytes) -> Iterator[Section]:
    """Every section of a device-state file. Raises Unreadable where the stream cannot be followed."""
    return (section for section, _ in raw_sections(data))


def raw_sections(data: bytes) -> Iterator[tuple[Section, bytes]]:
    """Every section, and its bytes from header to footer. Raises Unreadable."""
    if not data.startswith(_HEADER):
        raise Unreadable("not a QEMU device state of stream version 3")
    at = len(_HEADER)
    header = _section_header(data, at)
    while data[at : at + 1] != b"\0":
        if header is None:
            raise Unreadable(f"QEMU's device state has no section at offset {at:#x}")
        _, name, instance, version, start = header
        end, header = _end(data, header)
        yield Section(name, instance, version, data[start:end]), data[at : end + 5]
        at = end + 5


def _end(data: bytes, header: Header) -> tuple[int, Header | None]:
    """Where the payload of a section ends, and the header after its footer: None at the end. Raises Unreadable."""
    identity, name, _, _, start = header
    footer = bytes([_FOOTER]) + identity.to_bytes(4, "big")
    end = data.find(footer, start)
    while end >= 0:
        after = end + len(footer)
        following = _section_header(data, after)
        if (following is not None and following[0] != identity) or data[after : after + 2] == b"\0":
            return end, following
        end = data.find(footer, end + 1)
    raise Unreadable(f"QEMU's device state ends within section {name}")


def unsavable(migration: Mapping[str, Any]) -> str | None:
    """Why the device state must not be asked for, from the answer to `query-migrate`; None if it may.

    xen-save-devices-state follows a device without a description of its state (amd-iommu up to QEMU 10.0) to a null
    pointer, and QEMU dies. QEMU names such devices first (migration/savevm.c, qemu_savevm_non_migratable_list).
    """
    reasons = [str(reason) for reason in migration.get("blocked-reasons", ())]
    return next((reason for reason in reasons if reason.startswith("non-migratable device")), None)


def parse_cpus(data: bytes) -> list[PhysicalCpu]:
    """The CPUs of a device state, by QEMU's cpu_index. `apic_ids` follow from the caller's `query-cpus-fast`.

    The `apic` section is keyed by initial APIC id, the others by cpu_index; both ascend, so they pair up in order.
    """
    found: dict[str, dict[int, bytes]] = {name: {} for name in _VERSIONS}
    for section in sections(data):
        if section.name not in _VERSIONS:
            continue
        if section.version != _VERSIONS[section.name]:
            raise Unreadable(f"QEMU's {section.name} state is version {section.version}, not {_VERSIONS[section.name]}")
        found[section.name][section.instance] = section.payload
    if not found["cpu"]:
        raise Unreadable("QEMU's device state has no x86 CPU")
    apics = sorted(found["apic"].items())
    if found["cpu"].keys() != found["cpu_common"].keys() or len(found["cpu"]) != len(apics):
        raise Unreadable("QEMU's device state does not have one APIC per CPU")
    return [
        _cpu(index, found["cpu"][index], found["cpu_common"][index], apic_id, apic)
        for index, (apic_id, apic) in zip(sorted(found["cpu"]), apics, strict=True)
    ]


def _cpu(index: int, cpu: bytes, common: bytes, apic_id: int, apic: bytes) -> PhysicalCpu:
    try:
        fields = {name: layout.unpack_from(cpu, at) for name, (at, layout) in _CPU.items()}
        halted, interrupts = _COMMON.unpack_from(common)
        lapic = _lapic(apic)
    except struct.error:
        raise Unreadable(f"QEMU's state of CPU {index} is shorter than its version says") from None
    segments = {name: fields["segments"][4 * i : 4 * i + 4] for i, name in enumerate(_SEGMENTS)}
    registers = dict(zip(_REGISTERS, fields["registers"], strict=True))
    registers |= {name: segments[name][0] for name in ("cs", "ss", "tr")}
    registers |= {"fs_base": segments["fs"][1], "gs_base": segments["gs"][1], "efer": fields["efer"][0]}
    registers |= {"gdt_base": segments["gdt"][1], "gdt_limit": segments["gdt"][2]}
    registers |= dict(zip(("cr0", "cr2", "cr3", "cr4"), fields["control"], strict=True))
    return PhysicalCpu(
        index=index,
        registers=registers,
        apic_id=apic_id,
        idtr=(segments["idt"][1], segments["idt"][2]),
        tr_base=segments["tr"][1],
        halted=bool(halted),
        nmi_blocked=bool(fields["hflags2"][0] & _HF2_NMI),
        # TCG holds it in interrupt_request, KVM in the two bytes (target/i386/kvm, kvm_get_vcpu_events).
        nmi_pending=bool(interrupts & _INTERRUPT_NMI) or any(fields["nmi"]),
        guest_mode=bool(fields["hflags"][0] & _HF_GUEST),
        lapic=lapic,
        source="QEMU device state",
    )


def _lapic(payload: bytes) -> Lapic:
    fields = _APIC.unpack_from(payload)
    base, apic_id, _arb, _tpr, spiv, _log_dest, _dest_mode, *rest = fields
    return Lapic(
        source="QEMU device state",
        apic_base=base,
        apic_id=apic_id,
        spiv=spiv,
        lvt=tuple(rest[:6]),
        icr_low=rest[7],
        icr_high=rest[8],
    )
