"""A storm's report: the JSON that schema.json describes, and its renderings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from xen_symbols.crashpath.engine import TOOL
from xen_symbols.report.blocks import Block, Cell, Lines, Table
from xencrash.lab.storm.begin import Scenery
from xencrash.lab.storm.experiment import describe_place
from xencrash.lab.storm.judge import Verdict
from xencrash.lab.storm.record import Recording, shared_words
from xencrash.lab.storm.run import Result
from xencrash.lab.storm.scene import Scene

Object = dict[str, Any]

SCHEMA = 1
_STYLES = {"pass": "pass", "window": "unknown", "fail": "fail", "undecided": "unknown"}
_LETTERS = {"pass": ".", "window": "w", "fail": "F", "undecided": "?"}
_KERNEL = "(crash kernel)"
_WHY_INEXACT = (
    "Xen measures its waits with clocks, and QEMU's run on host time: an experiment that waits may differ"
)


def function_of(pc: int, scene: Scene) -> str:
    found = scene.symbols.lookup(pc)
    return found[0].name if found else _KERNEL


def to_json(results: Sequence[Result], scenery: Scenery, about: Mapping[str, Any], planned: int | None) -> Object:
    """`about` says what crashed, the seed, and how long it took."""
    recording, scene = scenery.recording, scenery.scene
    verdicts = Counter(str(result.outcome.verdict) for result in results)
    return {
        "schema": SCHEMA,
        "tool": dict(TOOL),
        **about,
        "generation": scene.identification.generation.id,
        "crashing_cpu": scene.crashing,
        "cpus": scene.cpus,
        "planned": planned,
        "counts": {str(verdict): verdicts.get(str(verdict), 0) for verdict in Verdict},
        "shared_words": [scene.symbols.describe(word) for word in sorted(shared_words(recording.touches))],
        "functions": list(_functions(results, recording, scene)),
        "windows": list(_windows(results, scene)),
        "experiments": [_experiment(result) for result in results],
        "verdict": str(verdict_of(results)),
    }


def verdict_of(results: Iterable[Result]) -> Verdict:
    """The worst; windows are not failures. Without any result nothing is decided."""
    found = [result.outcome.verdict for result in results]
    worst = max(found, default=Verdict.UNDECIDED)
    return Verdict.PASS if worst is Verdict.WINDOW else worst


def _experiment(result: Result) -> Object:
    out: Object = {
        "id": result.id,
        "kind": result.experiment.kind,
        "verdict": str(result.outcome.verdict),
        "what": result.outcome.what,
        "says": result.outcome.says,
        "seconds": result.seconds,
    }
    if result.unfired:
        out["unfired"] = result.unfired
    if result.exact is not None:
        out["exact"] = result.exact
    if result.exact is False:
        out["inexact_because"] = _WHY_INEXACT
    if result.shrunk:
        out["shrunk"] = result.shrunk
    return out


def _functions(results: Sequence[Result], recording: Recording, scene: Scene) -> Iterator[Object]:
    """Coverage: what each CPU's role executes of each function, what was injected there, and the outcomes."""
    by_place: dict[tuple[str, int], list[tuple[str, Result]]] = {}
    for result in results:
        for event in result.experiment.events:
            role = _role(event.place.cpu, scene)
            by_place.setdefault((role, event.place.pc), []).append((event.action.value, result))
    executed: dict[tuple[str, str], dict[int, None]] = {}
    for step in recording.steps:
        key = (_role(step.place.cpu, scene), function_of(step.place.pc, scene))
        executed.setdefault(key, {}).setdefault(step.place.pc)
    for (role, function), pcs in executed.items():
        done = [found for pc in pcs for found in by_place.get((role, pc), [])]
        yield {
            "function": function,
            "role": role,
            "instructions": len(pcs),
            "touched": sum(bool(by_place.get((role, pc))) for pc in pcs),
            "experiments": dict(Counter(action for action, _ in done)),
            "outcomes": dict(Counter(str(result.outcome.verdict) for _, result in done)),
            "lines": [
                {
                    "at": describe_place(pc, scene.symbols),
                    "text": recording.texts.get(pc),
                    "outcomes": _outcomes_at(by_place.get((role, pc), [])),
                }
                for pc in sorted(pcs)
            ],
        }


