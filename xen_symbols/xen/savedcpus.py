"""Which CPU's registers each pair of a dump's own crash notes holds (NT_PRSTATUS and Xen's CRASH_REGS).

Tools write a pair for each CPU in the order of Xen's numbers, and none of them has a number: without one of them all
behind it would be taken for another CPU's. So a pair is the CPU's whose notes in Xen's memory are the same, or else on
whose stacks its RSP lies; its place counts only where nothing is missing, and nothing contradicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PhysicalCpu
from xen_symbols.text import ranges
from xen_symbols.x86 import tss
from xen_symbols.xen.cpuinfo import IST_SSP_SIZE, STACK_SIZE, base_by
from xen_symbols.xen.memory import XenMemory
from xen_symbols.xen.reads import Read

NO_PAIR = Absent("the file has no notes of this CPU", Kind.NOT_APPLICABLE)
OF_MEMORY = "Xen's crash notes in its memory"

Registers = Mapping[str, int]


class Pairs(NamedTuple):
    """`of`: each CPU's pair, or why it has none. `left`: pairs with registers of no CPU that could be determined.
    `warnings`: what is wrong with them, a clause each."""

    of: dict[int, PhysicalCpu | Absent]
    left: list[PhysicalCpu]
    warnings: list[str]


def match(
    pairs: Sequence[PhysicalCpu], cpus: Sequence[int], possible: int, saved: Mapping[int, Registers],
    on_stack_of: Callable[[int], int | None], lost: str | None = None,
) -> Pairs:  # fmt: skip
    """Each pair's CPU. `cpus` exist, of `possible`; `saved` is what memory's notes hold, of those that could be read;
    `lost` says that the file may have had more pairs."""
    return _Matching(pairs, cpus, possible, saved, on_stack_of).result(lost)


class _Matching:
    def __init__(
        self, pairs: Sequence[PhysicalCpu], cpus: Sequence[int], possible: int, saved: Mapping[int, Registers],
        on_stack_of: Callable[[int], int | None],
    ) -> None:  # fmt: skip
        self.count, self.cpus, self.saved = len(pairs), list(cpus), saved
        self._existing = frozenset(cpus)
        self.complete = len(pairs) in (possible, len(cpus))
        self.wanted = len(cpus) if len(pairs) <= len(cpus) else possible
        if len(pairs) == len(cpus):  # of those that are present
            pairs = [pair._replace(xen_cpu=cpu) for pair, cpu in zip(pairs, cpus, strict=True)]
        self.of: dict[int, PhysicalCpu] = {}
        self.copies: list[tuple[PhysicalCpu, int]] = []
        self.left: list[PhysicalCpu] = []
        self.unclear: dict[int, Absent] = {}
        full = [pair for pair in pairs if pair.registers]
        self._by_stack(self._by_memory(full), on_stack_of)
        self._by_place()
        self._empty([pair for pair in pairs if not pair.registers])

    def _free(self, cpu: int | None) -> bool:
        return cpu in self._existing and cpu not in self.of and cpu not in self.unclear

    def _by_memory(self, pairs: Iterable[PhysicalCpu]) -> list[PhysicalCpu]:
        """Those that are the same as some CPU's in memory. Returns the others."""
        later = []
        for pair in pairs:  # almost always all of them
            own = pair.xen_cpu
            if own is not None and self._free(own) and self.saved.get(own) == pair.registers:
                self.of[own] = pair
            else:
                later.append(pair)
        holders: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for cpu, registers in self.saved.items() if later else ():
            for part in _parts(registers):
                holders.setdefault(part, []).append(cpu)
        others = []
        for pair in later:
            same = holders.get(_key(pair.registers), [])
            free = [cpu for cpu in same if cpu not in self.of]
            if not same:
                others.append(pair)
            elif not free:
                self.copies.append((pair, same[0]))
            elif len(same) == 1 or _key(self.saved[free[0]]) == _key(pair.registers):  # of several, they are the same
                self.of[free[0]] = pair
            else:
                others.append(pair)
        return others

    def _by_stack(self, pairs: Iterable[PhysicalCpu], on_stack_of: Callable[[int], int | None]) -> None:
        claims: dict[int, list[PhysicalCpu]] = {}
        for pair in pairs:
            rsp = pair.registers.get("rsp")
            cpu = None if rsp is None else on_stack_of(rsp)
            if cpu is None or cpu in self.of:
                self.left.append(pair)
            else:
                claims.setdefault(cpu, []).append(pair)
        for cpu, those in claims.items():
            if any(other.registers != those[0].registers for other in those):
                self.left += those
                self.unclear[cpu] = Absent(f"{len(those)} pairs of the file's notes are on its stacks, and differ")
                continue
            self.of[cpu] = those[0]._replace(source=f"{those[0].source}, by the stack that RSP is on")
            self.copies += [(other, cpu) for other in those[1:]]

    def _in_place(self) -> bool:
        return self.complete and all(pair.xen_cpu == cpu for cpu, pair in self.of.items() if pair.registers)

    def _by_place(self) -> None:
        if self._in_place():
            rest = []
            for pair in self.left:
                if pair.xen_cpu is not None and self._free(pair.xen_cpu):
                    self.of[pair.xen_cpu] = pair
                else:
                    rest.append(pair)
            self.left = rest

    def _empty(self, pairs: Iterable[PhysicalCpu]) -> None:
        """Pairs of CPUs that saved nothing: which of those does not matter."""
        silent = [cpu for cpu in self.cpus if self.saved.get(cpu) == {}]
        in_place = self._in_place()
        for pair in pairs:
            own = pair.xen_cpu
            if own is not None and self._free(own) and (in_place or own in silent):
                self.of[own] = pair
            elif free := next((cpu for cpu in silent if self._free(cpu)), None):
                self.of[free] = pair._replace(xen_cpu=free)
        if self.complete and len(self.left) == 1:
            rest = [cpu for cpu in self.cpus if self._free(cpu)]
            if len(rest) == 1:
                self.of[rest[0]] = self.left.pop()

    def result(self, lost: str | None) -> Pairs:
        missing = Absent(f"the file may have had notes of this CPU: {lost}") if lost else NO_PAIR
        none = dict.fromkeys(self.cpus, missing) | self.unclear
        return Pairs({**none, **self.of}, self.left, list(self._warnings()))

    def _warnings(self) -> Iterable[str]:
        says = []
        if none := [cpu for cpu in self.cpus if cpu not in self.of]:
            says.append(f"none that could be determined to be {_cpus(none)}'s")
        says += [f"pair {pair.index} is a copy of CPU {cpu}'s" for pair, cpu in self.copies]
        if self.left:
            says.append(f"whose {_pairs(self.left)} is could not be determined")
        if moved := [cpu for cpu, pair in self.of.items() if pair.registers and pair.xen_cpu != cpu]:
            says.append(f"{_cpus(moved)}'s at the place of another CPU")
        if self.count != self.wanted or says:
            head = f"the file has {self.count} pair{'s' * (self.count != 1)} for {self.wanted} CPUs"
            yield f"{head} (NT_PRSTATUS and CRASH_REGS){': ' * bool(says)}{'; '.join(says)}"


