"""Write the generated pages and figures of docs/ from the tables. A test checks that they are current."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path

from tests import genterminal
from tests.genfigure import picture
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import ByGeneration, Need, Shows
from xen_symbols.crashpath.complete import COMPLETE
from xen_symbols.crashpath.gatechanges import GATE_WRITES
from xen_symbols.crashpath.generations import GENERATIONS, Generation
from xen_symbols.crashpath.preflight import BUILT_IN, PROMISES
from xen_symbols.crashpath.stages import BY_ID, CrashStep, OtherStep, Role
from xen_symbols.crashpath.timeline import HELPERS, PATH, Value, Whose, Write
from xen_symbols.x86.gate import VECTOR_NAMES
from xencrash.guests import FAULTS
from xencrash.lab.rows import XENS

DOCS = Path(__file__).parents[1] / "docs"


def reference() -> str:
    """The text of the page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Generated from the tables in `xen_symbols/crashpath` by `python -m tests.gendocs`."
    yield ""
    yield "## Generations"
    yield ""
    yield "Judged on: the real Xens whose crash was followed to its end and judged, those of the lab (lab) in each run"
    yield "of its matrix, others once, built from source. The tests run every generation on the reference guest, too."
    yield ""
    yield "| id | introduced by | releases | other CPUs hooked by | recognised by | judged on |"
    yield "|---|---|---|---|---|---|"
    for generation in GENERATIONS:
        evidence = "; ".join(item.says for item in generation.evidence)
        row = (generation.id, generation.introduced, generation.releases, generation.hook.value, evidence,
               _judged_on(generation))  # fmt: skip
        yield f"| {' | '.join(row)} |"
    yield ""
    yield "## Stages"
    yield ""
    yield "| id | CPU | anchor | says |"
    yield "|---|---|---|---|"
    for stage in BY_ID.values():
        cpu, anchors = (stage.role.value, ", ".join(stage.anchors)) if stage.anchors else ("-", "-")
        yield f"| {stage.id} | {cpu} | {anchors} | {stage.says} |"
    yield ""
    yield "## Checks"
    yield ""
    yield "Was a promise seen to be kept, or only not seen to be broken? What a pass shows, at the end of a trace:"
    yield ""
    for shows in Shows:
        yield f"- {_word(shows)}: {shows.value}"
    yield ""
    yield "| id | for | if it fails | a pass shows | source |"
    yield "|---|---|---|---|---|"
    for check in CHECKS:
        yield f"| {check.id} | {check.subject.value} | {check.consequence} | {_word(check.shows)} | {check.source} |"
    places = "; ".join(dict.fromkeys(COMPLETE.sources.values()))
    row = (COMPLETE.id, COMPLETE.subject, COMPLETE.consequence, _word(Shows.KEPT), f"from where it came to: {places}")
    yield f"| {' | '.join(row)} |"
    yield ""
    yield "What they need of a target; without it they are skipped or unknown:"
    yield ""
    yield "| need | checks |"
    yield "|---|---|"
    for need in Need:
        checks = "every other" if need is Need.MEMORY else ", ".join(c.id for c in CHECKS if c.needs is need)
        yield f"| {need.value} | {checks} |"
    yield ""
    yield "When the generation of the crash path decides what is right; where none fits, such a check is unknown:"
    yield ""
    yield "| the generation decides | checks |"
    yield "|---|---|"
    for each in ByGeneration:
        ids = dict.fromkeys(c.id for c in CHECKS if c.by_generation is each)
        yield f"| {each.value} | {'every other' if each is ByGeneration.ALWAYS else ', '.join(ids)} |"
    yield ""
    yield "## Preflight"
    yield ""
    yield "What `xencrash preflight` judges of a Xen that runs, besides the checks for one:"
    yield ""
    yield "| id | if it fails | source |"
    yield "|---|---|---|"
    for promise in (BUILT_IN, *PROMISES):
        ends = " (a trace says so when it begins)" * promise.ends_trace
        yield f"| {promise.id} | {promise.consequence or 'never fails'}{ends} | {promise.source} |"
    yield ""
    yield "## The crash path"
    yield ""
    yield "Its writes in order (`xen_symbols/crashpath/timeline.py`): once a CPU has completed the step, the object has"
    yield "the new value. Other CPUs take their steps while the crashing one waits, or later if they answer late."
    yield ""
    yield "| step | of | object | becomes | generations | source |"
    yield "|---|---|---|---|---|---|"
    for write in PATH:
        assert isinstance(write.when, enum.Enum)
        cpu = "another CPU" if isinstance(write.when, OtherStep) else "the crashing CPU"
        step = f"{write.when.name.lower().replace('_', ' ')}, {cpu}"
        row = (step, write.whose.value, write.object.name, _value(write), _generations(write), write.by.source)
        yield f"| {' | '.join(row)} |"
    yield ""
    yield "## Changes of gates"
    yield ""
    yield "The changes that `gate-change` allows, each between the stages named, in the generations named. The writer"
    yield "is judged too, if a watchpoint saw it (`trace --gates`), from the beginning of the crash, on CPUs that are"
    yield "online. If it was not seen, the finding says so, and only what changed is judged. A function includes its"
    yield "parts (`.cold`, `.part.0`), and the helpers that compilers may leave as separate functions:"
    yield f"{', '.join(HELPERS)}."
    yield ""
    yield "| gate | becomes | not before | not after | generations | source | written by |"
    yield "|---|---|---|---|---|---|---|"
    for gate, write in GATE_WRITES:
        whose = f"{VECTOR_NAMES[gate.vector]} gate, {write.whose.value}"
        becomes = f"{'IST' if gate.property == 'ist' else gate.property} {_value(write)}"
        if write.window.with_guest:
            becomes += ", with an HVM guest's state"
        row = (whose, becomes, _stage_at(write.window.first - 1), _stage_at(write.window.last), _generations(write),
               write.by.source, _writer(write))  # fmt: skip
        yield f"| {' | '.join(row)} |"


