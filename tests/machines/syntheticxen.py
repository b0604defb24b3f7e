"""A crashed Xen of generation 4.17.0 as bytes: any number of CPUs, in as little memory as possible.

Image at physical XEN_PHYS_START by one 2 MiB page per 2 MiB, direct map by 1 GiB pages, as Xen itself maps them.
Used if no recorded machine is large enough: thousands of CPUs, sparse dumps of 64 GB.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.machines import dumpwriter, elfwriter, pewriter
from tests.machines import dumpwriter as writer
from xen_symbols.x86.gate import INTERRUPT_GATE, Gate

VIRT_START = 0xFFFF82D040000000
DIRECTMAP = 0xFFFF830000000000
PHYS_START = 0x3F800000
# Per-CPU areas, IDTs and notes of the other CPUs, through the direct map.
HEAP = 0x80000000
TRAMPOLINE = 0x8F000  # below 1 MiB, where CPUs start
BUILD_ID = bytes(range(20))
_PRESENT, _PS = 1, 1 << 7


_TSS_PAGE = 64  # of the per-CPU area; struct tss_page begins with ist_ssp[]


def stack(cpu: int) -> int:
    """Where a CPU's stacks begin; nothing is in them."""
    return DIRECTMAP + 0x10000000 + (cpu << 15)


def _tss_page(cpu: int) -> bytes:
    """With the IST numbers of 4.14: #MC 1, NMI 2, #DB 3, #DF 4."""
    base, poison = stack(cpu), 0x8600111111111111
    ist = [base + 4096 * (1 + number) for number in (1, 2, 3, 4)]
    tss = struct.pack("<4x3Q8x7Q12x", base + (32 << 10) - 96, poison, poison, *ist, *[poison] * 3)
    return bytes(64) + tss


