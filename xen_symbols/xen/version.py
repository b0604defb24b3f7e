"""Which Xen this is by its own words: its version, and the command line that it was booted with.

The version is what the functions of xen/common/version.c return, a constant each, so that it is known of a Xen that has
not crashed and has no CRASH_INFO note yet.
"""

from __future__ import annotations

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA, TEXT
from xen_symbols.text import escaped
from xen_symbols.xen.memory import XenMemory

_CODE = 16
_ENDBR64 = bytes.fromhex("f30f1efa")
_LEA_RAX, _MOV_EAX = bytes.fromhex("488d05"), b"\xb8"  # lea disp32(%rip),%rax; mov $imm32,%eax
_STRING = 256
_COMMAND_LINE = 1024  # xen_commandline_t (xen/include/public/version.h)
_PIECE = 16  # what is read of a string at once: it may lie at the very end of what a dump holds


class XenVersion(NamedTuple):
    """`text` is all three, as Xen prints them: 4.17.5."""

    text: str | Absent
    changeset: str | Absent
    compiler: str | Absent
    date: str | Absent


def xen_version(memory: XenMemory) -> XenVersion:
    """What is not known is Absent, with the reason."""
    parts = [_number(memory, "xen_major_version"), _number(memory, "xen_minor_version"),
             _string(memory, "xen_extra_version")]  # fmt: skip
    missing = next((part for part in parts if isinstance(part, Absent)), None)
    text = missing or f"{parts[0]}.{parts[1]}{parts[2]}"
    return XenVersion(text, *(_string(memory, name) for name in ("xen_changeset", "xen_compiler", "xen_compile_date")))


def command_line(memory: XenMemory) -> str | Absent:
    """What Xen keeps of it: 1,023 bytes at most."""
    try:
        return read_string(memory, memory.symbols.address("saved_cmdline", DATA), _COMMAND_LINE)
    except Unreadable as error:
        return error.absent


def read_string(memory: XenMemory, address: int, most: int) -> str:
    """A string of Xen's up to its NUL, with escapes for what a terminal would obey. Raises Unreadable."""
    raw = b""
    while len(raw) < most and b"\0" not in raw:
        raw += memory.read(address + len(raw), min(_PIECE - (address + len(raw)) % _PIECE, most - len(raw)))
    return escaped(raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace"))


def _number(memory: XenMemory, function: str) -> int | Absent:
    return _returned(memory, function, _MOV_EAX)


def _string(memory: XenMemory, function: str) -> str | Absent:
    address = _returned(memory, function, _LEA_RAX)
    if isinstance(address, Absent):
        return address
    try:
        return read_string(memory, address, _STRING)
    except Unreadable as error:
        return error.absent


def _returned(memory: XenMemory, function: str, opcode: bytes) -> int | Absent:
    """What a function returns whose first instruction loads it; a distance is from the next instruction."""
    try:
        start = memory.symbols.address(function, TEXT)
        code = memory.read(start, _CODE)
    except Unreadable as error:
        return error.absent
    at = len(_ENDBR64) * code.startswith(_ENDBR64)
    if not code.startswith(opcode, at):
        return Absent(f"{function}() does not begin with the constant that it returns")
    at += len(opcode)
    value = int.from_bytes(code[at : at + 4], "little", signed=True)
    return start + at + 4 + value if opcode == _LEA_RAX else value
