"""A storm's report: the JSON that schema.json describes. shown.py renders it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from xen_symbols.crashpath.engine import TOOL
from xencrash.lab.storm.begin import Scenery
from xencrash.lab.storm.experiment import describe_place
from xencrash.lab.storm.judge import Verdict
from xencrash.lab.storm.record import Recording, shared_words
from xencrash.lab.storm.run import Result
from xencrash.lab.storm.scene import Scene

Object = dict[str, Any]

SCHEMA = 1
_KERNEL = "(crash kernel)"
_WHY_INEXACT = "Xen measures its waits with clocks, and QEMU's run on host time: an experiment that waits may differ"


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
        "generation": scene.identification.generation and scene.identification.generation.id,
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
    """By kind of event, the worst outcome of the experiments that have only that event, on the CPU that is there."""
    found: dict[str, Verdict] = {}
    for action, result in done:
        (first, *others) = result.experiment.events
        if not others and first.target == first.place.cpu:
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
