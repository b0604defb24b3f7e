"""Write docs/reference.md from the tables: stages, checks and generations. A test sees that it is current."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.generations import GENERATIONS
from xen_symbols.crashpath.stages import BY_ID

PATH = Path(__file__).parents[1] / "docs" / "reference.md"


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
    yield "| id | introduced by | releases | other CPUs hooked by | recognised by |"
    yield "|---|---|---|---|---|"
    for generation in GENERATIONS:
        evidence = "; ".join(item.says for item in generation.evidence)
        row = (generation.id, generation.introduced, generation.releases, generation.hook.value, evidence)
        yield f"| {' | '.join(row)} |"
    yield ""
    yield "## Stages"
    yield ""
    yield "| id | CPU | anchor | says |"
    yield "|---|---|---|---|"
    for stage in BY_ID.values():
        yield f"| {stage.id} | {stage.role.value} | {', '.join(stage.anchors) or '-'} | {stage.says} |"
    yield ""
    yield "## Checks"
    yield ""
    yield "| id | for | if it fails | source |"
    yield "|---|---|---|---|"
    for check in CHECKS:
        yield f"| {check.id} | {check.subject.value} | {check.consequence} | {check.source} |"
    consequence = "no crash kernel starts, and the dump is lost"
    yield f"| trace-complete | the machine | {consequence} | xen/arch/x86/machine_kexec.c |"


if __name__ == "__main__":
    PATH.write_text(reference())
