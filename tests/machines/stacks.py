"""One CPU's stacks, exception frames and calls, written word by word."""

from __future__ import annotations

import struct
from typing import Any

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.describe.backtrace import describe_backtrace
from xen_symbols.symbols.listed import ListedRows
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.x86.gate import INTERRUPT_GATE, Gate
from xen_symbols.xen.backtrace import backtrace
from xen_symbols.xen.reads import Read, absent
from xen_symbols.xen.state import CpuState, State

BASE = 0xFFFF830000100000  # of the CPU's stacks
TOP = BASE + 0x8000
TEXT = 0xFFFF82D040200000
GUEST = 0xFFFFFFFF81000123
CURRENT, IDLE = 0xFFFF830000500000, 0xFFFF830000600000
TSS_PAGE = 0xFFFF830000200000
POISON = 0x8600111111111111
XEN_CS, GUEST_CS = 0xE008, 0xE033
RFLAGS = 0x246

NAMES = [
    "handle_ist_exception",
    "do_nmi",
    "do_nmi_crash",
    "default_idle",
    "idle_loop",
    "handle_exception_saved",
    "last",
]
FUNCTION = {name: TEXT + 0x100 * number for number, name in enumerate(NAMES)}


def inside(name: str) -> int:
    """A return address, preceded by a call of `last`."""
    return FUNCTION[name] + 0x20


class Stacks:
    """One CPU of a Xen with the old (IST #DF 1, NMI 2, #MC 3) or the new numbers (#MC 1, NMI 2, #DB 3, #DF 4)."""

    def __init__(self, new: bool = True, cpu: int = 1) -> None:
        self.new, self.cpu = new, cpu
        self.info_size = 264 if new else 232
        self.guest_regs = TOP - self.info_size
        pages = {"#MC": 1, "NMI": 2, "#DB": 3, "#DF": 4} if new else {"#DF": 1, "NMI": 2, "#MC": 3}
        self.tops = {name: BASE + (number + new) * 0x1000 - 32 * (name == "#DF" and new)
                     for name, number in pages.items()}  # fmt: skip
        self.memory: dict[int, int] = {}  # words; anything else is not mapped
        for at in range(BASE, TOP, 8):
            self.memory[at] = 0
        tops = sorted(self.tops.values())
        self.put_tss(TSS_PAGE + 64 * new, self.guest_regs + 168, [*tops, *[POISON] * (7 - len(tops))])
        offset = 64 if new else 32
        self.memory[TOP - offset] = 0xE010 << 32 | cpu
        self.memory[TOP - offset + 8] = CURRENT
        rows = [(address, "T", name) for name, address in FUNCTION.items()]
        rows += [(TEXT + 0x1000, "T", "_etext"), (TEXT + 0x300000, "D", "idle_pg_table"),
                 (TEXT + 0x304000, "D", "idle_vcpu"), (TEXT + 0x305000, "D", "_end")]  # fmt: skip
        self.text = bytearray(0x100 * len(FUNCTION))
        for name in FUNCTION:
            self.call_before(inside(name))
        self.text_end = TEXT + len(self.text)
        self.memory[TEXT + 0x304000 + 8 * cpu] = IDLE
        self.symbols = _symbols(rows)
        self.registers: dict[str, int] | Absent = {}
        self.more: dict[str, Any] = {}
        self.df_ist = 4 if new else 1

    # -- writing

    def put_tss(self, at: int, rsp0: int, ist: list[int]) -> None:
        raw = struct.pack("<4x3Q8x7Q12x", rsp0, POISON, POISON, *ist).ljust(0x100, b"\0")
        for offset in range(0, 0x100 - at % 0x100, 8):
            self.memory[at + offset] = int.from_bytes(raw[offset : offset + 8], "little")
        if at % 0x1000:
            for offset in range(0, at % 0x1000, 8):
                self.memory[(at & -0x1000) + offset] = 0

    def frame(self, end: int, vector: int, rip: int, rsp: int, cs: int = XEN_CS, **more: int) -> int:
        ss = more.get("ss", 0 if cs & 3 == 0 else 0xE02B)
        words = [*range(0x100, 0x10F), vector << 32, rip, cs, more.get("rflags", RFLAGS), rsp, ss]
        for number, word in enumerate(words):
            self.memory[end - 168 + 8 * number] = word
        return end - 168

    def code_before(self, address: int, code: bytes) -> None:
        self.text[address - TEXT - len(code) : address - TEXT] = code

    def call_before(self, address: int) -> None:
        self.code_before(address, b"\xe8" + struct.pack("<i", FUNCTION["last"] - address))

    def at(self, name: str, rsp: int, cs: int = XEN_CS, **more: Any) -> None:
        rip = inside(name) if name in FUNCTION else GUEST
        self.registers = {"rip": rip, "rsp": rsp, "cs": cs}
        self.more = more

    # -- what the reader gets

    def read(self, address: int, size: int) -> bytes:
        if address >= TEXT and address + size <= self.text_end:
            return bytes(self.text[address - TEXT : address - TEXT + size])
        first = address & ~7
        words = [self.memory.get(at) for at in range(first, address + size, 8)]
        if None in words:
            raise Unreadable(f"{address:#x} is not mapped")
        raw = b"".join(word.to_bytes(8, "little") for word in words if word is not None)
        return raw[address - first : address - first + size]

    def read_many(self, requests: list[tuple[int, int]]) -> list[bytes | Absent]:
        answers: list[bytes | Absent] = []
        for request in requests:
            try:
                answers.append(self.read(*request))
            except Unreadable as error:
                answers.append(error.absent)
        return answers

    def read_uint(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.read(address, size), "little")

    def trace(self, fred: int = 0) -> dict[str, Any]:
        physical: PhysicalCpu | Absent
        if isinstance(self.registers, Absent):
            physical = self.registers
        else:
            physical = PhysicalCpu(0, self.registers, source="a test", **self.more)
        gate = Gate(FUNCTION["last"], XEN_CS, self.df_ist, INTERRUPT_GATE, 0, True)
        nothing = absent("not needed")
        known = CpuState(self.cpu, True, 0, nothing, nothing, nothing, nothing, Read(gate), nothing, TSS_PAGE, nothing,
                         physical)  # fmt: skip
        state = State(self.symbols, {"fred": Read(fred)}, {self.cpu: known})
        return describe_backtrace(backtrace(self, state, known))  # type: ignore[arg-type]


def _symbols(rows: list[tuple[int, str, str]]) -> SymbolTable:
    rows = sorted(rows)
    return SymbolTable("", "test", ListedRows(*map(list, zip(*rows, strict=True))), [(TEXT, TEXT + 0x305000)])


def in_nmi_crash(machine: Stacks) -> None:
    """As every other CPU is at the handover: shot down in the idle loop."""
    end = machine.tops["NMI"]
    machine.memory[TOP - 0x400] = inside("idle_loop")
    machine.frame(end, 2, inside("default_idle"), TOP - 0x408)
    machine.memory[end - 168 - 8] = inside("handle_ist_exception")
    machine.memory[end - 168 - 32] = inside("do_nmi")
    machine.at("do_nmi_crash", end - 168 - 40)
