"""KVM, on any machine: the reference guest, traced under AMD's KVM in a Linux under TCG, which is `--accel kvm-in-tcg`.

With `--all-rows` only, since each takes half a minute of a processor: every clean generation and a dozen faults, the
interrupt controllers in the kernel and split in turn. What fails, where and when is the same as under TCG; so is what
each change of memory at the handover makes fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.live.guestruns import MAY_BE_SEEN, Run, as_in, expected, first_seen
from tests.live.machines import target, wrong
from tests.machines.changed import CHANGES, NOT_IN_MEMORY
from tests.machines.realxen import LiveMachine
from xencrash.gdbmi import GdbSession, open_session
from xencrash.guests import BY_ID, generations
from xencrash.lab.boot import up
from xencrash.lab.machine import Machine as Lab
from xencrash.lab.specification import Specification
from xencrash.trace import trace

pytestmark = pytest.mark.live

ACCELS = ("kvm-in-tcg", "kvm-split-in-tcg")
# A busy host's KVM in TCG is slow: seconds until the crash begins, and for each stage of it.
BEGINS, STALL, STALL_STUCK = 600, 240, 60
FAULTS = (
    *("no-self-nmi", "nmis-latched", "nmi-gate-ist", "own-mc-gate-ist", "nmi-not-sent", "lapic-not-stopped"),
    *("notes-missing", "self-nmi-misdirected", "enable-nmis-skipped", "mc-gate-ist", "still-online", "stuck"),
)


@dataclass(frozen=True)
class Under:
    """A run of the guest under one of the accelerators."""

    accel: str
    run: Run

    def __str__(self) -> str:
        return f"{self.run.generation}-{self.run.fault or 'clean'}-{self.accel}"


def _runs() -> Iterator[Under]:
    for number, generation in enumerate(generations()):
        yield Under(ACCELS[number % 2], Run(generation, None, 2, "xapic"))
    for number, fault in enumerate(FAULTS):
        known = BY_ID[fault]
        yield Under(ACCELS[number % 2], Run(known.generations[-1], fault, max(known.cpus, 1) + 1, "xapic"))


def specification(under: Under) -> Specification:
    run = under.run
    return Specification(
        guest=run.generation, fault=run.fault, cpus=run.cpus, accel=under.accel, qemu="10.0", lapic=run.lapic
    )


@pytest.mark.parametrize("under", tuple(_runs()), ids=str)
def test_exactly_what_should_fail_does_under_kvm(under: Under) -> None:
    run = under.run
    stall = STALL_STUCK if run.fault in ("stuck", "nmi-not-sent") else STALL
    with up(specification(under)) as lab:
        report = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=BEGINS, stall=stall,
                       trigger=lambda: lab.serial.send(b"C"))  # fmt: skip
    assert report["target"]["accelerator"] == "kvm"
    assert report["generation"] and report["generation"]["id"] == run.generation
    found = {item for item in first_seen(report, "fail") if item[0] not in MAY_BE_SEEN.get(run.fault, ())}
    assert {as_in(expected(run), item, report) for item in found} == expected(run)
    assert first_seen(report, "unknown") == set()
    if not run.fault:
        assert report["stages"][-1]["stage"] == "after-handover"


class NestedMachine(LiveMachine):
    """The same helpers on a machine whose RAM is not a file here: a copy of it is, and gdb writes to both."""

    def __init__(self, lab: Lab, copy: Path, session: GdbSession) -> None:
        lab.qmp("pmemsave", timeout=300, val=0, size=lab.state.memory_mib << 20, filename=str(copy))
        super().__init__(lab, copy)
        self.session = session

    def write(self, at: int, data: bytes) -> None:
        super().write(at, data)
        for packet in ("Qqemu.PhyMemMode:1", f"M{at:x},{len(data):x}:{data.hex()}", "Qqemu.PhyMemMode:0"):
            self.session.cli(f"maintenance packet {packet}")


def test_each_change_of_memory_is_found_under_kvm_and_nothing_else() -> None:
    with up(specification(Under(ACCELS[0], Run("4.17.0", None, 4, "xapic")))) as lab:
        report: Any = trace(target(lab), str(lab.symbols), str(lab.qmp_socket), timeout=BEGINS, stall=STALL,
                            trigger=lambda: lab.serial.send(b"C"), leave_stopped=True)  # fmt: skip
        assert report["verdict"] == "pass"
        with open_session(target(lab), str(lab.symbols), str(lab.qmp_socket)) as session:
            machine = NestedMachine(lab, lab.paths.run_dir / "ram", session)
            assert wrong(session.xen("crash-check")) == set()
            for what, (change, check, cpu) in CHANGES.items():
                if check not in NOT_IN_MEMORY:
                    change(machine)
                    assert wrong(session.xen("crash-check")) == {(check, cpu, "fail", "handover")}, what
                    machine.restore()
            assert wrong(session.xen("crash-check")) == set()
