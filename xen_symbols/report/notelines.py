"""A dump's notes, Xen's own crash notes, and what symbols lack, in lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xen_symbols.text import cpu_list

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


def note_lines(notes: Sequence[Json]) -> list[str]:
    """The ELF notes of a file, those of a kind together: each CPU has its own of some."""
    kinds: dict[tuple[str, str, int, str], list[Json]] = {}
    for note in notes:
        kinds.setdefault((note["name"], note["type"], note["bytes"], note["what"]), []).append(note)
    lines = []
    for (name, kind, size, what), alike in kinds.items():
        other = [note.get("cpu", 0) for note in alike if note.get("in_memory") is False]
        differs = f"; NOT what Xen's memory holds for {cpu_list(other)}" if other else ""
        lines.append(f"{len(alike)} x {name} {kind}, {size} bytes: {what}{differs}")
    return lines


def buffer_lines(buffers: Sequence[Json]) -> list[str]:
    """Xen's own buffers of crash notes, by what they hold."""
    kinds: dict[str, list[int]] = {}
    for buffer in buffers:
        state = f"{buffer['state']}, {buffer['says']}" if buffer["state"] else f"not read: {buffer['says']}"
        kinds.setdefault(state, []).append(buffer["cpu"])
    return [f"{cpu_list(cpus)}: {state}" for state, cpus in kinds.items()]


def info_note_lines(info: Json) -> list[str]:
    """Xen's CRASH_INFO note."""
    absent = info.get("absent", {})
    if "version" not in info:
        return [f"not known: {absent['info']}"]

    def text(name: str) -> str:
        return f"not known ({absent[name]})" if info[name] is None else info[name] or "not named"

    when = text("compile_date")  # in some builds with the time
    if text("compile_time") not in when:
        when += f" {text('compile_time')}"

    return [
        f"{info['version']}, changeset {text('changeset')}",
        f"compiled by {text('compiler')} on {when}",
        f"physical start {info['xen_phys_start']}, tainted {info['tainted']}, "
        f"dom0's pfn-to-mfn frame list {info['dom0_pfn_to_mfn_frame_list_list']}",
    ]


def missing_lines(missing: Sequence[Json]) -> list[str]:
    """What the symbols do not name, and what that makes unknown, in at most two lines."""
    values = [" or ".join(row["names"]) for row in missing if row["stage"] is None]
    stages = [f"{row['stage']} ({' or '.join(row['names'])})" for row in missing if row["stage"] is not None]
    lines = [f"{', '.join(values)}: what is read through them is unknown"] if values else []
    return lines + ([f"stages {', '.join(stages)}: a trace does not stop there"] if stages else [])
