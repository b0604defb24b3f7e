"""A report as blocks of text and tables, independent of how they are printed. Reads the JSON contract only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xen_symbols.records import NamedTuple
from xen_symbols.report.crashpath import crash_path, near_line
from xen_symbols.report.model import Verdict, worst
from xen_symbols.text import cpu_list, ranges
from xen_symbols.x86 import apic
from xen_symbols.x86.gate import INTERRUPT_GATE, VECTOR_NAMES

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json


class Cell(NamedTuple):
    """Text with the name of a style: pass, fail, unknown, skip, dim, strong, or none."""

    text: str
    style: str = ""


class Lines(NamedTuple):
    """Running text, a line of cells each; with a title a listing, whose spaces count."""

    lines: Sequence[Sequence[Cell]]
    title: str = ""


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]] = ()


Block = Lines | Table


def show(value: Any) -> str:
    """A JSON value as people read it: a handler by its name, a set of choices with "or"."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        if "one_of" in value:
            return " or ".join(show(item) for item in value["one_of"])
        if "symbol" in value and "address" in value:
            return str(value["symbol"] or value["address"])
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(show(item) for item in value) or "none"
    return str(value)


def gate_cell(gate: contract.Gate | None) -> Cell:
    """A gate in short: handler and IST, and whatever else is out of the ordinary."""
    if gate is None:
        return Cell("unread", "unknown")
    text = f"{gate['handler']['symbol']}, IST {gate['ist']}"
    if not gate["present"]:
        text += ", not present"
    if gate["type"] != INTERRUPT_GATE:
        text += f", type {gate['type']}"
    if gate["dpl"]:
        text += f", DPL {gate['dpl']}"
    return Cell(text)


def header(report: contract.Report) -> Lines:
    """What was looked at, and by which symbols and generation."""
    target, symbols, generation = report["target"], report["symbols"], report["generation"]
    match = {True: Cell("match", "pass"), False: Cell("DO NOT MATCH", "fail"), None: Cell("unverified", "unknown")}
    lines = [[Cell("target      ", "dim"), Cell(target_line(target))]]
    lines += [[Cell("warning     ", "dim"), Cell(warning, "unknown")] for warning in target.get("warnings", ())]
    if symbols["path"] is not None:  # nothing could be opened
        given = "".join(f", {name} is {actual}" for name, actual in symbols.get("aliases", {}).items())
        used = f"{symbols['path']} ({symbols.get('source')}){given}, build-id {symbols['build_id'] or 'none'}: "
        lines.append([Cell("symbols     ", "dim"), Cell(used), match[symbols["match"]]])
    lines += [[Cell("crash path  ", "dim"), Cell(near_line(near), "unknown")] for near in report.get("nearest", ())]
    if generation:
        evidence = "; ".join(generation["evidence"])
        lines.append([Cell("crash path  ", "dim"), Cell(crash_path(generation), "strong"), Cell(f": {evidence}")])
    if has_not_crashed(report):
        lines.append([Cell("crashed     ", "dim"), Cell("no", "strong"), Cell(": Xen runs; judged as a running one")])
    elif report["crashing_cpu"] is not None:
        lines.append([Cell("crashed on  ", "dim"), Cell(f"CPU {report['crashing_cpu']}", "strong")])
    return Lines(lines)


def target_line(target: contract.Target) -> str:
    """The target, its format, and what runs it."""
    by = target.get("accelerator")
    return f"{target['location']} ({target['format']}{', ' + by.upper() if by else ''})"


def _lapic_cell(cpu: contract.Cpu) -> Cell:
    lapic = cpu["lapic"]
    mode = None if lapic is None else lapic["mode"]
    spiv = None if lapic is None else lapic.get("spiv")
    if mode is None:
        return Cell("not known", "dim")
    if spiv is None:
        return Cell(mode)
    return Cell(f"{mode}, {'on' if int(spiv, 16) & apic.SPIV_SOFTWARE_ENABLE else 'off'}")


def cpus_table(cpus: Iterable[contract.Cpu], stage: str) -> Table:
    """Each CPU as it was at a stage."""
    rows = []
    for cpu in cpus:
        at = cpu.get("at")
        rows.append(
            [
                Cell(str(cpu["cpu"]), "strong"),
                Cell(cpu.get("role", "")),
                gate_cell(cpu["nmi_gate"]),
                gate_cell(cpu["mc_gate"]),
                Cell(show(cpu["crash_save_done"])),
                _lapic_cell(cpu),
                Cell(at["symbol"] or at["pc"]) if at else Cell("not known", "dim"),
            ]
        )
    return Table(f"CPUs at stage {stage}", ["CPU", "role", "NMI gate", "#MC gate", "save done", "LAPIC", "at"], rows)