def _judged_on(generation: Generation) -> str:
    """The real Xens; where there are none, that it was seen on the reference guest only."""
    return ", ".join(f"{xen} (lab)" if xen in XENS else xen for xen in generation.judged_on) or (
        "**the reference guest only**"
    )


def _word(shows: Shows) -> str:
    return shows.name.lower().replace("_", " ")


def _value(write: Write) -> str:
    return str(write.to.value if isinstance(write.to, Value) else write.to)


def _generations(write: Write) -> str:
    made_in = [generation.id for generation in GENERATIONS if write.made_in(generation)]
    return "all" if len(made_in) == len(GENERATIONS) else ", ".join(made_in)


def _writer(write: Write) -> str:
    if write.whose is Whose.OFFLINE:
        return "not judged"
    functions = ", ".join(name for name in write.by.functions if name not in HELPERS)
    return f"{functions} on {'the CPU itself' if write.by.itself else 'the crashing CPU'}"


def _stage_at(step: int) -> str:
    """The first stage at which the crashing CPU has completed a step."""
    if step < CrashStep.SAVED:
        return "normal"
    return next(s.id for s in BY_ID.values() if s.role is Role.CRASHING and s.crash_step == step)


def faults() -> str:
    """The page of the reference guest's faults, and what each is expected to make fail."""
    return "\n".join(_fault_lines()) + "\n"


def _fault_lines() -> Iterator[str]:
    yield "# Faults of the reference guest"
    yield ""
    yield "Generated from `scripts/lib/xencrash/guests/faults.py` by `python -m tests.gendocs`. The tests run each row"
    yield "live, and judge a dump that QEMU takes at the end, which also shows the fault unless stated otherwise. C is"
    yield "the crashing CPU, F the faulty one, O each other one; the stage is the first at which the fault can be seen."
    yield ""
    for fault in FAULTS:
        yield f"## {fault.id}"
        yield ""
        yield fault.does
        yield ""
        if not fault.visible:
            yield f"It leaves no trace in any state that can be read: {fault.invisible}"
            yield ""
        elif fault.not_in_a_dump:
            yield f"A dump taken at the end does not show it: {fault.not_in_a_dump}."
            yield ""
        if mended := [generation for generation in fault.generations if not fault.not_in_a_dump
                      and fault.gone_from_a_dump(generation)]:  # fmt: skip
            yield f"In {', '.join(mended)} machine_kexec() undoes it: a dump taken at the end does not show it."
            yield ""
        yield "| generations | finds |"
        yield "|---|---|"
        by_findings: dict[str, list[str]] = {}
        for generation in fault.generations:
            found = fault.expected(generation)
            words = "; ".join(f"{e.check} ({e.cpu or 'machine'}, {e.stage})" for e in found) or "nothing"
            by_findings.setdefault(words, []).append(generation)
        for words, ids in by_findings.items():
            yield f"| {', '.join(ids)} | {words} |"
        yield ""


PAGES = {"reference.md": reference, "faults.md": faults, "crash-path.svg": picture}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    (DOCS / "trace.svg").write_text(genterminal.picture())
