"""The outcomes of crashes: shown, and combined into an exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xen_symbols.report.blocks import Cell, Lines, Table
from xen_symbols.report.console import plain
from xen_symbols.report.junit import to_junit
from xen_symbols.report.model import ExitStatus, Verdict, exit_status
from xen_symbols.report.page import table_page
from xencrash.errors import complain
from xencrash.lab.rows import DEFAULT_ACCEL
from xencrash.output import to

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


COLUMNS = ("Xen", "QEMU", "gdb", "LAPIC", "crash", "generation", "crashed on", "verdict", "seconds", "reason")


def status_of(outcomes: Sequence[Json]) -> ExitStatus:
    """1 if any failed; else 3 if any is unknown or skipped, except for packages that are gone; else 0."""
    verdicts = [Verdict.of(outcome["verdict"]) for outcome in outcomes if not outcome["gone"]]
    return exit_status(*(Verdict.UNKNOWN if verdict is Verdict.SKIP else verdict for verdict in verdicts))


def words(outcome: Json) -> list[str]:
    """An outcome's text for each of the COLUMNS."""
    crash = outcome["how"] if outcome["cpu"] is None else f"{outcome['how']} on CPU {outcome['cpu']}"
    busy = f"{outcome['load']} busy loops in dom0" * bool(outcome["load"])
    guest = "a domU on every CPU" * outcome["domu"]
    later = f"after {outcome['delay']:.2f} s" * bool(outcome["delay"])
    cpu = "-" if outcome["crashing_cpu"] is None else f"CPU {outcome['crashing_cpu']}"
    accel = f", {outcome['accel']}" * (outcome["accel"] != DEFAULT_ACCEL)
    return [
        outcome["xen"],
        outcome["qemu"] + accel,
        *(outcome[name] for name in ("gdb", "lapic")),
        ", ".join(filter(None, (crash, busy, guest, later))),
        outcome["generation"] or "-",
        cpu,
        outcome["verdict"],
        f"{outcome['seconds']:.0f}",
        outcome["reason"],
    ]


def summary(outcomes: Sequence[Json]) -> str:
    """The number of outcomes with each verdict, bad ones first."""
    verdicts = [outcome["verdict"] for outcome in outcomes]
    counts = [f"{verdicts.count(name)} {name}" for name in ("fail", "unknown", "skip", "pass") if name in verdicts]
    return f"{len(verdicts)} crashes: {', '.join(counts)}"


def render(outcomes: Sequence[Json], format: str, title: str) -> str:
    """The outcomes as text as table, json, junit, html or markdown."""
    if format == "json":
        return json.dumps({"title": title, "summary": summary(outcomes), "cells": outcomes}, indent=2) + "\n"
    if format == "junit":
        return to_junit({"findings": [_finding(outcome) for outcome in outcomes]})
    rows = [words(outcome) for outcome in outcomes]
    if format == "markdown":
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        table = "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)
        return f"## {title}\n\n{summary(outcomes)}.\n\n{table}"
    verdict = COLUMNS.index("verdict")
    cells = [[Cell(text, text if place == verdict else "") for place, text in enumerate(row)] for row in rows]
    listed, total = Table("Crashes", COLUMNS, cells), Lines([[Cell(summary(outcomes))]])
    if format == "html":
        return "".join(table_page(title, [total, listed]))
    return plain([listed._replace(title=title), total])


def _finding(outcome: Json) -> Json:
    """An outcome as a report's finding, for JUnit."""
    return {
        "check": outcome["name"],
        "stage": "crashes",
        "cpu": None,
        "verdict": outcome["verdict"],
        "expected": "pass",
        "observed": outcome["verdict"],
        "reason": outcome["reason"],
    }


def finish(outcomes: Sequence[Json], format: str, title: str) -> int:
    """Print the outcomes, report problems on standard error, and return the exit status."""
    text = render(outcomes, format, f"{title}, {time.strftime('%Y-%m-%d')}")
    to(None, lambda stream: stream.write(text))
    for outcome in outcomes:
        if outcome["gone"]:
            complain(f"NOT RUN, ITS PACKAGE IS GONE: {outcome['name']}: {outcome['reason']}")
    status = status_of(outcomes)
    if status is not ExitStatus.PASSED:
        first = next((o for o in outcomes if o["verdict"] != "pass" and not o["gone"]), outcomes[0])
        complain(f"{summary(outcomes)}; first: {first['name']}: {first['reason']}")
    return status