def _gates_at(findings: Sequence[contract.Finding], vector: str, crashing: bool, crashing_cpu: int | None) -> str:
    """The gates of the crashing CPU, or of all others, at one stop, equal ones together."""
    gates: dict[int, dict[str, str]] = {}
    for finding in findings:
        cpu, name = finding["cpu"], finding["check"].removeprefix(f"{vector}-gate-")
        if cpu is not None and name in ("handler", "ist") and finding["check"].startswith(vector):
            gates.setdefault(cpu, {})[name] = show(finding["observed"])
    wanted = {
        cpu: f"{gate.get('handler', '-')}/{gate.get('ist', '-')}"
        for cpu, gate in gates.items()
        if (cpu == crashing_cpu) is crashing
    }
    kinds = Counter(wanted.values())
    if len(kinds) <= 1:
        return next(iter(kinds), "-")
    return "  ".join(
        f"{text} ({cpu_list(cpu for cpu in wanted if wanted[cpu] == text)})" for text, _ in kinds.most_common()
    )


def stages_table(report: contract.Report) -> Table:
    """Each stop of a trace: the gates as handler/IST, and how many checks held."""
    crashing = report["crashing_cpu"]
    rows = []
    for number, stage in enumerate(report["stages"]):
        findings = [f for f in report["findings"] if f.get("stop") == number]
        count = Counter(f["verdict"] for f in findings)
        verdict = str(worst(Verdict[f["verdict"].upper()] for f in findings))
        judged = f"{count['pass']} pass" + "".join(f", {count[v]} {v}" for v in ("fail", "unknown") if count[v])
        rows.append(
            [
                Cell(stage["stage"], "strong"),
                Cell("-" if stage["cpu"] is None else str(stage["cpu"])),
                *(
                    Cell(_gates_at(findings, vector, role, crashing))
                    for role in (True, False)
                    for vector in ("nmi", "mc")
                ),
                Cell(judged, verdict),
            ]
        )
    return Table(
        "Stages (gates as handler/IST)",
        ["stage", "CPU", "NMI, crashing", "#MC, crashing", "NMI, others", "#MC, others", "checks"],
        rows,
    )


def stage_line(stage: contract.Stage, findings: Iterable[contract.Finding]) -> Lines:
    """One stop of a trace on one line, for while it runs: the stage, its CPU, and what the checks found there."""
    count = Counter(finding["verdict"] for finding in findings)
    who = "" if stage["cpu"] is None else f"CPU {stage['cpu']}"
    line = [Cell(f"{stage['stage']:15}", "strong"), Cell(f"{who:8}"), Cell(f"{count['pass']} pass", "pass")]
    line += [Cell(f", {count[verdict]} {verdict}", verdict) for verdict in ("fail", "unknown") if count[verdict]]
    return Lines([line])


def gate_changes_table(report: contract.Report) -> Table:
    """Each change of a gate between two stops, with what it changed from and to."""
    rows = [
        [*_what_changed(change), Cell(change["since"] or "-"), Cell(change["stage"]), _writers(change)]
        for change in report["gate_changes"]
    ]
    return Table("Changes of gates", ["CPU", "gate", "what changed", "after stage", "seen at", "written by"], rows)


def watched_gates(answer: Json) -> list[Block]:
    """Each change of a gate while gates were watched."""
    if not answer["changes"]:
        return [Lines([[Cell("no NMI or #MC gate changed")]])]
    rows = [[*_what_changed(change), _writers(change)] for change in answer["changes"]]
    return [Table("Changes of gates", ["CPU", "gate", "what changed", "written by"], rows)]


def _what_changed(change: contract.GateChange) -> list[Cell]:
    return [
        Cell(str(change["cpu"]), "strong"),
        Cell(VECTOR_NAMES[change["vector"]]),
        Cell("; ".join(_property_change(change, name) for name in change["changed"])),
    ]


def _writers(change: contract.GateChange) -> Cell:
    words = (f"CPU {writer['cpu']} {writer['at']['symbol'] or writer['at']['pc']}" for writer in change["writers"])
    return Cell(", ".join(dict.fromkeys(words)) or "not seen")


def _property_change(change: contract.GateChange, name: str) -> str:
    if name == "reserved":  # not a field of a gate's own: the raw bytes hold it
        return f"raw {change['before']['raw']} -> {change['after']['raw']}"
    shown = {"ist": "IST", "dpl": "DPL"}.get(name, name)
    before, after = (show(dict(gate)[name]) for gate in (change["before"], change["after"]))
    return f"{shown} {before} -> {after}"


