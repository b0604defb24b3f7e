"""docs/crash-path.svg: the crash path as a picture, from its tables. gendocs.py writes it with the generated pages."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from xen_symbols.crashpath.generations import GENERATIONS
from xen_symbols.crashpath.stages import AFTERWARDS, STAGES, UNBLOCKED, CrashStep, OtherStep, Role, Stage
from xen_symbols.crashpath.timeline import NMI_LATCH, PATH, Value, Whose, Write

ROW, TOP = 22, 86  # pixels: of a line; above the first
LANES = {False: 158, True: 572}  # where what the crashing CPU writes begins, and what each other CPU writes
LANE = 406
DOTS, COLUMN = 994, 27
WIDTH = DOTS + COLUMN * len(GENERATIONS) + 20
STYLE = """
text { font: 13px sans-serif; fill: #1b1f24 } .stage { font-weight: bold } .head { font-weight: bold; font-size: 14px }
.lane { fill: #f1f5fb } .other { fill: #fdf4e7 } .line { stroke: #6b7683; stroke-dasharray: 3 3 } .dot { fill: #0b5fa5 }
.none { stroke: #c3c9d1 } .box { fill: #ffffff }
"""


def picture() -> str:
    """The text of the file."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    marks = list(_marks())
    height = TOP + ROW * len(marks) + 16
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    yield "<title>Xen's crash path: which CPU writes what, when, in which generations</title>"
    yield f"<style>{STYLE}</style>"
    yield f'<rect class="box" width="{WIDTH}" height="{height}"/>'
    for other, x in LANES.items():
        name = "lane other" if other else "lane"
        yield f'<rect class="{name}" x="{x - 8}" y="{TOP - 22}" width="{LANE}" height="{height - TOP + 12}"/>'
        yield _text(x, TOP - 30, "each other CPU" if other else "the crashing CPU", "head")
    yield _text(8, TOP - 30, "stage", "head")
    for index, generation in enumerate(GENERATIONS):
        x = DOTS + COLUMN * index + 8
        yield f'<text transform="translate({x} {TOP - 14}) rotate(-50)">{escape(generation.id)}</text>'
    for row, mark in enumerate(marks):
        y = TOP + ROW * row + 8
        if isinstance(mark, Write):
            yield _text(LANES[_by_other(mark)], y, f"{_object(mark)}: {_value(mark)}")
            for index, generation in enumerate(GENERATIONS):
                x = DOTS + COLUMN * index + 5
                made = mark.made_in(generation)
                yield (f'<circle class="dot" cx="{x}" cy="{y - 4}" r="5"/>' if made else
                       f'<path class="none" d="M{x - 4} {y - 4}h8"/>')  # fmt: skip
        else:
            role, name = mark
            end = LANES[True] - 16 if role is Role.CRASHING else WIDTH - 14
            yield f'<path class="line" d="M{LANES[role is Role.OTHER] - 8} {y - 4}H{end}"/>'
            yield _text(8, y, name, "stage")
    yield "</svg>"


def _marks() -> Iterator[Write | tuple[Role, str]]:
    """The writes in order, and before the first that follows it each stage: all of a CPU's writes up to a stage are
    made there."""
    waiting = list(STAGES)
    for write in PATH:
        while waiting and _passed(waiting[0], write):
            yield waiting[0].role, waiting.pop(0).id
        yield write
        if write.object is NMI_LATCH and not _by_other(write):
            yield UNBLOCKED.role, UNBLOCKED.id
    for stage in (*waiting, AFTERWARDS):
        yield stage.role, stage.id


def _passed(stage: Stage, write: Write) -> bool:
    if stage.role is Role.OTHER:
        return not _by_other(write) or write.when > stage.other_step
    return stage.crash_step <= CrashStep.ARMED if _by_other(write) else write.when > stage.crash_step


def _by_other(write: Write) -> bool:
    return isinstance(write.when, OtherStep)


_OF = {Whose.NOT_CRASHING: "the others' ", Whose.OTHER: "the others' ", Whose.EVERY: "every CPU's "}


def _object(write: Write) -> str:
    name = write.object.name
    prefix = "" if _by_other(write) else _OF.get(write.whose, "")
    return prefix + (name.removeprefix("its ") if prefix else name).replace(", ist", ", IST")


def _value(write: Write) -> str:
    if isinstance(write.to, bool):
        return "set" if write.to else "clear"
    return str(write.to.value if isinstance(write.to, Value) else write.to)


def _text(x: int, y: int, words: str, name: str = "") -> str:
    return f'<text class="{name}" x="{x}" y="{y}">{escape(words)}</text>'
