"""An IRET that returns to the instruction after it: what unblocks NMIs and does nothing else (SDM vol. 3, 6.7.1)."""

from __future__ import annotations

_IRETQ = b"\x48\xcf"  # SDM vol. 2, IRET/IRETD/IRETQ
_LEA_BYTES = 7  # REX.W 8D /r with a 32-bit displacement from RIP
_LEA, _REX_W, _RIP_RELATIVE = 0x8D, (0x48, 0x4C), 0x05  # mod 0, r/m 5


def returns_to_next(code: bytes, address: int) -> int | None:
    """The address after such an IRETQ in `code`, which begins at `address`: one to whose successor a LEA before it
    leads, for the frame; None for none."""
    targets = {target for at in range(len(code)) if (target := _lea_target(code, at, address)) is not None}
    at = code.find(_IRETQ)
    while at >= 0:
        after = address + at + len(_IRETQ)
        if after in targets:
            return after
        at = code.find(_IRETQ, at + 1)
    return None


def holds_iretq(code: bytes) -> bool:
    """Whether there may be any IRETQ in it: where its bytes are not, it is not."""
    return _IRETQ in code


def _lea_target(code: bytes, at: int, address: int) -> int | None:
    """What the LEA at an offset makes of RIP; None for another instruction."""
    lea = code[at : at + _LEA_BYTES]
    if len(lea) < _LEA_BYTES or lea[0] not in _REX_W or lea[1] != _LEA or lea[2] & 0xC7 != _RIP_RELATIVE:
        return None
    return address + at + _LEA_BYTES + int.from_bytes(lea[3:], "little", signed=True)