def _outcomes_at(done: Iterable[tuple[str, Result]]) -> dict[str, str]:
    """By kind of event, the worst outcome of the experiments that have only that event."""
    found: dict[str, Verdict] = {}
    for action, result in done:
        if len(result.experiment.events) == 1:
            found[action] = max(found.get(action, Verdict.PASS), result.outcome.verdict)
    return {action: str(verdict) for action, verdict in found.items()}


def _role(cpu: int, scene: Scene) -> str:
    return "crashing" if cpu == scene.crashing else "other"


def _windows(results: Sequence[Result], scene: Scene) -> Iterator[Object]:
    """Where the machine is lost and no code can help: the number of instructions, by event and reason."""
    found: dict[tuple[str, str, str], dict[int, None]] = {}
    for result in results:
        if result.outcome.verdict is Verdict.WINDOW and len(result.experiment.events) == 1:
            event = result.experiment.events[0]
            on = _role(event.target, scene) + ("" if event.target == event.place.cpu else " (from there)")
            found.setdefault((event.action.value, on, result.outcome.what), {}).setdefault(event.place.pc)
    for (action, on, what), pcs in found.items():
        yield {
            "event": action,
            "on": on,
            "why": what,
            "instructions": len(pcs),
            "functions": dict(Counter(function_of(pc, scene) for pc in pcs)),
        }


# Renderings: of the JSON alone.


def blocks(report: Object, pictures: Sequence[str] = ()) -> list[Block]:
    """Counts, coverage, windows, failures; and each function of `pictures`, instruction by instruction."""
    counts = report["counts"]
    head = [
        [Cell("machine     ", "dim"), Cell(report["machine"], "strong"), Cell(f", QEMU {report['qemu']}, "
         f"{report['cpus']} CPUs, CPU {report['crashing_cpu']} crashes, generation {report['generation']}")],
        [Cell("experiments ", "dim"), Cell(_done(report))],
        [Cell("outcomes    ", "dim"), *_counted(counts)],
    ]  # fmt: skip
    return [
        Lines(head), _coverage(report), *_window_table(report), *_failures(report),
        *(_picture(function) for function in report["functions"] if function["function"] in pictures),
    ]  # fmt: skip


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


def _window_table(report: Object) -> list[Block]:
    if not report["windows"]:
        return []
    rows = [
        [Cell(window["event"]), Cell(window["on"]), Cell(window["why"], "unknown"), Cell(str(window["instructions"])),
         Cell(", ".join(f"{name} {count}" for name, count in window["functions"].items()))]
        for window in report["windows"]
    ]  # fmt: skip
    return [Table("Windows that no code can close", ["event", "on", "why", "instructions", "where"], rows)]


def _failures(report: Object) -> list[Block]:
    bad = [one for one in report["experiments"] if one["verdict"] in ("fail", "undecided")]
    if not bad:
        return []
    rows = []
    for one in bad:
        exact = {True: "same again", False: "different outcome", None: ""}[one.get("exact")]
        says = one["says"] + (f" (enough: {one['shrunk']})" if one.get("shrunk") else "")
        rows.append([Cell(one["id"], "strong"), Cell(one["what"], _STYLES[one["verdict"]]), Cell(exact), Cell(says)])
    return [Table("Failures (--replay ID repeats one)", ["ID", "what", "again", "what happened"], rows)]


def _picture(function: Object) -> Table:
    rows = [
        [Cell(line["at"], "dim"), *(_mark(line["outcomes"].get(name)) for name in ("nmi", "mc", "yield", "stop")),
         Cell(line["text"] or "")]
        for line in function["lines"]
    ]  # fmt: skip
    title = f"{function['function']}, on the {function['role']} CPU (. pass, w window, F fail)"
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
