"""What a CPU goes on with when something ends its HLT (Intel SDM vol. 2, HLT, JMP and RET; appendix A)."""

from __future__ import annotations

import re

from xen_symbols.absence import Absent

HLT = b"\xf4"
READ = 32  # bytes behind HLT: a compiler's return from a function is shorter

# What a compiler puts between a HLT and the jump or return behind it. No other instruction is decoded.
_STRAIGHT = re.compile(
    rb"""(?:
        \x90 | \x66\x90 | \xf3\x90 | \x0f\x1f(?:[\x00-\x03]|\x40.|\x44\x00.|\x80.{4}|\x84\x00.{4})  # NOP, PAUSE
      | [\xb8-\xbf].{4} | [\x31\x33][\xc0-\xff]  # mov $imm32, %reg; xor %reg, %reg
      | [\x48\x4c]?\x8b[\x45\x4d\x55\x5d\x65\x6d\x75\x7d].  # mov disp8(%rbp), %reg
      | [\x48\x4c]?\x8b[\x44\x4c\x54\x5c\x64\x6c\x74\x7c]\x24.  # mov disp8(%rsp), %reg
      | \x48\x83\xc4. | \x48\x81\xc4.{4} | \x48\x8d\x65.  # add $imm, %rsp; lea disp8(%rbp), %rsp
      | \x41?[\x58-\x5f] | \xc9  # pop; leave
    )*""",
    re.DOTALL | re.VERBOSE,
)
_ENDS = (b"\xc3", b"\xc2", b"\xcc", b"\x0f\x0b")  # ret, ret imm16, int3, ud2
_JUMPS = {0xEB: 1, 0xE9: 4}  # jmp rel8, jmp rel32


def halts_again(code: bytes, address: int, function: tuple[int, int]) -> bool | Absent:
    """Whether `code`, which is at `address` behind a HLT, jumps back in its function [start, end), and so to the HLT.

    False where it returns, traps or leaves the function; Absent where it is other code than that.
    """
    straight = _STRAIGHT.match(code)
    at = straight.end() if straight else 0
    start, end = function
    if address + at >= end or code[at:].startswith(_ENDS):
        return False
    size = _JUMPS.get(code[at]) if at < len(code) else None
    displacement = code[at + 1 : at + 1 + size] if size else b""
    target = address + at + 1 + (size or 0) + int.from_bytes(displacement, "little", signed=True)
    if not size or len(displacement) < size or address <= target < end:
        return Absent(f"what it does behind its HLT is not known from the code there: {code[:8].hex(' ')}")
    return start <= target < address
