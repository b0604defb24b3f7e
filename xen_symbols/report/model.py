"""What was found: findings, and the report that they add up to. Renderers read this; nothing here computes a check."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SCHEMA_VERSION = 1


class Verdict(enum.IntEnum):
    """Ordered: a report's verdict is the worst of its findings, skips aside."""

    PASS = 0
    SKIP = 1  # does not apply; `reason` says why
    UNKNOWN = 2  # could not be read or decided; `reason` says why
    FAIL = 3

    def __str__(self) -> str:
        return self.name.lower()


class ExitStatus(enum.IntEnum):
    PASSED = 0
    FAILED = 1
    USAGE = 2
    UNDECIDED = 3


class Evidence(NamedTuple):
    """Where an observed value was read: memory (address, raw bytes, symbol) or a named source."""

    source: str
    address: int | None = None
    raw: bytes | None = None
    symbol: str | None = None

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"source": self.source}
        if self.address is not None:
            out["address"] = hex(self.address)
        if self.symbol is not None:
            out["symbol"] = self.symbol
        if self.raw is not None:
            out["raw"] = self.raw.hex()
        return out


class Finding(NamedTuple):
    """What one check found for one CPU (or, with `cpu` None, for the whole machine) at one stage.

    `expected` and `observed` are JSON values; an absent `observed` is None and `reason` says why.
    """

    check: str
    stage: str
    cpu: int | None
    verdict: Verdict
    expected: Any
    observed: Any
    source: str
    evidence: Sequence[Evidence] = ()
    reason: str | None = None  # why it was skipped or is unknown; for a failure, what it would do to a real crash
    # The check whose failure explains this one: for the same CPU, the machine, or all the CPUs that this one counts.
    follows: str | None = None
    stop: int | None = None  # index into the report's stages

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "check": self.check,
            "stage": self.stage,
            "cpu": self.cpu,
            "verdict": str(self.verdict),
            "expected": self.expected,
            "observed": self.observed,
            "evidence": [item.to_json() for item in self.evidence],
            "source": self.source,
        }
        if self.reason is not None:
            out["reason"] = self.reason
        if self.follows is not None:
            out["follows"] = self.follows
        if self.stop is not None:
            out["stop"] = self.stop
        return out


class StageSeen(NamedTuple):
    """A stage at which the machine was looked at: its subject, and where that CPU was."""

    stage: str
    cpu: int | None
    symbol: str | None
    pc: int | None

    def to_json(self) -> dict[str, Any]:
        at = None if self.pc is None else {"symbol": self.symbol, "pc": hex(self.pc)}
        return {"stage": self.stage, "cpu": self.cpu, "at": at}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of many findings by theirs: the worst, skips aside; `unknown` when nothing is left."""
    return max((verdict for verdict in verdicts if verdict is not Verdict.SKIP), default=Verdict.UNKNOWN)


class Report:
    """Context, CPUs, stages and findings of one run; they are added as it goes on."""

    def __init__(
        self,
        tool: Mapping[str, Any],
        target: Mapping[str, Any],
        symbols: Mapping[str, Any],
        findings: Iterable[Finding] = (),
        undecided: str | None = None,
    ) -> None:
        self.tool, self.target, self.symbols = tool, target, symbols
        self.generation: Mapping[str, Any] | None = None
        self.crashing_cpu: int | None = None
        self.cpus: Sequence[Mapping[str, Any]] = ()
        self.stages: list[StageSeen] = []
        self.findings = list(findings)
        self.gate_changes: list[Mapping[str, Any]] | None = None  # of a trace that was asked for them
        self.writers_absent: str | None = None  # why nobody was seen to change a gate, where changes are listed
        self.undecided = undecided  # why nothing (more) could be decided: target lost, no generation, …

    @property
    def verdict(self) -> Verdict:
        verdict = worst(finding.verdict for finding in self.findings)
        return max(verdict, Verdict.UNKNOWN) if self.undecided else verdict

    @property
    def exit_status(self) -> ExitStatus:
        return {
            Verdict.PASS: ExitStatus.PASSED,
            Verdict.FAIL: ExitStatus.FAILED,
        }.get(self.verdict, ExitStatus.UNDECIDED)

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, map) else value for name, value in self.members().items()}

    def members(self) -> dict[str, Any]:
        """As `to_json`, but long lists are iterators: of 4096 CPUs' 120,000 findings one at a time is in memory."""
        out: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "tool": dict(self.tool),
            "target": dict(self.target),
            "symbols": dict(self.symbols),
            "generation": None if self.generation is None else dict(self.generation),
            "crashing_cpu": self.crashing_cpu,
            "cpus": map(dict, self.cpus),
            "stages": [stage.to_json() for stage in self.stages],
            "findings": map(Finding.to_json, self.findings),
            "verdict": str(self.verdict),
        }
        if self.gate_changes is not None:
            out["gate_changes"] = [dict(change) for change in self.gate_changes]
        if self.writers_absent is not None:
            out["writers_absent"] = self.writers_absent
        if self.undecided is not None:
            out["undecided"] = self.undecided
        return out