@dataclass
class SyntheticXen:
    """`variables` are symbols by name with their bytes; `content` is physical memory. `efi`: it booted xen.efi.

    `tables` is where those page tables are that Xen allocates, if not in the image; `memory_map` has (address, size,
    type) of each of its e820 entries. `areas` has the physical address of each other CPU's per-CPU area; 4096 bytes on
    is its IDT.
    """

    cpus: int
    efi: bool = False
    tables: int | None = None
    memory_map: Sequence[tuple[int, int, int]] = ()
    content: dict[int, bytes] = field(default_factory=dict)
    symbols: dict[str, tuple[int, str]] = field(default_factory=dict)
    areas: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._next = VIRT_START + (0x600000 if self.efi else 0x400000)
        self._text()
        self._tables()
        self._state()

    def _text(self) -> None:
        names = (
            "_start trap_nop nmi machine_check double_fault do_nmi do_nmi_crash kexec_crash machine_crash_shutdown "
            "smp_send_nmi_allbutself kexec_crash_save_cpu __stop_this_cpu kexec_crash_save_info machine_kexec "
            "kexec_reloc _etext"
        )
        for number, name in enumerate(names.split()):
            self.symbols[name] = (VIRT_START + 0x200000 + 0x1000 * number, "T")
        note = pewriter.build_id_record() if self.efi else dumpwriter.note("GNU", 3, BUILD_ID)
        self._place("__note_gnu_build_id_start", note, "R")
        start = self._place("__base_relocs_start", bytes(0x100), "R")
        self.symbols["__base_relocs_end"] = (start + (0x100 if self.efi else 0), "R")

    def _place(self, name: str, data: bytes, kind: str = "B") -> int:
        """A variable of the image."""
        address = self._next
        self._next += (len(data) + 63) & ~63
        self.symbols[name] = (address, kind)
        self.content[address - VIRT_START + PHYS_START] = data
        return address

    def _tables(self) -> None:
        self._next = (self._next + 4095) & ~4095
        root = self._next
        self.symbols["idle_pg_table"] = (root, "B")
        self._next += 4096 * 4
        physical = root - VIRT_START + PHYS_START
        l4, image_l3, image_l2, direct_l3 = (physical + 4096 * i for i in range(4))
        self.root = l4
        if self.tables is not None:
            image_l2, direct_l3 = self.tables, self.tables + 4096

        def entry(table: int, address: int, shift: int, value: int) -> None:
            self.content[table + 8 * (address >> shift & 511)] = struct.pack("<Q", value)

        entry(l4, VIRT_START, 39, image_l3 | _PRESENT)
        entry(image_l3, VIRT_START, 30, image_l2 | _PRESENT)
        for offset in range(0, 16 << 20, 2 << 20):
            entry(image_l2, VIRT_START + offset, 21, PHYS_START + offset | _PRESENT | _PS)
        entry(l4, DIRECTMAP, 39, direct_l3 | _PRESENT)
        for gigabyte in range(64):
            entry(direct_l3, DIRECTMAP + (gigabyte << 30), 30, gigabyte << 30 | _PRESENT | _PS)

    def _state(self) -> None:
        count = self.cpus
        text = {name: address for name, (address, _) in self.symbols.items()}
        start = self._place("__per_cpu_start", bytes(_TSS_PAGE) + _tss_page(0))
        self.symbols["per_cpu__crash_save_done"] = (start, "B")
        self.symbols["per_cpu__tss_page"] = (start + _TSS_PAGE, "B")
        words = 8 * ((count + 63) // 64)

        def mask(cpus: range) -> bytes:
            return sum(1 << cpu for cpu in cpus).to_bytes(words, "little")

        def idt(nmi: Gate, mc: Gate) -> bytes:
            df = Gate(text["double_fault"], 0xE008, 4, INTERRUPT_GATE, 0, True)
            gates = {2: nmi, 8: df, 18: mc}
            return b"".join(gates[vector].raw if vector in gates else bytes(16) for vector in range(256))

        nop = Gate(text["trap_nop"], 0xE008, 0, INTERRUPT_GATE, 0, True)
        own = self._place("idt_table", idt(nop, nop))
        other = idt(Gate(text["nmi"], 0xE008, 2, INTERRUPT_GATE, 0, True), nop)

        heap = HEAP
        offsets, idts, buffers = [0], [own], []
        for cpu in range(count):
            self.content[heap] = self._notes(cpu)
            buffers.append(struct.pack("<QQ", DIRECTMAP + heap, 404))
            heap += 512
            if cpu:
                self.areas[cpu] = heap
                self.content[heap] = b"\1".ljust(_TSS_PAGE, b"\0") + _tss_page(cpu)
                offsets.append((DIRECTMAP + heap - start) % (1 << 64))
                self.content[heap + 4096] = other
                idts.append(DIRECTMAP + heap + 4096)
                heap += 8192
        self.content[heap] = b"".join(buffers)
        array = DIRECTMAP + heap
        self.end = heap + 16 * count
        values: Mapping[str, bytes] = {
            "nr_cpu_ids": struct.pack("<I", count),
            "__per_cpu_offset": struct.pack(f"<{count}Q", *offsets),
            "idt_tables": struct.pack(f"<{count}Q", *idts),
            "x86_cpu_to_apicid": struct.pack(f"<{count}I", *range(count)),
            "e820": struct.pack("<I", len(self.memory_map)) + self._entries(),
            "idle_vcpu": bytes(8 * count),
            "vmcoreinfo_data": self._vmcoreinfo().ljust(4096, b"\0"),
            "xen_phys_start": struct.pack("<Q", PHYS_START),
            "trampoline_phys": struct.pack("<Q", TRAMPOLINE),
            "kexecing": b"\1",
            "kexec_flags": struct.pack("<Q", 0x44),
            "kexec.c#crashing_cpu": struct.pack("<i", 0),
            "crash_saved_cpus": mask(range(count)),
            "cpu_online_map": bytes(words),
            "waiting_to_crash": bytes(words),
            "traps.c#nmi_callback": struct.pack("<Q", text["do_nmi_crash"]),
            "x2apic_enabled": b"\0",
            "apic_boot_mode": struct.pack("<I", 2),
            "crash_notes": struct.pack("<Q", array),
            "conring": struct.pack("<Q", self._place("_conring", b"(XEN) Shot down all CPUs\n".ljust(4096, b"\n"))),
            "conring_size": struct.pack("<I", 4096),
            "conringc": bytes(4),
            "conringp": struct.pack("<I", 25),
        }
        for name, data in values.items():
            self._place(name, data, "b" if "#" in name else "B")
        for offset, name in enumerate(("trampoline_start", "trampoline_xen_phys_start")):
            self.symbols[name] = (VIRT_START + 0x3F0000 + 4 * offset, "R")
        self.content[TRAMPOLINE + 4] = struct.pack("<I", PHYS_START)
        self._place("_end", b"\0", "B")

    def _entries(self) -> bytes:
        return b"".join(struct.pack("<QQI", *entry) for entry in self.memory_map)

    def _registers(self, cpu: int) -> dict[str, int]:
        rip = self.symbols["kexec_crash_save_cpu"][0] + 0xB2
        nmi_stack = stack(cpu) + 3 * 4096
        return {"rip": rip, "cs": 0xE008, "rflags": 2, "rsp": nmi_stack - 0xF0, "cr0": 0x80050033, "cr3": self.root,
                "cr4": 0x6E0}  # fmt: skip

    def _vmcoreinfo(self) -> bytes:
        """The note, with all but one of its lines left out."""
        return dumpwriter.note("VMCOREINFO_XEN", 0, f"SYMBOL(pgd_l4)={self.symbols['idle_pg_table'][0]:x}\n".encode())

    def _notes(self, cpu: int) -> bytes:
        registers = self._registers(cpu)
        notes = dumpwriter.note("CORE", 1, dumpwriter.prstatus(registers))
        notes += dumpwriter.note("Xen", 0x1000002, dumpwriter.crash_regs(registers))
        if cpu == 0:
            notes += dumpwriter.note("Xen", 0x1000001, dumpwriter.crash_info(xen_phys_start=PHYS_START))
        return notes

    def map_file(self) -> str:
        """The symbols as a `.map`."""
        rows = sorted((address, kind, name) for name, (address, kind) in self.symbols.items())
        return "".join(f"{address:016x} {kind} {name}\n" for address, kind, name in rows)

    def notes(self) -> bytes:
        """The notes of a vmcore."""
        info = dumpwriter.crash_info(xen_phys_start=PHYS_START)
        return dumpwriter.xen_notes([self._registers(cpu) for cpu in range(self.cpus)], info=info)


IMAGE = (PHYS_START, PHYS_START + (8 << 20))
RANGES = [IMAGE, (HEAP, HEAP + (1 << 20))]


class CrashedXen:
    """A crashed Xen that carries its symbols, its notes as in a vmcore, and its symbols in a file."""

    def __init__(self, folder: Path, cpus: int = 2, table: int = 0x300000, *, efi: bool = False) -> None:
        self.folder = folder
        self.xen = SyntheticXen(cpus, efi)
        rows = sorted((address - VIRT_START, kind + name) for name, (address, kind) in self.xen.symbols.items())
        self.xen.content[PHYS_START + table] = elfwriter.embedded_table(rows)
        self.symbols = folder / "map"
        self.symbols.write_text(self.xen.map_file())
        self.pgd = f"SYMBOL(pgd_l4)={self.xen.symbols['idle_pg_table'][0]:x}\n"
        self.notes = self.xen.notes() + writer.note("VMCOREINFO_XEN", 0, self.pgd.encode())

    def elf(self, ranges: writer.Ranges = RANGES, notes: bytes | None = None) -> Path:
        path = self.folder / "vmcore"
        with path.open("wb") as file:
            writer.write_elf(file, ranges, self.xen.content, self.notes if notes is None else notes)
        return path

    def kdump(self, **options: object) -> Path:
        path = self.folder / "kdump"
        with path.open("wb") as file:
            writer.write_kdump(file, RANGES, self.xen.content, self.notes, **options)  # type: ignore[arg-type]
        return path
