"""Crashes of the reference guest under AMD KVM in a Linux under TCG, `--accel kvm-in-tcg`: on any machine."""

from __future__ import annotations

from dataclasses import dataclass

from tests.live.guestruns import MAY_BE_SEEN, Run, as_in, expected, first_seen
from tests.live.machines import target
from xencrash.guests import BY_ID, generations
from xencrash.lab.boot import up
from xencrash.lab.specification import Specification
from xencrash.trace import trace

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


def _clean(generation: str, accel: str) -> Under:
    return Under(accel, Run(generation, None, 2, "xapic"))


def _faulty(fault: str, accel: str) -> Under:
    known = BY_ID[fault]
    return Under(accel, Run(known.generations[-1], fault, max(known.cpus, 1) + 1, "xapic"))


def specification(under: Under) -> Specification:
    run = under.run
    return Specification(
        guest=run.generation, fault=run.fault, cpus=run.cpus, accel=under.accel, qemu="10.0", lapic=run.lapic
    )


# Every clean generation and every fault, by the two in turn; and each by the other one.
DEALT, OTHERS = (
    (
        *(_clean(generation, ACCELS[(number + odd) % 2]) for number, generation in enumerate(generations())),
        *(_faulty(fault, ACCELS[(number + odd) % 2]) for number, fault in enumerate(FAULTS)),
    )
    for odd in (0, 1)
)


def exactly_what_should_fail_does(under: Under) -> None:
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
