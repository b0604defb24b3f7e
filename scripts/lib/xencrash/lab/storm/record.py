"""The crash single-stepped once: which CPU executes what, and which words of memory the CPUs share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xen_symbols.absence import Unreadable
from xen_symbols.records import NamedTuple
from xencrash.lab.errors import LabError
from xencrash.lab.storm import decode
from xencrash.lab.storm.experiment import Place
from xencrash.lab.storm.rsp import SSTEP_ENABLE, SSTEP_MASKED
from xencrash.lab.storm.scene import Scene
from xencrash.lab.storm.snapshot import Live

Progress = Callable[[str], None]

_LOOPS = 16  # an instruction executed this often after the NMIs were sent is in a loop that waits
_HALTS = 0.05  # seconds: a step that takes longer does not complete, because the CPU halts
_LONGEST = 400_000  # instructions of one CPU
_AFTER = 600  # of the crashing CPU, after the handover, at most
_AFTER_LIDT = 8  # and this many after its next IDT: from there on NMIs are the crash kernel's business
_WORD = 8
_INSTRUCTION = 15  # bytes: the longest there is


class Step(NamedTuple):
    place: Place
    waiting: bool = False  # of the crashing CPU, while others have yet to answer
    after: bool = False  # the handover


class Touch(NamedTuple):
    """An access to a word of memory (8 bytes, aligned) by the instruction at a place."""

    place: Place
    word: int
    writes: bool


@dataclass
class Recording:
    steps: list[Step] = field(default_factory=list)
    touches: list[Touch] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)  # of each instruction, if there is a disassembler

    def of(self, cpu: int) -> list[Step]:
        return [step for step in self.steps if step.place.cpu == cpu]

    def first_hits(self, cpu: int) -> list[Step]:
        """Each instruction of a CPU once, in order of execution."""
        return [step for step in self.of(cpu) if step.place.hit == 1]


def shared_words(touches: Iterable[Touch]) -> frozenset[int]:
    """Those that more than one CPU accesses, and at least one writes."""
    readers: dict[int, set[int]] = {}
    written: set[int] = set()
    for touch in touches:
        readers.setdefault(touch.word, set()).add(touch.place.cpu)
        if touch.writes:
            written.add(touch.word)
    return frozenset(word for word, cpus in readers.items() if len(cpus) > 1 and word in written)


def shared_places(recording: Recording) -> dict[int, list[Place]]:
    """By CPU, the places of accesses to shared words, in order; each instruction once, at its first time."""
    words = shared_words(recording.touches)
    found: dict[int, dict[int, Place]] = {}
    for touch in recording.touches:
        if touch.word in words:
            found.setdefault(touch.place.cpu, {}).setdefault(touch.place.pc, touch.place)
    return {cpu: list(places.values()) for cpu, places in found.items()}


def last_of_image(recording: Recording, scene: Scene) -> int | None:
    """The last new instruction of the crashing CPU outside of Xen: whoever gets there executes the crash image.

    Linux's first line comes many seconds later under TCG: the purgatory hashes the image, which decompresses itself.
    """
    steps = recording.first_hits(scene.crashing)
    return next((step.place.pc for step in reversed(steps) if step.after and not scene.is_xen(step.place.pc)), None)


def words_of(address: int, size: int) -> range:
    return range(address // _WORD * _WORD, address + size, _WORD)


class Recorder:
    """Steps the machine through its crash, in the order of an experiment without events."""

    def __init__(self, live: Live, scene: Scene, progress: Progress) -> None:
        self.live, self.rsp, self.scene, self.progress = live, live.rsp, scene, progress
        self.recording = Recording()
        self._hits: Counter[tuple[int, int]] = Counter()
        self._memory = scene.memory(live.target)
        self._code: dict[int, bytes] = {}
        self._decodes = decode.available()
        self._is_ram: dict[int, bool] = {}
        self._noted: dict[int, Mapping[str, int]] = {}

    def record(self) -> Recording:
        """Raises LabError for a crash that does not reach the handover. Completes the scene."""
        scene, crashing = self.scene, self.scene.crashing
        scene.sent = self._to_the_wait(crashing)
        for cpu in scene.others:
            self._other(cpu)
        self._until(crashing, lambda registers: registers["rip"] == scene.handover, "the handover")
        self._onwards(crashing)
        scene.kernel_at = last_of_image(self.recording, scene)
        words = len(shared_words(self.recording.touches))
        self.progress(
            f"{len(self.recording.steps)} instructions recorded; CPUs share {words} words"
            if self._decodes
            else f"{len(self.recording.steps)} instructions recorded, but not which words CPUs share: "
            "that takes a disassembler (pip install 'xencrash[storm]')"
        )
        return self.recording

    def _to_the_wait(self, cpu: int) -> int:
        """Until the crashing CPU waits for the others. Returns where it was when the NMIs had been sent."""
        scene = self.scene
        registers = self._until(cpu, lambda registers: registers["rip"] == scene.send, "smp_send_nmi_allbutself")
        sent = int.from_bytes(self._read(registers["rsp"], 8), "little")
        self._until(cpu, lambda registers: registers["rip"] == sent, "the end of smp_send_nmi_allbutself")
        seen: Counter[int] = Counter()
        begun = len(self.recording.steps)

        def waits(registers: Mapping[str, int]) -> bool:
            seen[registers["rip"]] += 1
            return seen[registers["rip"]] > _LOOPS or registers["rip"] == scene.handover

        self._until(cpu, waits, "its wait for the other CPUs")
        steps = self.recording.steps
        steps[begun:] = [step._replace(waiting=True) for step in steps[begun:]]
        scene.waiting = frozenset(step.place.pc for step in steps[begun:])
        return sent

    def _other(self, cpu: int) -> None:
        """One of the others, from its NMI to where it halts. NMIs come in; interrupts are off."""
        self.rsp.masking(SSTEP_ENABLE)
        last = None
        while True:
            if self.rsp.step(cpu, _HALTS) is None and self.rsp.is_halted(cpu):
                break
            registers = self.rsp.registers(cpu)
            if last is None and not self.scene.is_xen(registers["rip"]):
                break
            last = self._note(cpu, registers)
            if self._hits[cpu, last.pc] > _LONGEST:
                raise LabError(f"storm: CPU {cpu} does not halt; it is at {self.scene.symbols.describe(last.pc)}")
        if last is not None:
            self.scene.parks[cpu] = last.pc

    def _until(self, cpu: int, there: Callable[[Mapping[str, int]], bool], what: str) -> dict[str, int]:
        self.rsp.masking(SSTEP_MASKED)
        for _ in range(_LONGEST):
            registers = self.rsp.registers(cpu)
            if there(registers):
                return registers
            self._note(cpu, registers)
            if self.rsp.step(cpu, _HALTS) is None and self.rsp.is_halted(cpu):
                at = self.scene.symbols.describe(registers["rip"])
                raise LabError(f"storm: the undisturbed crash halts at {at}, before it reaches {what}")
        raise LabError(f"storm: the undisturbed crash does not reach {what} within {_LONGEST} instructions")

    def _onwards(self, cpu: int) -> None:
        """From the handover to where the crash kernel has its own IDT."""
        left = _AFTER
        while left:
            registers = self.rsp.registers(cpu)
            place = self._note(cpu, registers, after=True)
            if self.recording.texts.get(place.pc, "").startswith("lidt") and not self.scene.is_xen(place.pc):
                left = min(left, _AFTER_LIDT)
            if self.rsp.step(cpu, _HALTS) is None and self.rsp.is_halted(cpu):
                return
            left -= 1

    def _note(self, cpu: int, registers: Mapping[str, int], after: bool = False) -> Place:
        pc = registers["rip"]
        if registers == self._noted.get(cpu):  # QEMU now and then reports a step that did not happen
            return Place(cpu, pc, self._hits[cpu, pc])
        self._noted[cpu] = registers
        self._hits[cpu, pc] += 1
        place = Place(cpu, pc, self._hits[cpu, pc])
        self.recording.steps.append(Step(place, after=after))
        if self._decodes:
            instruction = decode.decode(pc, self._code_at(cpu, pc))
            self.recording.texts[pc] = instruction.text
            for access in instruction.accesses(registers):
                if self._is_memory(access.address):
                    for word in words_of(access.address, access.size):
                        self.recording.touches.append(Touch(place, word, access.writes))
        return place

    def _is_memory(self, address: int) -> bool:
        """Not a device: all local APICs have the same address, where each CPU accesses its own."""
        page = address >> 12
        if page not in self._is_ram:
            try:
                physical = self._memory.physical(address)
            except Unreadable:
                return False
            self._is_ram[page] = any(start <= physical < end for start, end in self.live.target.physical_ranges())
        return self._is_ram[page]

    def _code_at(self, cpu: int, pc: int) -> bytes:
        if pc not in self._code:
            self._code[pc] = self._read(pc, _INSTRUCTION, cpu)
        return self._code[pc]

    def _read(self, address: int, size: int, cpu: int | None = None) -> bytes:
        """By Xen's page tables; after the handover by the CPU's own."""
        try:
            return self._memory.read(address, size)
        except Unreadable:
            return self.rsp.read_virtual(cpu or 0, address, size)


def functions(places: Sequence[Place], scene: Scene) -> dict[str, list[Place]]:
    """By function, in the order in which the CPUs reach them."""
    found: dict[str, list[Place]] = {}
    for place in places:
        symbol = scene.symbols.lookup(place.pc)
        found.setdefault(symbol[0].name if symbol else "the crash kernel", []).append(place)
    return found
