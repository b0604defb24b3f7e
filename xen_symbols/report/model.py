"""Findings, and the report that they make up. Renderers read this; nothing here computes a check."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from xen_symbols.records import NamedTuple

if TYPE_CHECKING:
    from xen_symbols.report import contract

SCHEMA_VERSION: Final = 1


class Verdict(enum.IntEnum):
    """Ordered: a report's verdict is the worst of its findings, skips aside."""

    PASS = 0
    SKIP = 1  # does not apply; `reason` says why
    UNKNOWN = 2  # could not be read or decided; `reason` says why
    FAIL = 3

    @property
    def word(self) -> contract.VerdictWord:
        return _WORDS[self]

    def __str__(self) -> str:
        return _WORDS[self]

    @classmethod
    def of(cls, word: str) -> Verdict:
        """The verdict with this name in a report."""
        return cls[word.upper()]


_WORDS: dict[Verdict, Literal["pass", "skip", "unknown", "fail"]] = {
    Verdict.PASS: "pass", Verdict.SKIP: "skip", Verdict.UNKNOWN: "unknown", Verdict.FAIL: "fail",
}  # fmt: skip


class ExitStatus(enum.IntEnum):
    """That of the command."""

    PASSED = 0
    FAILED = 1
    USAGE = 2
    UNDECIDED = 3


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of many findings by theirs: the worst, skips aside; `unknown` when nothing is left."""
    return max((verdict for verdict in verdicts if verdict is not Verdict.SKIP), default=Verdict.UNKNOWN)


def verdict_of(findings: Iterable[Verdict], undecided: str | None) -> Verdict:
    """A report's verdict: at least unknown, where something could not be decided."""
    return max(worst(findings), Verdict.UNKNOWN) if undecided else worst(findings)


def exit_status(*verdicts: Verdict) -> ExitStatus:
    """The exit status by a report's verdict, or by those of several."""
    verdict = worst(verdicts)
    return {Verdict.PASS: ExitStatus.PASSED, Verdict.FAIL: ExitStatus.FAILED}.get(verdict, ExitStatus.UNDECIDED)


class Evidence(NamedTuple):
    """Where an observed value was read: memory (address, raw bytes, symbol) or a named source."""

    source: str
    address: int | None = None
    raw: bytes | None = None
    symbol: str | None = None

    def to_json(self) -> contract.Evidence:
        out: contract.Evidence = {"source": self.source}
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

    def to_json(self) -> contract.Finding:
        out: contract.Finding = {
            "check": self.check,
            "stage": self.stage,
            "cpu": self.cpu,
            "verdict": self.verdict.word,
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

    def to_json(self) -> contract.Stage:
        at: contract.Place | None = None if self.pc is None else {"symbol": self.symbol, "pc": hex(self.pc)}
        return {"stage": self.stage, "cpu": self.cpu, "at": at}


class Report:
    """Context, CPUs, stages and findings of one run; they are added as it proceeds."""

    def __init__(
        self,
        tool: contract.Tool,
        target: contract.Target,
        symbols: contract.Symbols,
        findings: Iterable[Finding] = (),
        undecided: str | None = None,
    ) -> None:
        self.tool, self.target, self.symbols = tool, target, symbols
        self.generation: contract.Generation | None = None
        self.nearest: list[contract.NearGeneration] = []  # where none fits
        self.crashing_cpu: int | None = None
        self.cpus: Sequence[contract.Cpu] = ()
        self.stages: list[StageSeen] = []
        self.findings = list(findings)
        self.gate_changes: list[contract.TracedChange] | None = None  # of a trace that was asked for them
        self.writers_absent: str | None = None  # why nobody was seen to change a gate, where changes are listed
        self.undecided = undecided  # why nothing (more) could be decided: target lost, no generation, …

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings, skips aside; at least unknown where something could not be decided."""
        return verdict_of((finding.verdict for finding in self.findings), self.undecided)

    @property
    def exit_status(self) -> ExitStatus:
        """What the command would end with."""
        return exit_status(self.verdict)

    def to_json(self) -> contract.Report:
        """The JSON report, as report/schema.json has it."""
        made = {name: list(value) if isinstance(value, map) else value for name, value in self.members().items()}
        return cast("contract.Report", made)

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
            "verdict": self.verdict.word,
        }
        if self.nearest:
            out["nearest"] = [dict(near) for near in self.nearest]
        if self.gate_changes is not None:
            out["gate_changes"] = [dict(change) for change in self.gate_changes]
        if self.writers_absent is not None:
            out["writers_absent"] = self.writers_absent
        if self.undecided is not None:
            out["undecided"] = self.undecided
        return out
