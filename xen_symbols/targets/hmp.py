"""What QEMU's human monitor prints, read where no structured way exists: pure functions on its text.

gdb reaches the monitor through the gdbstub itself (`monitor …`), so this works without a QMP socket. The layouts are
those of QEMU's target/i386/cpu-dump.c (registers, local APIC) and memory.c (flat views), as in 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.targets import Lapic, PhysicalCpu

NEEDS_QMP = Absent("needs QEMU's QMP socket: set xen qmp-socket PATH, or --qmp PATH")
SOURCE = "QEMU monitor"

_CPU_HEAD = re.compile(r"^CPU#(\d+)\r?$", re.MULTILINE)
_REGISTER = re.compile(r"\b([A-Z][A-Z0-9]{1,3}) ?= *([0-9a-f]+)\b")
_SEGMENT = re.compile(r"^(LDT|TR|GDT|IDT) ?= *([0-9a-f ]+?) *(?:DPL=.*)?$", re.MULTILINE)
_MI_OUTPUT = re.compile(r'^@"((?:[^"\\]|\\.)*)"$', re.MULTILINE)
_MI_ESCAPE = re.compile(r"\\([0-7]{3}|.)")
_MI_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


def plain(text: str) -> str:
    """What the monitor printed, as gdb hands it to Python: under MI, gdb 18 hands it on as MI's target output records
    (`@"…"`, GDB's manual 27.2.2), gdb 13 as it is."""
    if not text.startswith('@"'):
        return text

    def unescaped(match: re.Match[str]) -> str:
        word = match[1]
        return chr(int(word, 8)) if len(word) == 3 else _MI_LETTERS.get(word, word)

    return "".join(_MI_ESCAPE.sub(unescaped, record) for record in _MI_OUTPUT.findall(text))


_GENERAL = ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP", "IP")
_NAMES = {
    **{name: name.lower() for name in ("CR0", "CR2", "CR3", "CR4", "EFER", "CS", "SS")},
    **{f"R{number}": f"r{number}" for number in range(8, 16)},
    # A CPU outside 64-bit mode is printed with its 32-bit names.
    **{f"{width}{name}": f"r{name.lower()}" for width in "RE" for name in _GENERAL},
    "RFL": "rflags",
    "EFL": "rflags",
}


def parse_registers(text: str) -> list[PhysicalCpu]:
    """The CPUs of `info registers`, by cpu_index, without APIC ids. Raises Unreadable for any other text."""
    blocks = _CPU_HEAD.split(text)[1:]
    if not blocks:
        raise Unreadable(f"QEMU's monitor does not know 'info registers': it said {text.strip()[:60]!r}")
    return [_cpu(int(number), block.replace("\r", "")) for number, block in zip(blocks[::2], blocks[1::2], strict=True)]


def is_kvm(text: str) -> bool:
    """Whether KVM runs the machine, from `info kvm`."""
    return text.strip() == "kvm support: enabled"


def is_tcg(text: str) -> bool:
    """Whether TCG runs the machine, from `info jit`, which has nothing to say of any other accelerator."""
    return "Translation buffer state:" in text


def names_a_cpu(text: str) -> bool:
    """Whether it is of one or more CPUs' registers at all; what a QEMU before 7.2 says to `info registers N` is not."""
    return _CPU_HEAD.search(text) is not None


def _cpu(index: int, text: str) -> PhysicalCpu:
    text = text.partition("\nFCW=")[0]
    found = {name: int(value, 16) for name, value in _REGISTER.findall(text)}
    tables = {name: [int(word, 16) for word in words.split()] for name, words in _SEGMENT.findall(text)}
    if len(tables.get("IDT", ())) != 2 or len(tables.get("TR", ())) != 4 or "HLT" not in found:
        raise Unreadable(f"QEMU's monitor printed the registers of CPU {index} in an unknown layout")
    return PhysicalCpu(
        index=index,
        registers={ours: found[theirs] for theirs, ours in _NAMES.items() if theirs in found},
        apic_id=Absent("QEMU's monitor lists no APIC for it"),
        idtr=(tables["IDT"][0], tables["IDT"][1]),
        tr_base=tables["TR"][1],
        halted=bool(found["HLT"]),
        nmi_blocked=NEEDS_QMP,
        nmi_pending=NEEDS_QMP,
        guest_mode=NEEDS_QMP,
        lapic=NEEDS_QMP,
        source=SOURCE,
    )


_LAPIC_CPU = re.compile(r"local APIC state for CPU (\d+)")
_LAPIC_VALUE = re.compile(r"^(\w+)\s+0x([0-9a-f]+)", re.MULTILINE)
_LVT = ("LVTT", "LVTTHMR", "LVTPC", "LVT0", "LVT1", "LVTERR")  # in the order of Lapic.lvt


def parse_lapic(text: str, apic_id: int) -> tuple[int, Lapic] | None:
    """(cpu_index, its LAPIC) from `info lapic APIC-ID`; None if no CPU has this id.

    The mode is never printed: "(X2APIC ID)" follows what the CPU could do, not what it does.
    """
    number = _LAPIC_CPU.search(text)
    if number is None:
        return None
    values = {name: int(value, 16) for name, value in _LAPIC_VALUE.findall(text.replace("\r", ""))}
    missing = Absent("QEMU's monitor did not print it")
    return int(number[1]), Lapic(
        source=SOURCE,
        apic_base=NEEDS_QMP,
        apic_id=apic_id,
        spiv=values.get("SPIV", missing),
        icr_low=values.get("ICR", missing),
        icr_high=values.get("ICR2", missing),
        lvt=tuple(values[name] for name in _LVT) if all(name in values for name in _LVT) else missing,
    )


def with_lapics(cpus: Sequence[PhysicalCpu], lapics: Sequence[tuple[int, Lapic]]) -> list[PhysicalCpu]:
    """Those CPUs with the APIC ids and LAPICs that were found for them."""
    found = dict(lapics)
    return [
        cpu._replace(apic_id=found[cpu.index].apic_id, lapic=found[cpu.index]) if cpu.index in found else cpu
        for cpu in cpus
    ]


def without_qmp(cpus: Sequence[PhysicalCpu], why: Absent) -> list[PhysicalCpu]:
    """The monitor's CPUs; `why` says why QMP does not give the rest either."""
    return [
        cpu._replace(
            nmi_blocked=why, nmi_pending=why, guest_mode=why,
            lapic=why if isinstance(cpu.lapic, Absent) else cpu.lapic._replace(apic_base=why),
        )
        for cpu in cpus
    ]  # fmt: skip


def parse_host_threads(text: str) -> list[int]:
    """The host's thread of each CPU, by cpu_index, from `info cpus`: no other machine of this host has them."""
    return [int(thread) for thread in re.findall(r"CPU #\d+:.*?thread_id=(\d+)", text)]


def parse_selected_cpu(text: str) -> int:
    """The monitor's current CPU, by cpu_index, from `info cpus`: `info registers` without a number shows it.

    Raises Unreadable for any other text.
    """
    selected = re.search(r"^\* CPU #(\d+):", text, re.MULTILINE)
    if selected is None:
        raise Unreadable(f"QEMU's monitor does not say which CPU is selected: 'info cpus' said {text.strip()[:60]!r}")
    return int(selected[1])


_VIEW = re.compile(r"^ *AS \"memory\"", re.MULTILINE)
_RANGE = re.compile(r"^ *([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (ram|rom|nv-ram)\)", re.MULTILINE)


def parse_ram(text: str) -> list[tuple[int, int]]:
    """(start, end) of what is RAM or ROM in the machine's physical address space, from `info mtree -f`; ends exclusive.

    Raises Unreadable for any other text. Neighbouring ranges are one.
    """
    for view in re.split(r"^FlatView #\d+\r?$", text, flags=re.MULTILINE)[1:]:
        if _VIEW.search(view):
            merged: list[tuple[int, int]] = []
            for first, last, _ in _RANGE.findall(view):
                start, end = int(first, 16), int(last, 16) + 1
                if merged and merged[-1][1] == start:
                    start = merged.pop()[0]
                merged.append((start, end))
            return merged
    raise Unreadable(f"QEMU's monitor does not show the memory map: 'info mtree -f' said {text.strip()[:60]!r}")
