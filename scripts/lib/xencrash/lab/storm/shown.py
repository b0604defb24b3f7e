"""A storm's report, rendered from its JSON alone. Nothing here reaches a machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from xen_symbols.report.blocks import Block, Cell, Lines, Table
from xen_symbols.report.console import print_blocks
from xen_symbols.report.junit import to_junit
from xen_symbols.report.page import table_page

Object = dict[str, Any]

_STYLES = {"pass": "pass", "window": "unknown", "fail": "fail", "undecided": "unknown"}
_LETTERS = {"pass": ".", "window": "w", "fail": "F", "undecided": "?"}


def write(report: Object, format: str, stream: IO[str], pictures: Sequence[str] = ()) -> None:
    if format == "json":
        json.dump(report, stream, indent=1)
        stream.write("\n")
    elif format == "junit":
        stream.write(to_junit(as_findings(report)))
    elif format == "html":
        stream.writelines(page(report))
    else:
        print_blocks(blocks(report, pictures), stream)


def blocks(report: Object, pictures: Sequence[str] = ()) -> list[Block]:
    """Counts, coverage, windows, failures; and each function of `pictures`, instruction by instruction."""
    return [
        _head(report), _coverage(report), *_windows(report), *_failures(report, _failure_in_short),
        *(_picture(function) for function in report["functions"] if function["function"] in pictures),
    ]  # fmt: skip


def page(report: Object) -> Iterator[str]:
    """What failed comes first; every function's instructions can be unfolded."""
    shown = [_head(report), *_failures(report, _failure_with_command), *_windows(report), _coverage(report)]
    pictures = [_picture(function) for function in report["functions"]]
    yield from table_page(f"Storm: {report['machine']}", shown, pictures)


def _head(report: Object) -> Lines:
    lines = [
        [Cell("machine     ", "dim"), Cell(report["machine"], "strong"), Cell(f", QEMU {report['qemu']}, "
         f"{report['cpus']} CPUs, CPU {report['crashing_cpu']} crashes, "
         f"generation {report['generation'] or 'not identified'}")],
        [Cell("experiments ", "dim"), Cell(_done(report))],
        [Cell("outcomes    ", "dim"), *_counted(report["counts"])],
    ]  # fmt: skip
    if unfired := sum("unfired" in one for one in report["experiments"]):
        lines.append([Cell("not reached ", "dim"), Cell(f"the place of an event, in {unfired} of them", "unknown")])
    return Lines(lines)


def _done(report: Object) -> str:
    planned = "" if report["planned"] is None else f" of {report['planned']}"
    cut = ", interrupted" if report.get("interrupted") else ""
    return f"{len(report['experiments'])}{planned} in {report['seconds']:.0f} s, seed {report['seed']}{cut}"


def _counted(counts: Mapping[str, int]) -> list[Cell]:
    cells = []
    for verdict, count in counts.items():
        cells.append(Cell(f"{count} {verdict}  ", _STYLES[verdict] if count else "dim"))
    return cells


def _coverage(report: Object) -> Table:
    rows = []
    for function in report["functions"]:
        done, outcomes = function["experiments"], function["outcomes"]
        rows.append([
            Cell(function["function"], "strong"), Cell(function["role"]),
            Cell(f"{function['touched']}/{function['instructions']}"),
            *(Cell(str(done.get(name, "")) ) for name in ("nmi", "mc", "yield", "stop")),
            *(Cell(str(outcomes.get(name, "")), _STYLES[name]) for name in ("pass", "window", "fail")),
        ])  # fmt: skip
    columns = ["function", "CPU", "instructions", "NMI", "#MC", "yield", "stop", "pass", "window", "fail"]
    return Table("What was executed and injected", columns, rows)


def _windows(report: Object) -> list[Block]:
    if not report["windows"]:
        return []
    rows = [
        [Cell(window["event"]), Cell(window["on"]), Cell(window["why"], "unknown"), Cell(str(window["instructions"])),
         Cell(", ".join(f"{name} {count}" for name, count in window["functions"].items()))]
        for window in report["windows"]
    ]  # fmt: skip
    return [Table("Windows that no code can close", ["event", "on", "why", "instructions", "where"], rows)]


_AGAIN = {True: "same again", False: "different outcome", None: ""}
_FAILURE = ["ID", "what", "again", "what happened"]


def _failures(report: Object, row: Callable[[Object, str], list[Cell]]) -> list[Block]:
    bad = [one for one in report["experiments"] if one["verdict"] in ("fail", "undecided")]
    if not bad:
        return []
    command = report.get("replay", "--replay")
    rows = [row(one, command) for one in bad]
    if len(rows[0]) > len(_FAILURE):
        return [Table("Failures", [*_FAILURE, "to repeat it"], rows)]
    return [Table(f"Failures ({command} ID repeats one)", _FAILURE, rows)]


def _failure_in_short(one: Object, command: str) -> list[Cell]:
    says = one["says"] + (f" (enough: {one['shrunk']})" if one.get("shrunk") else "")
    verdict = Cell(one["what"], _STYLES[one["verdict"]])
    return [Cell(one["id"], "strong"), verdict, Cell(_AGAIN[one.get("exact")]), Cell(says)]


def _failure_with_command(one: Object, command: str) -> list[Cell]:
    """An ID may hold a `>`, which a shell would take for itself."""
    return [*_failure_in_short(one, command), Cell(f"{command} {shlex.quote(one['id'])}")]


def _picture(function: Object) -> Table:
    rows = [
        [Cell(line["at"], "dim"), *(_mark(line["outcomes"].get(name)) for name in ("nmi", "mc", "yield", "stop")),
         Cell(line["text"] or "")]
        for line in function["lines"]
    ]  # fmt: skip
    counted = "".join(f", {count} {verdict}" for verdict, count in function["outcomes"].items())
    title = f"{function['function']}, on the {function['role']} CPU{counted} (. pass, w window, F fail)"
    return Table(title, ["at", "NMI", "#MC", "yield", "stop", "instruction"], rows)


def _mark(verdict: str | None) -> Cell:
    return Cell(_LETTERS[verdict], _STYLES[verdict]) if verdict else Cell("")


def as_findings(report: Object) -> Object:
    """As a report of findings, for the JUnit renderer: each experiment is one, in the suite of its kind."""
    verdicts = {"pass": "pass", "window": "skip", "undecided": "unknown", "fail": "fail"}
    return {
        "target": {"location": report["machine"]},
        "findings": [
            {"stage": one["kind"] or "replay", "check": one["id"], "cpu": None, "verdict": verdicts[one["verdict"]],
             "expected": "handed-over", "observed": one["what"], "reason": one["says"]}
            for one in report["experiments"]
        ],
    }  # fmt: skip
