"""A summary of a crash, as describe/summary.py makes it, in blocks: the answer in the first five lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from xen_symbols.report.backtracelines import SCANNED, way_back
from xen_symbols.report.blocks import Block, Cell, Lines, Table, show, target_line
from xen_symbols.report.crashpath import crash_path
from xen_symbols.text import cpu_list, ranges

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json

_CALLS = 1  # of those that led to a place, in a line: of the first it is most likely that it did
_GROUPS = 3  # of other CPUs, in a line
_ROWS = 64  # of them in a table
_ACROSS = 4  # registers on a line
_EQUAL = 8  # vCPUs that are named, of those on a row


def headline(summary: Json) -> str:
    """What happened, in a line."""
    version = _or_why(summary["xen"], "version", "of unknown version")
    if not summary["crashed"]:
        return f"Xen {version} has not crashed"
    cpu = summary["crashing_cpu"]
    where = " on a CPU that is not known" if cpu is None else f" on CPU {cpu['cpu']}"
    why = summary["why"]
    return f"Xen {version} crashed{where}: {why['says'] or 'why is not known: ' + why['absent']}"


def fields(summary: Json) -> list[Lines]:
    """The answer in four lines, and what stands behind it; each line begins with a name."""
    return [_answer(summary), _about(summary)]


def sections(summary: Json) -> list[Block]:
    """The console, registers, stack, the other CPUs."""
    blocks: list[Block] = [_console(summary["console"])]
    cpu = summary["crashing_cpu"]
    if cpu is not None:
        blocks += [_registers(cpu), _stack(cpu)]
    if summary["others"]:
        blocks.append(_others(summary))
    return blocks


def summary_blocks(summary: Json) -> list[Block]:
    """The whole page."""
    return [Lines([[Cell(headline(summary), "strong")]]), *fields(summary), *sections(summary)]


def _answer(summary: Json) -> Lines:
    """Where it was, what the others did, whether to trust this, and which Xen it is."""
    lines = []
    cpu = summary["crashing_cpu"]
    if cpu is not None:
        lines.append(_line("at", _place(cpu), *_running(cpu)))
    title = "CPUs" if cpu is None else "other CPUs"
    lines.append(_line(title, Cell(_groups_in_short(summary["others"]))))
    lines.append(_line("verdict", *_trust(summary)))
    xen = summary["xen"]
    names = {"changeset": "changeset", "build_id": "build-id"}
    lines.append(_line("Xen", Cell(", ".join(f"{said} {_or_why(xen, name)}" for name, said in names.items()))))
    return Lines(lines)


def _line(name: str, *cells: Cell) -> list[Cell]:
    return [Cell(f"{name:14}", "dim"), *cells]


def _or_why(values: Json, name: str, otherwise: str = "not known") -> str:
    value = values[name]
    return f"{otherwise} ({values['absent'][name]})" if value is None else str(value) or "none"


# -- the first lines --------------------------------------------------------------------------


def _place(cpu: Json) -> Cell:
    if cpu["doing"] is None:
        return Cell(f"not known: {cpu['absent']['doing']}", "unknown")
    calls = cpu["doing"]["calls"][:_CALLS]
    called = f", called by {', '.join(call.partition('+')[0] for call in calls)}" if calls else ""
    return Cell(_doing(cpu["doing"]) + called)


def _doing(doing: Json) -> str:
    event = f" ({doing['event']})" if doing["event"] else ""
    return f"{doing['at'] or 'in the guest'}{event}"


def _running(cpu: Json) -> list[Cell]:
    vcpu = cpu["vcpu"]
    if vcpu is None:
        return [Cell(f"; which vCPU was running is not known: {cpu['absent']['vcpu']}", "unknown")]
    if vcpu["idle"]:
        return [Cell("; no domain was running there")]
    of = " (the hardware domain)" if vcpu["hardware_domain"] else ""
    return [Cell(f"; {vcpu['name']} was running{of}")]


def _groups_in_short(groups: Sequence[Json]) -> str:
    said = [f"{cpu_list(group['cpus'])} {_domain(group)}{_at(group)}" for group in groups[:_GROUPS]]
    if (more := len(groups) - _GROUPS) > 0:
        said.append(f"{more} more group{'s' * (more > 1)} below")
    return "; ".join(said) or "none"


def _domain(group: Json) -> str:
    domain = group["domain"]
    return "vCPU not known" if domain is None else domain if domain == "idle" else f"d{domain}"


def _at(group: Json) -> str:
    doing = group["doing"]
    return "" if doing is None else f" in {doing['at']}" if doing["at"] else " in the guest"


def _trust(summary: Json) -> Iterator[Cell]:
    """The verdict, what it rests on, and the first failure."""
    found = summary["verdict"]
    verdict, first = found["verdict"], found["first"]
    yield Cell(verdict.upper(), verdict)
    if verdict == "pass":
        counted = ", ".join(f"{count} {name}" for name, count in found["counts"].items())
        yield Cell(f": {_held(summary)} ({counted})")
    elif "undecided" in found:
        yield Cell(f": not judged: {found['undecided']}")
    elif first is not None:
        where = "" if first["cpu"] is None else f" on CPU {first['cpu']}"
        why = f": {first['reason']}" if first.get("reason") else ""
        more = found["counts"][verdict] - 1
        yield Cell(f": {first['check']}{where} at {first['stage']}: expected {show(first['expected'])}, "
                   f"observed {show(first['observed'])}{why}{f' (and {more} more)' * bool(more)}")  # fmt: skip
    else:
        yield Cell(": nothing could be judged")


def _held(summary: Json) -> str:
    if not summary["crashed"]:
        return "Xen runs, and is as it should be for a crash to work"
    trusted = "" if summary["target"]["kind"] == "live" else ", so the dump can be trusted"
    return f"every CPU was stopped and saved as it should be{trusted}"


# -- the rest ---------------------------------------------------------------------------------


def _about(summary: Json) -> Lines:
    xen, symbols, generation = summary["xen"], summary["symbols"], summary["generation"]
    lines = [
        _line("command line", Cell(_or_why(xen, "command_line"))),
        _line("compiled", Cell(f"{_or_why(xen, 'compile_date')} by {_or_why(xen, 'compiler')}")),
        _line("target", Cell(target_line(summary["target"]))),
        *(_line("warning", Cell(warning, "unknown")) for warning in summary["target"].get("warnings", ())),
        _line("symbols", Cell(f"{symbols['path']} ({symbols['source']}), build-id {symbols['build_id'] or 'none'}")),
    ]
    if symbols["match"] is not True:
        words = {False: "the symbols are of another build than the Xen there", None: "whether they match is not known"}
        lines.append(_line("", Cell(words[symbols["match"]], "unknown")))
    if generation:
        lines.append(_line("crash path", Cell(crash_path(generation))))
    if summary["crashed"]:
        lines.append(_line("reason, by", Cell(summary["why"]["by"] or "nothing")))
    if summary["crashing_cpu_by"]:
        lines.append(_line("which CPU, by", Cell("; ".join(summary["crashing_cpu_by"]))))
    return Lines([*lines, *_crash_kernel(summary["crash_kernel"])])


def _crash_kernel(got: Json) -> Iterator[list[Cell]]:
    """What the crash kernel got: an image, memory, and notes."""
    absent = got.get("absent", {})
    loaded = {True: Cell("loaded"), False: Cell("NOT loaded", "fail"),
              None: Cell(f"not known: {absent.get('loaded')}", "unknown")}  # fmt: skip
    area = got["area"]
    if area is None:
        memory = Cell(f"; its memory is not known: {absent['area']}", "unknown")
    elif not area["size"]:
        memory = Cell("; no memory is reserved for it", "fail")
    else:
        image = "" if area["image"] is None else f", of which the image takes {area['image'] >> 20} MiB"
        memory = Cell(f"; {area['size'] >> 20} MiB at {area['start']}{image}")
    yield _line("crash kernel", loaded[got["loaded"]], memory)
    for one in got["notes"]:
        state = f"{one['state']}, {one['says']}" if one["state"] else f"not read: {one['says']}"
        yield _line("crash notes", Cell(f"{cpu_list(one['cpus'])}: {state}"))
    yield _line("crash info", Cell("written" if got["info"] else f"not there: {got['info_absent']}"))


def _console(console: Json) -> Lines:
    lines = [
        [Cell(f"> {line}", "strong") if number == console["at"] else Cell(f"  {line}")]
        for number, line in enumerate(console["lines"])
    ]
    if "absent" in console:
        lines.append([Cell(f"  {console['absent']}", "unknown")])
    title = "What Xen printed last" if console["at"] is None else "What Xen printed, around the reason"
    return Lines(lines or [[Cell("  nothing")]], title)


def _registers(cpu: Json) -> Lines:
    title = f"Registers of CPU {cpu['cpu']}"
    if cpu["registers"] is None:
        return Lines([[Cell(f"  not known: {cpu['absent']['registers']}", "unknown")]], title)
    words = [f"{name:>7} {value[2:]:0>16}" for name, value in cpu["registers"].items()]
    lines = [[Cell("  " + "  ".join(words[at : at + _ACROSS]))] for at in range(0, len(words), _ACROSS)]
    return Lines(lines, f"{title} ({cpu['registers_of']})")


def _stack(cpu: Json) -> Lines:
    trace = cpu["backtrace"]
    lines = way_back(trace)
    if "absent" in trace:
        lines.insert(0, [Cell(f"  no registers: {trace['absent']}", "unknown")])
    return Lines([*lines, [Cell(f"  {SCANNED}", "dim")]], f"How CPU {cpu['cpu']} got there")


def _others(summary: Json) -> Table:
    rows = [_row(group) for group in summary["others"][:_ROWS]]
    if (more := len(summary["others"]) - _ROWS) > 0:
        rows.append([Cell(f"{more} more groups are in the JSON", "dim"), *[Cell("")] * 3])
    title = "CPUs" if summary["crashing_cpu"] is None else "The other CPUs"
    return Table(title, ["CPUs", "ran", "where", "interrupted by"], rows)


def _row(group: Json) -> list[Cell]:
    absent: Mapping[str, str] = group.get("absent", {})
    numbers = sorted(set(group["vcpus"]))
    vcpus = f" vCPU {','.join(ranges(numbers)[:_EQUAL])}{', …' * (len(ranges(numbers)) > _EQUAL)}" if numbers else ""
    unknown = "not known" + (f", of CPU {group['cpus'][0]}" if len(group["cpus"]) > 1 else "")
    ran = Cell(_domain(group) + vcpus)
    if group["domain"] is None:
        ran = Cell(f"{unknown}: {absent['domain']}", "unknown")
    doing = group["doing"]
    if doing is None:
        where, event = Cell(f"{unknown}: {absent['doing']}", "unknown"), Cell("")
    else:
        where, event = Cell(doing["at"] or "in the guest"), Cell(doing["event"] or "nothing")
    return [Cell(",".join(ranges(group["cpus"])), "strong"), ran, where, event]
