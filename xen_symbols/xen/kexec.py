"""The crash kernel: whether one is loaded, the memory reserved for it, and what its image takes of that.

xen/include/public/kexec.h and xen/common/kexec.c: bit 5 of kexec_flags selects which of the crash images, bits 2 and 3,
is live; bit 6 (KEXEC_IMAGE_NR + 2) is KEXEC_FLAG_IN_PROGRESS.
"""

from __future__ import annotations

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.symbols.table import DATA
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import Read, in_memory, unsigned
from xen_symbols.xen.state import State

_IMAGE_CRASH_BASE = 2
_FLAG_CRASH_POS, _FLAG_IN_PROGRESS = 5, 6
_MOST_SEGMENTS = 16  # KEXEC_SEGMENT_MAX (xen/include/xen/kimage.h)


class CrashArea(NamedTuple):
    """What crashkernel= reserved: bytes, and the physical address; no bytes where nothing was."""

    size: int
    start: int


def crash_image_loaded(flags: int) -> bool:
    """Whether `kexec_flags` says that a crash image is loaded."""
    return bool(flags >> _image(flags) & 1)


def is_crash_image_loaded(state: State) -> bool | None:
    """The same; None where the flags could not be read."""
    flags = state.system["kexec_flags"]
    return crash_image_loaded(flags.value) if flags.present else None


def is_in_progress(flags: int) -> bool:
    """Whether `kexec_flags` says that Xen is on its way into an image, and lets no other be loaded."""
    return bool(flags >> _FLAG_IN_PROGRESS & 1)


def _image(flags: int) -> int:
    return _IMAGE_CRASH_BASE + (flags >> _FLAG_CRASH_POS & 1)


def crash_area(memory: XenMemory) -> Read:
    """kexec_crash_area, a CrashArea. Raises Unreadable."""
    address = memory.symbols.address("kexec_crash_area", DATA)
    raw = memory.read(address, 16)
    return in_memory(CrashArea(unsigned(raw[:8]), unsigned(raw[8:])), address, raw, "kexec_crash_area")


def image_size(memory: XenMemory, flags: int, area: CrashArea) -> int | None:
    """Bytes that the image's segments take in the reserved area; the 1 MiB below is saved elsewhere and does not count.

    None where it is not laid out as since Xen 4.4 (xen/include/xen/kimage.h): nr_segments at 16, segments at 24; in a
    segment its place at 16, its size at 24.
    """
    try:
        image = memory.read(memory.read_uint(memory.symbols.address("kexec_image", DATA) + 8 * _image(flags)), 32)
        count, segments = (unsigned(image[at : at + size]) for at, size in ((16, 4), (24, 8)))
        if not 0 < count <= _MOST_SEGMENTS:
            return None
        raw = memory.read(segments, 32 * count)
    except Unreadable:
        return None
    found = 0
    for at in range(0, len(raw), 32):
        place, size = (unsigned(raw[at + field : at + field + 8]) for field in (16, 24))
        if area.start <= place and place + size <= area.start + area.size:
            found += size
        elif place + size > 1 << 20:
            return None
    return found or None
