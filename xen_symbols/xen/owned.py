"""What belongs to each CPU, to hold its registers against: its stacks, its idle vCPU, and page tables that map Xen."""

from __future__ import annotations

from collections.abc import Sequence

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.symbols.table import DATA
from xen_symbols.x86 import paging
from xen_symbols.xen.memory import XenMemory, image_region
from xen_symbols.xen.reads import unsigned
from xen_symbols.xen.stacks import CpuStacks, stacks_of_each
from xen_symbols.xen.state import State

_ENTRY_SIZE = 8


class Owned:
    """The belongings of `cpus`, read together. CPUs that are not among them own nothing that is known."""

    def __init__(self, memory: XenMemory, state: State, cpus: Sequence[int]) -> None:
        self._memory = memory
        self._stacks = stacks_of_each(memory, state, [state.of(cpu) for cpu in cpus])
        self._idle_vcpus = _idle_vcpus(memory, cpus)
        self._roots: dict[int, bool | Absent] = {memory.root: True}

    def stacks(self, cpu: int) -> CpuStacks | Absent:
        return self._stacks[cpu]

    def owner(self, rsp: int) -> int | None:
        """The CPU among whose stacks a stack pointer is."""
        return next((cpu for cpu, stacks in self._stacks.items()
                     if not isinstance(stacks, Absent) and stacks.base < rsp <= stacks.end), None)  # fmt: skip

    def unknown(self) -> Absent | None:
        """Why some CPU's stacks are not known, if so: a stack pointer that is on no other may be on these."""
        return next((stacks for stacks in self._stacks.values() if isinstance(stacks, Absent)), None)

    def whose(self, rsp: int) -> str:
        """The same in words, and on which of them."""
        cpu = self.owner(rsp)
        stacks = None if cpu is None else self._stacks[cpu]
        if stacks is None or isinstance(stacks, Absent):
            return "no CPU's stack"
        return f"CPU {cpu}'s {stack.name} stack" if (stack := stacks.at(rsp)) else f"no stack of CPU {cpu}'s"

    def is_idle(self, cpu: int) -> bool | Absent:
        """Whether its idle vCPU runs on it: then it interrupted no guest."""
        stacks, idle = self._stacks[cpu], self._idle_vcpus[cpu]
        for part in (idle, stacks):
            if isinstance(part, Absent):
                return part
        assert not isinstance(stacks, Absent)
        return stacks.current if isinstance(stacks.current, Absent) else stacks.current == idle

    def maps_xen(self, cr3: int) -> bool | Absent:
        """Whether page tables map Xen's image: every root of Xen's has idle_pg_table's entry for it
        (init_xen_l4_slots; before, a copy of all of Xen's slots)."""
        root = cr3 & paging.ADDRESS_MASK
        known = self._roots.get(root)
        if known is None:
            known = self._roots[root] = self._has_xens_entry(root)
        return known

    def _has_xens_entry(self, root: int) -> bool | Absent:
        at = (image_region(self._memory.symbols.address("idle_pg_table")) >> 39 & 0x1FF) * _ENTRY_SIZE
        target = self._memory.target
        xens, its = target.read_physical_many([(self._memory.root + at, _ENTRY_SIZE), (root + at, _ENTRY_SIZE)])
        if isinstance(xens, Absent):
            return xens
        if isinstance(its, Absent):
            return Absent(f"the page tables at {root:#x} could not be read: {its}", its.kind)
        entries = [unsigned(entry) for entry in (xens, its)]
        return bool(entries[1] & 1) and entries[0] & paging.ADDRESS_MASK == entries[1] & paging.ADDRESS_MASK


def _idle_vcpus(memory: XenMemory, cpus: Sequence[int]) -> dict[int, int | Absent]:
    try:
        array = memory.symbols.address("idle_vcpu", DATA)
    except Unreadable as error:
        return dict.fromkeys(cpus, error.absent)
    answers = memory.read_many([(array + 8 * cpu, 8) for cpu in cpus])
    return {cpu: raw if isinstance(raw, Absent) else unsigned(raw)
            for cpu, raw in zip(cpus, answers, strict=True)}  # fmt: skip
