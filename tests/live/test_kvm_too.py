"""KVM, on any machine, with `--all-rows` only: the other half of test_kvm.py.

Each of the reference guest's crashes with the other interrupt controllers, and each change of memory at the handover:
what fails, where and when is the same as under TCG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.live.guestruns import Run
from tests.live.machines import target, wrong
from tests.live.nestedruns import ACCELS, BEGINS, OTHERS, STALL, Under, exactly_what_should_fail_does, specification
from tests.machines.changed import CHANGES, NOT_IN_MEMORY
from tests.machines.realxen import LiveMachine
from xencrash.gdbmi import GdbSession, open_session
from xencrash.lab.boot import up
from xencrash.lab.machine import Machine as Lab
from xencrash.trace import trace

pytestmark = pytest.mark.live


@pytest.mark.parametrize("under", OTHERS, ids=str)
def test_exactly_what_should_fail_does_under_kvm(under: Under) -> None:
    exactly_what_should_fail_does(under)


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