def has_not_crashed(report: contract.Report) -> bool:
    """Whether Xen runs normally: the last stage seen is `normal`."""
    return bool(report["stages"]) and report["stages"][-1]["stage"] == "normal"


def why_not_pass(report: contract.Report) -> str:
    """Why a report is not `pass`, in a line: the first failure, or what was not decided; empty if it is."""
    for verdict in ("fail", "unknown"):
        found = [finding for finding in report["findings"] if finding["verdict"] == verdict]
        if verdict == "unknown" and report.get("undecided"):
            return report["undecided"]
        if found:
            first = found[0]
            where = "" if first["cpu"] is None else f" on CPU {first['cpu']}"
            problem = f"{verdict}: {first['check']}{where} at {first['stage']}"
            if verdict == "fail":
                return problem
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            return f"{problem}: {first['reason']}{more}"
    return "" if report["verdict"] == "pass" else "nothing could be judged"


def dumps_table(reports: Iterable[contract.Report]) -> Table:
    """Several dumps, a line each: the verdict, and what is wrong first, failures before unknowns."""
    rows = []
    for report in reports:
        location, crashed_on = report["target"]["location"], report["crashing_cpu"]
        crashed = "not crashed" if has_not_crashed(report) else "-" if crashed_on is None else str(crashed_on)
        problem = why_not_pass(report).removeprefix(f"{location}: ")
        generation = crash_path(report["generation"]) if report["generation"] else "-"
        cells = [location, generation, crashed, problem]
        rows.append([Cell(report["verdict"], report["verdict"]), *map(Cell, cells)])
    return Table("Dumps", ["verdict", "dump", "crash path", "crashed on CPU", "first problem"], rows)


_SAID = ("check", "verdict", "expected", "observed", "reason", "follows", "source")
CPUS_WITH_EVIDENCE = 4  # more of the same says nothing new; the JSON report has all of it


def alike(findings: Iterable[contract.Finding]) -> list[list[list[contract.Finding]]]:
    """Failures and unknowns in order. Those of a CPU that say just the same at later stops are together, and then the
    CPUs of which the same is said at the same stages."""

    def said(finding: contract.Finding) -> str:
        return json.dumps([finding.get(name) for name in _SAID], sort_keys=True)

    persisting: dict[tuple[int | None, str], list[contract.Finding]] = {}
    for finding in findings:
        if finding["verdict"] in ("fail", "unknown"):
            persisting.setdefault((finding["cpu"], said(finding)), []).append(finding)
    kinds: dict[tuple[str, ...], list[list[contract.Finding]]] = {}
    for (_, words), same in persisting.items():
        kinds.setdefault((words, *dict.fromkeys(f["stage"] for f in same)), []).append(same)
    return list(kinds.values())


def problems(report: contract.Report) -> Lines | None:
    """Every failure and unknown, in words: what, where first, expected, observed, consequence, where to look. Those
    that follow from another come last, and then those of which one reason is all that is known."""
    lines: list[list[Cell]] = []
    groups = sorted(alike(report["findings"]), key=lambda cpus: bool(cpus[0][0].get("follows")))
    prevented = _prevented(cpus[0][0] for cpus in groups)
    for cpus in groups:
        finding = cpus[0][0]
        if _is_bare(finding) and finding.get("reason") in prevented:
            continue
        verdict = finding["verdict"]
        stages = dict.fromkeys(same["stage"] for same in cpus[0])
        numbers = sorted(same[0]["cpu"] for same in cpus if same[0]["cpu"] is not None)
        whose = cpu_list(numbers) if numbers else "the machine"
        where = f"{whose} at {finding['stage']}"
        lines.append([Cell(f"{verdict.upper():8}", verdict), Cell(f"{finding['check']} ", "strong"), Cell(where)])
        lines.append([Cell(f"         expected {show(finding['expected'])}, observed {show(finding['observed'])}")])
        if any(len(same) > 1 for same in cpus):
            still = [stage for stage in stages if stage != finding["stage"]] or [finding["stage"]]
            lines.append([Cell(f"         still at {', '.join(still)}", "dim")])
        if finding.get("follows"):
            of = "" if not numbers else " of this CPU" if len(numbers) == 1 else " of each of them"
            lines.append([Cell(f"         follows from {finding['follows']}{of}", "dim")])
        elif finding.get("reason"):
            lines.append([Cell(f"         {'so ' if verdict == 'fail' else ''}{finding['reason']}")])
        lines += _evidence([same[0] for same in cpus])
        lines.append([Cell(f"         see {finding['source']}", "dim")])
    for reason, checks in prevented.items():
        lines.append([Cell(f"{'UNKNOWN':8}", "unknown"), Cell(", ".join(checks), "strong")])
        lines.append([Cell(f"         {reason}")])
    return Lines(lines) if lines else None


