"""Exception frames (struct cpu_user_regs): decoded, and distinguished from words that only look like one."""

from __future__ import annotations

import struct

from xen_symbols.records import NamedTuple
from xen_symbols.x86.gate import VECTOR_NAMES
from xen_symbols.x86.paging import is_canonical
from xen_symbols.xen.memory import HYPERVISOR_CS, image_region
from xen_symbols.xen.stacks import REGS_SIZE

PUSHED_SIZE = 40  # by the CPU: rip, cs, rflags, rsp, ss (SDM vol. 3, 6.14.2)
_GENERAL = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi".split()  # as struct cpu_user_regs begins
_SYSCALL = 0x100  # TRAP_syscall: no vector, but the SYSCALL instruction
_SELECTOR = 0xFFFF  # Xen keeps more in the words of cs and ss
_TAIL = struct.Struct("<II5Q")  # error_code, entry_vector, rip, cs, rflags, rsp, ss; 15 registers lie below
_RFLAGS_ONE = 1 << 1  # SDM vol. 1, 3.4.3: bit 1 is 1; 3, 5, 15 and 22 to 63 are 0
_RFLAGS_ZERO = 1 << 3 | 1 << 5 | 1 << 15 | ~((1 << 22) - 1)


class Frame(NamedTuple):
    """What was interrupted, and by which vector; `vector` is None where the entry code has not stored it yet."""

    address: int  # of struct cpu_user_regs, 168 bytes below its end
    vector: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int

    @property
    def ring(self) -> int:
        return self.cs & 3

    @property
    def end(self) -> int:
        return self.address + REGS_SIZE

    @property
    def name(self) -> str:
        """The event, as people call it."""
        if self.vector is None:
            return "an event"
        if self.vector == _SYSCALL:
            return "a system call or hypercall"
        return VECTOR_NAMES.get(self.vector, f"interrupt {self.vector:#x}")


def decode(raw: bytes, address: int, *, stored: bool = True) -> Frame:
    """A frame from its 168 bytes. `stored`: whether the entry code has got as far as the vector."""
    _, vector, rip, cs, rflags, rsp, ss = _TAIL.unpack_from(raw, REGS_SIZE - _TAIL.size)
    return Frame(address, vector & 0xFFFF if stored else None, rip, cs & _SELECTOR, rflags, rsp, ss & _SELECTOR)


def registers(raw: bytes) -> dict[str, int]:
    """The general registers of a frame's 168 bytes, by name."""
    return dict(zip(_GENERAL, struct.unpack_from(f"<{len(_GENERAL)}Q", raw), strict=True))


def problem(frame: Frame, xen: int, vector: int | None = None) -> str | None:
    """Why this is not a frame; None if it can be. `xen` is any address of Xen's image, `vector` the one expected."""
    if vector is not None and frame.vector not in (vector, None):
        return f"the vector there is {frame.vector}, not {vector}"
    if not is_canonical(frame.rip) or not is_canonical(frame.rsp):
        return "rip or rsp there is not canonical"
    if not frame.rflags & _RFLAGS_ONE or frame.rflags & _RFLAGS_ZERO:
        return f"rflags there are {frame.rflags:#x}, which is impossible"
    if frame.ss & 3 != frame.ring:
        return f"cs {frame.cs:#x} and ss {frame.ss:#x} there are of different rings"
    if frame.ring == 0 and frame.cs != HYPERVISOR_CS:
        return f"cs there is {frame.cs:#x}, neither Xen's nor a guest's"
    if frame.ring == 0 and image_region(frame.rip) != image_region(xen):
        return f"cs there is Xen's, and rip {frame.rip:#x} is not"
    return None


def pushed_here(frame: Frame) -> bool:
    """Whether the CPU pushed it where it lies without changing stacks: rsp, aligned to 16, is its end."""
    return frame.ring == 0 and frame.rsp & -16 == frame.end
