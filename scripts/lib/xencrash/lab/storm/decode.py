"""What an instruction does to memory, by the disassembler capstone (extra `storm`): its only importer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from xen_symbols.records import NamedTuple
from xencrash.lab.errors import LabError
from xencrash.lazy import load

_ALIASES = {
    **{f"e{name}": f"r{name}" for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")},
    **{f"r{number}d": f"r{number}" for number in range(8, 16)},
}
_LOCK, _REPEATS = 0xF0, (0xF2, 0xF3)  # prefixes: SDM vol. 2, 2.1.1
_BIT_TESTS = frozenset(("bt", "bts", "btr", "btc"))


class Access(NamedTuple):
    address: int
    size: int
    writes: bool


class Instruction(NamedTuple):
    """One instruction; `operands` are its operands in memory, except what it pushes or pops."""

    pc: int
    size: int
    text: str
    mnemonic: str
    operands: tuple[Operand, ...]

    def accesses(self, registers: Mapping[str, int]) -> list[Access]:
        """The memory that it accesses, by the registers before it."""
        return [operand.access(self.pc + self.size, registers) for operand in self.operands]


class Operand(NamedTuple):
    base: str | None
    index: str | None  # type: ignore[assignment] # hides tuple.index
    scale: int
    displacement: int
    segment: str | None
    size: int
    writes: bool
    bit: str | int | None = None  # of a bit test with a register: the bit may lie beyond the operand
    repeated: bool = False

    def access(self, following: int, registers: Mapping[str, int]) -> Access:
        address = self.displacement
        if self.base == "rip":
            address += following
        elif self.base:
            address += registers[self.base]
        if self.index:
            address += registers[self.index] * self.scale
        if self.segment in ("fs", "gs"):
            address += registers[f"{self.segment}_base"]
        if isinstance(self.bit, str):
            bit = registers[self.bit]
            bit -= 1 << 64 if bit >> 63 else 0
            address += bit // (8 * self.size) * self.size
        size = self.size * (max(registers["rcx"], 1) if self.repeated else 1)
        return Access(address & (1 << 64) - 1, size, self.writes)


@functools.cache
def _engine() -> tuple[Any, Any]:
    """(the disassembler, capstone's constants of x86). Raises LabError where capstone is missing."""
    try:
        capstone = load("capstone")
    except ImportError:
        raise LabError(
            "storm: the disassembler capstone, which finds the words that CPUs share, is missing: "
            "pip install 'xencrash[storm]'"
        ) from None
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    return engine, load("capstone.x86")


def available() -> bool:
    try:
        _engine()
    except LabError:
        return False
    return True


@functools.lru_cache(maxsize=65536)
def decode(pc: int, code: bytes) -> Instruction:
    """The instruction that begins with these bytes. Raises LabError where capstone is missing."""
    engine, x86 = _engine()
    found = next(engine.disasm(code, pc, 1), None)
    if found is None:
        return Instruction(pc, 1, "(bad)", "(bad)", ())
    mnemonic = found.mnemonic.rpartition(" ")[2]
    operands = []
    if mnemonic not in ("lea", "nop", "invlpg", "prefetcht0", "prefetchw") and not mnemonic.startswith("prefetch"):
        for one in found.operands:
            if one.type == x86.X86_OP_MEM:
                operands.append(_operand(x86, found, one, mnemonic))
    return Instruction(pc, found.size, f"{found.mnemonic} {found.op_str}".strip(), mnemonic, tuple(operands))


def _operand(x86: Any, found: Any, one: Any, mnemonic: str) -> Operand:
    def name(register: int) -> str | None:
        text = found.reg_name(register) if register else None
        return _ALIASES.get(text, text) if text else None

    # capstone has cmpxchg read its operand only.
    writes = bool(one.access & 2) or found.prefix[0] == _LOCK or mnemonic.startswith("cmpxchg")
    bit = None
    if mnemonic in _BIT_TESTS and found.operands[1].type == x86.X86_OP_REG:
        bit = name(found.operands[1].reg)
    return Operand(
        name(one.mem.base), name(one.mem.index), one.mem.scale, one.mem.disp, name(one.mem.segment), one.size,
        writes, bit, found.prefix[0] in _REPEATS and mnemonic[:4] in ("movs", "stos", "lods"),
    )  # fmt: skip
