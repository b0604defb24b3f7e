"""Reads as a debug stub's packets: neighbours go out as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# The most that any QEMU's stub returns for one read: up to 10.0 MAX_PACKET_LENGTH / 2 (gdbstub.c); 11.1 takes 64 KiB.
PACKET = 2048
# A packet costs 0.05 ms, and gdb takes its answer byte by byte: 600 to 1000 bytes more cost as much as another packet.
_GAP = 1024


def merged(requests: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(start, end, members) of ascending (address, size) requests, near neighbours together up to one packet."""
    members: list[tuple[int, int]] = []
    start = end = 0
    for address, size in requests:
        if members and address - end <= _GAP and max(end, address + size) - start <= PACKET:
            end = max(end, address + size)
        else:
            if members:
                yield start, end, members
            members, start, end = [], address, address + size
        members.append((address, size))
    if members:
        yield start, end, members


def pieces(address: int, size: int) -> Iterator[tuple[int, int]]:
    """(address, size) of the packets that one read takes."""
    return ((at, min(PACKET, address + size - at)) for at in range(address, address + size, PACKET))
