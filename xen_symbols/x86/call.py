"""Whether an address can be a return address: a near call ends just before it (SDM vol. 2, CALL)."""

from __future__ import annotations

from collections.abc import Callable

LONGEST = 7  # FF /2 with SIB and a 32-bit displacement, its prefixes aside
_SHORTEST_INDIRECT = 2
_RELATIVE = 0xE8
_GROUP_5 = 0xFF  # /2: near call, indirect


def follows_relative_call(address: int, before: bytes, is_code: Callable[[int], bool]) -> bool:
    """Whether `before`, the LONGEST bytes in front of `address`, end with a relative call of something that is code."""
    if before[-5] != _RELATIVE:
        return False
    return is_code((address + int.from_bytes(before[-4:], "little", signed=True)) % (1 << 64))


def follows_indirect_call(before: bytes) -> bool:
    """Whether the LONGEST bytes in front of an address end with an indirect call."""
    return any(_indirect_length(before[-size:]) == size for size in range(_SHORTEST_INDIRECT, LONGEST + 1))


def _indirect_length(code: bytes) -> int | None:
    """Bytes of the FF /2 instruction that `code` begins with; None if it does not."""
    mod, operation, rm = code[1] >> 6, code[1] >> 3 & 7, code[1] & 7
    if code[0] != _GROUP_5 or operation != 2:
        return None
    if mod == 3:
        return 2
    displacement = {0: 0, 1: 1, 2: 4}[mod]
    sib = 0
    if rm == 4:
        sib = 1
        if mod == 0 and len(code) > 2 and code[2] & 7 == 5:  # no base: a 32-bit displacement instead
            displacement = 4
    elif mod == 0 and rm == 5:  # relative to rip
        displacement = 4
    return 2 + sib + displacement
