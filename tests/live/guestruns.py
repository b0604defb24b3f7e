"""Crashes of the reference guest, and what of each should be found: the same whatever runs its CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xen_symbols.crashpath.stages import STAGES, Role
from xencrash.guests import BY_ID
from xencrash.guests.faults import clean

Json = dict[str, Any]
Found = set[tuple[str, int | None, str]]


@dataclass(frozen=True)
class Run:
    """One crash of the guest."""

    generation: str
    fault: str | None
    cpus: int
    lapic: str

    def __str__(self) -> str:
        return f"{self.generation}-{self.fault or 'clean'}-{self.cpus}cpus-{self.lapic}"


# What a fault does only for a moment: a stop of another CPU may fall into it.
MAY_BE_SEEN: dict[str | None, tuple[str, ...]] = {"second-entry": ("nmi-latch",)}


def first_seen(report: Json, verdict: str) -> Found:
    """Each (check, CPU) with that verdict, and the stage at which it had it first; consequences of others left out."""
    found: dict[tuple[str, int | None], str] = {}
    for finding in report["findings"]:
        if finding["verdict"] == verdict and "follows" not in finding:
            found.setdefault((finding["check"], finding["cpu"]), finding["stage"])
    return {(check, cpu, stage) for (check, cpu), stage in found.items()}


def expected(run: Run) -> Found:
    wanted = BY_ID[run.fault].expected(run.generation) if run.fault else clean(run.generation)
    if run.cpus == 1 and not run.fault:
        return set()  # nobody to wait for: the RFC's defect does not show
    return {(item.check, cpu, item.stage) for item in wanted for cpu in item.cpus(0, 1, range(run.cpus))}


def as_in(wanted: Found, item: tuple[str, int | None, str], report: Json) -> tuple[str, int | None, str]:
    """What a CPU does on its way from one stage to the next may be seen earlier, where another CPU stops meanwhile, at
    whichever stage that is. What all CPUs share may be seen later, too: while another CPU may just have written to it,
    no value is wrong."""
    others = [stage.id for stage in STAGES if stage.role is Role.OTHER]
    check, cpu, seen = item
    for stage in (stage for *asked, stage in wanted if asked == [check, cpu] and {stage, seen} <= {*others}):
        failed = [f["stop"] for f in report["findings"]
                  if (f["check"], f["cpu"], f["verdict"]) == (check, cpu, "fail") and "follows" not in f]  # fmt: skip
        own = [stop for stop, each in enumerate(report["stages"]) if (each["stage"], each["cpu"]) == (stage, cpu)]
        if cpu is None or others.index(seen) < others.index(stage) or (own and min(failed) < own[0]):
            return check, cpu, stage
    return item
