"""One experiment on one machine: the CPUs run one at a time, in an order that only its events decide.

Without events the order is the simplest: the crashing CPU until it has sent the NMIs, each other CPU until it halts,
the crashing one to its end. Nothing depends on the host's speed, except what Xen itself measures with a clock.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from xen_symbols.absence import Unreadable
from xen_symbols.report.model import Finding
from xen_symbols.targets import PhysicalCpu
from xencrash.lab.errors import LabError
from xencrash.lab.storm import inject
from xencrash.lab.storm.course import Course, End, Injected
from xencrash.lab.storm.delivery import VECTORS, foresee
from xencrash.lab.storm.experiment import Action, Event, Experiment, Place
from xencrash.lab.storm.rsp import SSTEP_ENABLE, SSTEP_MASKED, Gone
from xencrash.lab.storm.scene import Scene
from xencrash.lab.storm.snapshot import Live

# Seconds. Xen waits for one second of its own for the other CPUs, which took more than 60 on a host with a load of 40.
HANG = 240.0
BUSY = 0.4  # for another CPU before the NMIs are sent: it may run a guest
_PIECE = 0.2
_SAMPLES = 6  # of the registers: where at most a third of them are different, it may go round in circles
_CIRCLES = 60  # steps in which they repeat: it does
_PATIENCE = 3  # how often another CPU that goes round in circles is let run again: it may wait for others
_HALTS = 0.003  # for a HLT with nothing after it
_STEP = 0.2
_TRIES = 25  # about once in a hundred times, on a busy host, QEMU reports a step that did not happen
_IF = 0x200  # RFLAGS: interrupts are taken


class Driver:
    def __init__(self, live: Live, scene: Scene, experiment: Experiment) -> None:
        self.live, self.rsp, self.scene = live, live.rsp, scene
        self.course = Course()
        self.left = list(experiment.events)
        self.queue = deque([scene.crashing])
        self._hits: Counter[tuple[int, int]] = Counter()
        self._breakpoints: set[int] = set()
        self._returns: dict[int, list[tuple[int, int, Injected]]] = {cpu: [] for cpu in range(scene.cpus)}
        self._sent = self._let_go = self._handed_over = False
        self._stands = dict.fromkeys(range(scene.cpus), False)  # its place was handled, and it has not continued
        self._patience: Counter[int] = Counter()
        self._notes: dict[int, bytes] = {}
        self._done: set[int] = set()
        self._held: set[int] = set()
        self._stopped: set[int] = set()
        self._over = self._kernel_runs = False

    def run(self) -> Course:
        """Raises LabError if the lab, not the machine, failed."""
        try:
            while self.queue and not self._over:
                self._turn(self.queue.popleft())
            self._look_at_the_end()
        except Gone:
            self.course.end, self.course.how = End.RESET, self.live.ended()
        course = self.course
        course.unfired = tuple(self.left)
        course.held = frozenset(self._held)
        course.stopped = frozenset(self._stopped)
        course.console = _last_line(self.live.console())
        return course

    def until(self, count: int) -> None:
        """Only until this many events have happened (for a debugger); all of them if there are fewer."""
        wanted = max(0, len(self.left) - count)
        while self.queue and not self._over and len(self.left) > wanted:
            self._turn(self.queue.popleft(), wanted)
        self._set_breakpoints(set())

    # One CPU's turn.

    def _turn(self, cpu: int, wanted: int = -1) -> None:
        """Let one CPU run until it yields to others."""
        while not self._over:
            registers = self.rsp.registers(cpu)
            pc, rsp = registers["rip"], registers["rsp"]
            if not self._stands[cpu]:
                self._arrive(cpu, pc, rsp)
                self._stands[cpu] = True
            fired = self._event_at(cpu, pc)
            if fired is not None:
                self.left.remove(fired)
                if self._happens(fired, cpu) or len(self.left) == wanted:
                    return
                continue
            if self._gives_way(cpu, pc) or not self._go_on(cpu, pc):
                return

    def _arrive(self, cpu: int, pc: int, rsp: int) -> None:
        for back in self._returns[cpu]:
            if back[:2] == (pc, rsp):
                back[2].returned = True
                self._returns[cpu].remove(back)
                return  # the same instruction, which the event came before
        self._hits[cpu, pc] += 1

    def _event_at(self, cpu: int, pc: int) -> Event | None:
        here = Place(cpu, pc, self._hits[cpu, pc])
        return next((event for event in self.left if event.place == here), None)

    def _happens(self, event: Event, cpu: int) -> bool:
        """Whether the CPU yields because of that."""
        if not event.action.injects and cpu in self.scene.others and cpu not in self._done:
            self._held.add(cpu)
        if event.action is Action.YIELD:
            self.queue.append(cpu)
            return True
        if event.action is Action.STOP:
            self._stopped.add(cpu)
            return True
        if self._inject(event):
            self._stands[event.target] = False
        if event.target == cpu:
            return False
        self.queue.extendleft((cpu, event.target))
        return True

    def _gives_way(self, cpu: int, pc: int) -> bool:
        scene = self.scene
        if pc in scene.ends:
            self.course.end, self.course.how, self._over = End.PANIC, scene.ends[pc], True
            return True
        if cpu != scene.crashing:
            return False
        if pc == scene.sent:
            self._sent = True
        if self._sent and not self._let_go and not self._waits_for_place():
            self._let_go = True
            self.queue.extend((*scene.others, cpu))
            return True
        if pc == scene.handover and not self._handed_over:
            self._hand_over()
            self.queue.append(cpu)
            return True
        if self._handed_over and pc == self._kernel_at():
            self._kernel_runs = True
            return True
        return False

    def _kernel_at(self) -> int | None:
        """Where the crash kernel counts as started; None if it says so on the console."""
        return self.scene.kernel_at if self.scene.kernel_sign is None else None

    def _waits_for_place(self) -> bool:
        """Whether something is still to happen to the crashing CPU while it waits for the others."""
        crashing = self.scene.crashing
        return bool(self._returns[crashing]) or any(
            event.place.cpu == crashing and event.place.pc in self.scene.waiting for event in self.left
        )

    def _go_on(self, cpu: int, pc: int) -> bool:
        """Run the CPU to the next of its places; False if it yields, because it halts or seems to spin."""
        self._set_breakpoints(self._places_of(cpu))
        self._stands[cpu] = False
        if pc == self.scene.parks.get(cpu):
            self._set_breakpoints(self._breakpoints - {pc})
            if self.rsp.run([cpu], _HALTS) is None and self.rsp.is_halted(cpu):
                self._halted(cpu)
                return False
            return True
        if pc in self._breakpoints and not self._step_off(cpu, pc):
            return False
        if self.rsp.registers(cpu)["rip"] in self._breakpoints:
            return True
        return self._runs(cpu)

    def _step_off(self, cpu: int, pc: int) -> bool:
        """Continue from a breakpoint; False if the CPU halts by that."""
        self.rsp.masking(SSTEP_MASKED)
        for _ in range(_TRIES):
            if self.rsp.step(cpu, _STEP) is None and self.rsp.is_halted(cpu):
                self._halted(cpu)
                return False
            if self.rsp.registers(cpu)["rip"] != pc:
                return True
        # It loops on one instruction: its breakpoint must not stop it there for ever.
        self._set_breakpoints(self._breakpoints - {pc})
        return True

    def _runs(self, cpu: int) -> bool:
        crashing = cpu == self.scene.crashing
        begun, patience, piece = time.monotonic(), HANG if crashing or self._let_go else BUSY, 0.01
        states: list[tuple[int, ...]] = []
        while time.monotonic() - begun < patience:
            if self.rsp.run([cpu], piece) is not None:
                return True
            if self.rsp.is_halted(cpu) and not self._wakes(cpu):
                self._halted(cpu)
                return False
            if crashing and self._handed_over and self._kernel_has_begun():
                return False
            states.append(tuple(self.rsp.registers(cpu).values()))
            if len(states) >= _SAMPLES and _repeats(states):
                if self._goes_in_circles(cpu):
                    break
                if self.rsp.registers(cpu)["rip"] in self._breakpoints:
                    return True
                states.clear()
            piece = min(2 * piece, _PIECE)
        if crashing:
            self._over = not self._handed_over
        elif (self._patience.update((cpu,)) or self._patience[cpu]) < _PATIENCE:
            self.queue.append(cpu)
        return False

    def _goes_in_circles(self, cpu: int) -> bool:
        """Whether its registers repeat step by step: samples are equal, too, while the host gives the CPU no time."""
        self.rsp.masking(SSTEP_ENABLE)
        states = []
        for _ in range(_CIRCLES):
            if self.rsp.step(cpu, _STEP) is None:
                return False
            registers = self.rsp.registers(cpu)
            if registers["rip"] in self._breakpoints:
                return False
            states.append(tuple(registers.values()))
        return _repeats(states)

    def _wakes(self, cpu: int) -> bool:
        """Whether an NMI is pending that the CPU takes as soon as it runs, also from HLT."""
        physical = self._physical()[cpu]
        return physical.nmi_pending is True and physical.nmi_blocked is not True

    def _kernel_has_begun(self) -> bool:
        sign = self.scene.kernel_sign
        return self._kernel_runs if sign is None else sign in self.live.console()

    def _places_of(self, cpu: int) -> set[int]:
        scene = self.scene
        places = {event.place.pc for event in self.left if event.place.cpu == cpu}
        places |= {pc for pc, _, _ in self._returns[cpu]} | set(scene.ends)
        if cpu in scene.parks:
            places.add(scene.parks[cpu])
        if cpu == scene.crashing:
            places |= {scene.sent} if not self._sent else set()
            places |= {scene.handover} if not self._handed_over else set()
            if self._handed_over and (started := self._kernel_at()) is not None:
                places.add(started)
        return places

    def _set_breakpoints(self, wanted: set[int]) -> None:
        self.rsp.break_at(self._breakpoints - wanted, on=False)
        self.rsp.break_at(wanted - self._breakpoints)
        self._breakpoints = wanted

    def _halted(self, cpu: int) -> None:
        """Its notes are complete when it halts for good; an idle CPU does not, as it takes interrupts."""
        for_good = not self.rsp.registers(cpu)["eflags"] & _IF
        if for_good:
            self._done.add(cpu)
        if for_good and cpu not in self._notes and cpu != self.scene.crashing:
            self._notes[cpu] = self._note(cpu)

    # Injection.

    def _inject(self, event: Event) -> bool:
        """Whether its target moved: it stays where it is with an NMI that is blocked."""
        cpu, name = event.target, event.action.value
        moved = event.action is Action.MC and self._take_pending_nmi(cpu)
        physical = self._physical()[cpu]
        blocked = physical.nmi_blocked is True
        before = self.rsp.registers(cpu)
        seen = Injected(
            event, before["rip"], foresee(self.live.target, physical, VECTORS[name]), blocked, self._handed_over
        )
        self.course.injected.append(seen)
        if event.action is Action.NMI:
            inject.nmi(self.rsp, self.scene.apic_ids[cpu])
            if blocked:
                return moved  # it stays pending, and is taken when NMIs are unblocked
        else:
            seen.said = inject.machine_check(self.live.qmp, cpu)
        after = self._step_in(cpu, before)
        self._done.discard(cpu)
        seen.taken = after["rip"] == seen.foreseen.handler
        if seen.taken:
            seen.frame = after["rsp"]
            self._returns[cpu].append((before["rip"], before["rsp"], seen))
        return moved or after["rip"] != before["rip"]

    def _take_pending_nmi(self, cpu: int) -> bool:
        """QEMU would deliver it before the machine check, whose handler then would not begin at the next step."""
        if not self._wakes(cpu):
            return False
        self._step_in(cpu, self.rsp.registers(cpu))
        return True

    def _step_in(self, cpu: int, before: Mapping[str, int]) -> Mapping[str, int]:
        """Have a CPU take what is pending; its registers after that."""
        self.rsp.masking(SSTEP_ENABLE)
        for _ in range(_TRIES):
            self.rsp.step(cpu, _STEP)
            after = self.rsp.registers(cpu)
            if after["rip"] != before["rip"]:
                break
        return after

    # Looking.

    def _physical(self) -> Sequence[PhysicalCpu]:
        self.live.target.forget()
        try:
            return self.live.target.cpus()
        except Unreadable as error:
            raise LabError(f"storm: QEMU's device state could not be read: {error}") from error

    def _note(self, cpu: int) -> bytes:
        memory = self.scene.memory(self.live.target)
        try:
            return memory.read(self.scene.notes[cpu], self.scene.note_size())
        except Unreadable:
            return b""

    def _failures(self) -> tuple[Finding, ...]:
        self.live.target.forget()
        return self.scene.failures(self.live.target)

    def _hand_over(self) -> None:
        self._handed_over = True
        self.course.end = End.HANDOVER
        self.course.late = frozenset(self.scene.others) - self._done
        self.course.at_handover = self._failures()

    def _look_at_the_end(self) -> None:
        course = self.course
        for cpu in range(self.scene.cpus):
            course.where[cpu] = self._whereabouts(cpu)
        if course.end is not End.HANDOVER:
            return
        course.kernel = self._kernel_has_begun()
        course.notes_changed = frozenset(cpu for cpu, note in self._notes.items() if note != self._note(cpu))
        physical = self._physical()
        course.running = {
            cpu: why
            for cpu in self.scene.others
            if cpu not in self._stopped and (why := self._not_parked(physical[cpu]))
        }
        late_or_disturbed = course.late or any(seen.after_handover for seen in course.injected)
        if late_or_disturbed:
            course.at_end = self._failures()

    def _not_parked(self, physical: PhysicalCpu) -> str | None:
        """Why another CPU is not parked: halted, interrupts off, in Xen."""
        if not self.scene.is_xen(physical.registers["rip"]):
            return "it is outside of Xen"
        if physical.halted is not True:
            return "it runs"
        if physical.registers["rflags"] & _IF:
            return "it takes interrupts"
        return None

    def _whereabouts(self, cpu: int) -> str:
        pc = self.rsp.registers(cpu)["rip"]
        halted = "halted in " if self.rsp.is_halted(cpu) else ""
        return f"{halted}{self.scene.symbols.describe(pc)}"


def _repeats(states: Sequence[tuple[int, ...]]) -> bool:
    return len(set(states)) <= len(states) // 3


def _last_line(console: bytes) -> str:
    lines = [line.strip() for line in console.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
