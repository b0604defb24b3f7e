"""A report as a picture, before anything knows how it is drawn: CPUs down, stages across, in each cell what was read of
the CPU there, what of it changed, and the findings that are not a pass. Reads the JSON contract only.

What other CPUs do between two stops of the crashing one comes in any order. Their stops at one stage are one column, in
which each CPU is as it was at its own stop: CPUs that do the same are equal, and 32 of them are a few rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xen_symbols.records import NamedTuple
from xen_symbols.report.blocks import alike, show
from xen_symbols.text import cpu_list
from xen_symbols.x86 import apic
from xen_symbols.x86.gate import INTERRUPT_GATE

if TYPE_CHECKING:
    from xen_symbols.report import contract

LINES = ("NMI gate", "#MC gate", "LAPIC", "NMIs")  # of each cell
_PROPERTIES = ("handler", "ist", "present", "type", "dpl")
_GATES = {f"{vector}-gate-{name}": (vector, name) for vector in ("nmi", "mc") for name in _PROPERTIES}
_SHOWN = frozenset(_GATES) | {"lapic-mode", "lapic-enabled", "nmi-latch"}
_PROBLEMS = ("fail", "unknown")

Group = list[list["contract.Finding"]]  # CPUs of which the same is said, and of each of them the findings that say it
_Key = tuple[int, "int | None"]  # column, and CPU (None: the machine)


class Value(NamedTuple):
    """What was read, or None, and what it was when it was read before, if it was."""

    text: str | None
    before: str | None = None


class Mark(NamedTuple):
    """A failure or an unknown, and the number of its group."""

    verdict: str
    check: str
    group: int


class Column(NamedTuple):
    """Stops of other CPUs at one stage, or one stop: the numbers of its stops, and the CPUs that they were of."""

    stage: str
    stops: tuple[int, ...]
    cpus: tuple[int, ...]


class Square(NamedTuple):
    """A CPU in a column: a value for each of the LINES (none of the machine's), and what was found wrong. `judged`: any
    check passed or failed."""

    values: tuple[Value, ...]
    marks: tuple[Mark, ...]
    judged: bool

    @property
    def verdict(self) -> str:
        found = {mark.verdict for mark in self.marks}
        return next((word for word in _PROBLEMS if word in found), "pass" if self.judged else "skip")


class Row(NamedTuple):
    """CPUs that are equal in every cell."""

    name: str
    role: str
    squares: tuple[Square, ...]


class Picture(NamedTuple):
    columns: Sequence[Column]
    machine: Row
    cpus: Sequence[Row]
    unread: Mapping[str, str]  # why a line is empty, by its name


def groups(report: contract.Report) -> list[Group]:
    """Failures and unknowns that say the same, in the order in which they are shown: those that follow come last."""
    return sorted(alike(report["findings"]), key=lambda cpus: bool(cpus[0][0].get("follows")))


def columns(stops: Sequence[contract.Stage], crashing: int | None) -> list[Column]:
    """The stops as columns, each where its first one is. A CPU's second time at a stage is a column of its own."""
    between, times = 0, Counter[tuple[int, str, int]]()
    found: dict[tuple[int, str, int], list[int]] = defaultdict(list)
    for number, stop in enumerate(stops):
        stage, cpu = stop["stage"], stop["cpu"]
        if crashing is None or cpu is None or cpu == crashing:
            found[number, stage, 0].append(number)
            between = number + 1
        else:
            times[between, stage, cpu] += 1
            found[between, stage, times[between, stage, cpu]].append(number)
    return [
        Column(stage, tuple(numbers), tuple(cpu for number in numbers if (cpu := stops[number]["cpu"]) is not None))
        for (_, stage, _), numbers in found.items()
    ]


def picture(report: contract.Report, grouped: Sequence[Group]) -> Picture:
    """The picture of a report, whose marks number the groups."""
    stops: Sequence[contract.Stage] = report["stages"] or [{"stage": "-", "cpu": None, "at": None}]
    drawn = columns(stops, report["crashing_cpu"])
    column_of = {stop: number for number, column in enumerate(drawn) for stop in column.stops}
    own = {(column_of[number], stop["cpu"]): number for number, stop in enumerate(stops)}
    seen: dict[_Key, dict[str, Any]] = defaultdict(dict)
    marks: dict[_Key, dict[Mark, None]] = defaultdict(dict)
    numbers = {id(f): number for number, group in enumerate(grouped) for same in group for f in same}
    first = {stage["stage"]: number for number, stage in reversed(list(enumerate(stops)))}
    judged: set[_Key] = set()
    for finding in report["findings"]:
        stop, cpu = finding.get("stop", first.get(finding["stage"], len(stops) - 1)), finding["cpu"]
        verdict, check = finding["verdict"], finding["check"]
        column = column_of[stop]
        if verdict != "skip":
            judged.add((column, cpu))
        if check in _SHOWN and stop == own.get((column, cpu), drawn[column].stops[-1]):
            seen[column, cpu][check] = finding["observed"]
        if verdict in _PROBLEMS:
            marks[column, cpu][Mark(verdict, check, numbers[id(finding)])] = None
    known = {cpu["cpu"]: cpu for cpu in report["cpus"]}

    def row(cpu: int | None) -> tuple[Square, ...]:
        known_texts: list[str | None] = [None] * len(LINES)
        squares = []
        for column in range(len(drawn)):
            key, values = (column, cpu), []
            if cpu is not None:
                last = known.get(cpu) if column == len(drawn) - 1 else None
                for line, text in enumerate(_texts(seen.get(key, {}), last)):
                    values.append(Value(text, known_texts[line]))
                    known_texts[line] = text or known_texts[line]
            found = sorted(marks.get(key, ()), key=lambda mark: (_PROBLEMS.index(mark.verdict), mark.group))
            squares.append(Square(tuple(values), tuple(found), key in judged))
        return tuple(squares)

    numbers_of = sorted({cpu for _, cpu in judged | seen.keys() if cpu is not None} | known.keys())
    roles = {number: cpu.get("role", "") for number, cpu in known.items()}
    rows = _folded((number, roles.get(number, ""), row(number)) for number in numbers_of)
    return Picture(drawn, Row("Machine", "", row(None)), rows, _unread(report["cpus"], rows))


def _folded(cpus: Iterable[tuple[int, str, tuple[Square, ...]]]) -> list[Row]:
    """The CPUs that are equal in everything on one row, in the order of the first of each."""
    equal: dict[tuple[str, tuple[Square, ...]], list[int]] = {}
    for number, role, squares in cpus:
        equal.setdefault((role, squares), []).append(number)
    return [Row(cpu_list(numbers), role, squares) for (role, squares), numbers in equal.items()]


def _texts(seen: Mapping[str, Any], last: contract.Cpu | None) -> Iterator[str | None]:
    """A text for each of the LINES, of what the checks observed; at the last stop also of what the report has of a CPU
    that no check asked for."""
    for vector in ("nmi", "mc"):
        gate = {name: seen.get(f"{vector}-gate-{name}") for name in _PROPERTIES}
        if last is not None and gate["handler"] is None:
            gate = dict((last["nmi_gate"] if vector == "nmi" else last["mc_gate"]) or {})
        yield _gate(gate)
    mode, enabled = seen.get("lapic-mode"), seen.get("lapic-enabled")
    lapic = last["lapic"] if last is not None else None
    mode = mode or (lapic["mode"] if lapic else None)
    if enabled is None and lapic and (spiv := lapic.get("spiv")) is not None:
        enabled = bool(int(spiv, 16) & apic.SPIV_SOFTWARE_ENABLE)
    yield mode and mode + {True: ", on", False: ", off", None: ""}[enabled]
    blocked = last.get("nmi_blocked") if last is not None else None
    yield seen.get("nmi-latch") or {True: "blocked", False: "unblocked", None: None}[blocked]


def _gate(gate: Mapping[str, Any]) -> str | None:
    """A gate as handler/IST, and whatever else is out of the ordinary."""
    if gate.get("handler") is None:
        return None
    text = f"{show(gate['handler'])}/{show(gate.get('ist'))}"
    if gate.get("present") is False:
        text += ", not present"
    if gate.get("type") not in (None, INTERRUPT_GATE):
        text += f", type {gate['type']}"
    return f"{text}, DPL {gate['dpl']}" if gate.get("dpl") else text


def _unread(cpus: Sequence[contract.Cpu], rows: Sequence[Row]) -> dict[str, str]:
    """Why nothing stands in a line, where the report has the reason."""
    empty = [
        name for number, name in enumerate(LINES)
        if not any(square.values[number].text for row in rows for square in row.squares)
    ]  # fmt: skip
    fields = {"NMI gate": "nmi_gate", "#MC gate": "mc_gate", "LAPIC": "lapic", "NMIs": "nmi_blocked"}
    found = {}
    for name in empty:
        reasons = dict.fromkeys(cpu["absent"][fields[name]] for cpu in cpus if fields[name] in cpu.get("absent", {}))
        found[name] = "; ".join(reasons) or "not read"
    return found