def _cpus(cpus: Iterable[int]) -> str:
    listed = ",".join(ranges(cpus))
    return f"CPU{'s' * (not listed.isdecimal())} {listed}"


def _pairs(pairs: Sequence[PhysicalCpu]) -> str:
    listed = ",".join(ranges(pair.index for pair in pairs))
    return f"pair{'s' * (len(pairs) > 1)} {listed}"


def _key(registers: Registers) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(registers.items()))


_CONTROL = frozenset(("cr0", "cr2", "cr3", "cr4"))


def _parts(registers: Registers) -> Iterable[tuple[tuple[str, int], ...]]:
    """All of a CPU's registers, and what each note of its pair holds of them: the file may have lost the other."""
    whole = _key(registers)
    control = tuple(item for item in whole if item[0] in _CONTROL)
    general = tuple(item for item in whole if item[0] not in _CONTROL)
    return {part for part in (whole, control, general) if part}


def from_memory(cpu: int, saved: Registers) -> PhysicalCpu:
    """A CPU by its notes in Xen's memory."""
    return PhysicalCpu(cpu, dict(saved), cpu, current=False, of_memory=True, source=OF_MEMORY)


def saved_in(notes: Mapping[int, Read]) -> dict[int, Registers]:
    """What each CPU saved in Xen's memory, of those whose notes could be read."""
    return {cpu: read.value.saved for cpu, read in notes.items() if read.present and not read.value.damaged}


class StackOwners:
    """Whose stacks an address is on, by the TSS in each CPU's per-CPU area: read when it is first asked."""

    def __init__(self, memory: XenMemory, tss_of: Mapping[int, int | Absent]) -> None:
        self._memory, self._tss_of = memory, tss_of
        self._owners: dict[int, int | None] | None = None

    def __call__(self, address: int) -> int | None:
        if self._owners is None:
            self._owners = self._read()
        return self._owners.get((address - 1) & -STACK_SIZE)

    def _read(self) -> dict[int, int | None]:
        """By the base of the stacks; None for one that two CPUs have."""
        places = [(cpu, at + shift) for cpu, at in self._tss_of.items() if not isinstance(at, Absent)
                  for shift in (IST_SSP_SIZE, 0)]  # fmt: skip
        try:
            answers = self._memory.read_many([(at, tss.SIZE) for _, at in places])
        except Unreadable:
            return {}
        owners: dict[int, int | None] = {}
        for (cpu, _), raw in zip(places, answers, strict=True):
            known = None if isinstance(raw, Absent) else base_by(tss.decode(raw))
            if known is not None:
                owners[known[0]] = cpu if owners.get(known[0], cpu) == cpu else None
        return owners