def _is_bare(finding: contract.Finding) -> bool:
    """Whether it was not made at all: nothing is expected or observed."""
    return finding["verdict"] == "unknown" and finding["expected"] is finding["observed"] is None


def _prevented(findings: Iterable[contract.Finding]) -> dict[str, dict[str, None]]:
    """The checks that were not made for one and the same reason, by the reason, where these are many."""
    found: dict[str, dict[str, None]] = {}
    for finding in filter(_is_bare, findings):
        found.setdefault(finding.get("reason", ""), {})[finding["check"]] = None
    return {reason: checks for reason, checks in found.items() if len(checks) > 4}


def _evidence(findings: Sequence[contract.Finding]) -> list[list[Cell]]:
    lines = []
    for finding in findings[:CPUS_WITH_EVIDENCE]:
        for item in finding["evidence"]:
            place = " ".join(str(item[key]) for key in ("source", "symbol", "address") if key in item)
            raw = f": {shorten(item['raw'])}" if "raw" in item else ""
            whose = f"of CPU {finding['cpu']} " if len(findings) > 1 else ""
            lines.append([Cell(f"         evidence {whose}{place}{raw}", "dim")])
    if findings[0]["evidence"] and len(findings) > CPUS_WITH_EVIDENCE:
        rest = len(findings) - CPUS_WITH_EVIDENCE
        lines.append([Cell(f"         evidence of {rest} more CPUs is in the JSON report", "dim")])
    return lines


def shorten(raw: str) -> str:
    return raw if len(raw) <= 64 else f"{raw[:64]}… ({len(raw) // 2} bytes)"


def verdict_line(report: contract.Report) -> Lines:
    """The last line: the verdict, and the number of findings behind it."""
    count = Counter(finding["verdict"] for finding in report["findings"])
    parts = ", ".join(f"{count[v]} {v}" for v in ("pass", "fail", "unknown", "skip") if count[v])
    lines = [[Cell(report["verdict"].upper(), report["verdict"]), Cell(f"  {parts or 'nothing was judged'}")]]
    if report.get("undecided"):
        lines.append([Cell(f"not decided: {report['undecided']}", "unknown")])
    return Lines(lines)


def _as_found(observed: Any) -> str:
    """A reserved area in MiB, a list of CPUs in ranges."""
    if isinstance(observed, Mapping) and "size" in observed:
        image = f", the image takes {observed['image'] >> 20} MiB" if "image" in observed else ""
        return f"{observed['size'] >> 20} MiB at {observed['start']}{image}"
    if isinstance(observed, Mapping) and "online" in observed:
        return "; ".join(f"{name} {','.join(ranges(cpus)) or 'none'}" for name, cpus in observed.items())
    return show(observed)


def preflight_table(report: contract.Report) -> Table | None:
    """What decides whether a crash would work, a line each, with the gates of all CPUs on one."""
    asked = [finding for finding in report["findings"] if finding["stage"] == "preflight"]
    if not asked:
        return None
    rows = [[Cell(f["verdict"], f["verdict"]), Cell(f["check"]), Cell(_as_found(f["observed"]))] for f in asked]
    gates = Counter(f["verdict"] for f in report["findings"] if "-gate-" in f["check"])
    if gates:
        verdict = str(worst(Verdict.of(word) for word in gates))
        found = ", ".join(f"{gates[word]} {word}" for word in ("pass", "fail", "unknown", "skip") if gates[word])
        rows.append([Cell(verdict, verdict), Cell("gates"), Cell(f"as in normal running: {found}")])
    return Table("Would a crash work?", ["", "what", "found"], rows)


def report_blocks(report: contract.Report) -> list[Block]:
    """A whole report."""
    blocks: list[Block] = [header(report)]
    if preflight := preflight_table(report):
        blocks.append(preflight)
    if len(report["stages"]) > 1:
        blocks.append(stages_table(report))
    if "gate_changes" in report:
        blocks.append(gate_changes_table(report))
        if "writers_absent" in report:
            blocks.append(Lines([[Cell(f"writers not seen: {report['writers_absent']}", "unknown")]]))
    if report["cpus"]:
        last = report["stages"][-1]["stage"] if report["stages"] else "none"
        blocks.append(cpus_table(report["cpus"], last))
    found = problems(report)
    if found:
        blocks.append(found)
    blocks.append(verdict_line(report))
    return blocks
