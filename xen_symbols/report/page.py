"""A report as a page of HTML: one file that refers to nothing outside it, and runs no script.

All text passes `_text`, which leaves nothing of it to be obeyed; the page allows itself nothing but its own style sheet
(Content-Security-Policy). What is written is ASCII, the rest as references: right in whatever encoding the output has.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from xen_symbols.report.blocks import (
    CPUS_WITH_EVIDENCE,
    Block,
    Cell,
    Lines,
    Table,
    cpus_table,
    dumps_table,
    gate_changes_table,
    header,
    preflight_table,
    shorten,
    show,
    verdict_line,
)
from xen_symbols.report.picture import LINES, Column, Group, Mark, Row, Square, Value, groups, picture
from xen_symbols.report.summary import fields, headline, sections
from xen_symbols.text import cpu_list, escaped, ranges

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json

_CSS = Path(__file__).with_name("page.css")
_SIGNS = {"fail": "\u2717", "unknown": "?", "pass": "\u2713", "skip": "\u2013"}
_MARKS = 3  # links in a cell; the rest are counted
_GROUPS, _OPEN = 500, 50  # findings on a page, and those unfolded: 4096 CPUs may each fail in their own way
_HEAD = 20  # characters of the CPUs in a column's head; more are counted
_WIDE = 3  # columns, above which their heads stand upright
_NARROW = 40  # characters of a row for which a telephone is wide enough


def page(report: contract.Report) -> Iterator[str]:
    """The page of one report."""
    name = report["target"]["location"]
    yield from _document(f"{report['verdict']}: {name}", [f"<h1>{_text(name)}</h1>", *_report(report, ""), _by(report)])


def pages(reports: Iterable[contract.Report]) -> Iterator[str]:
    """One page of several reports: an index, and each below it."""
    listed, sections = [], []
    for number, report in enumerate(reports):
        listed.append(report)
        place = f"r{number}-"
        parts = "".join(_report(report, place))
        name = f"<h1>{_verdict(report['verdict'])} {_text(report['target']['location'])}</h1>"
        back = '<p class="back"><a href="#index">All dumps</a></p>'
        sections.append(f'<section id="{place}top">{name}{parts}{back}</section>')
    links = [f"#r{number}-top" for number in range(len(listed))]
    yield from _document("Dumps", [_index(listed, links), *sections, *map(_by, listed[:1])])


def index(reports: Iterable[contract.Report], files: Sequence[str]) -> Iterator[str]:
    """The index of reports that are in files beside it."""
    yield from _document("Dumps", [_index(list(reports), [quote(name) for name in files])])


def table_page(title: str, blocks: Iterable[Block], folded: Iterable[Table] = ()) -> Iterator[str]:
    """A page of tables and lines; the `folded` ones can be opened one by one."""
    yield from _document(title, [f"<h1>{_text(title)}</h1>", *map(_block, blocks), *map(_folded, folded)])


def summary_page(summary: Json) -> Iterator[str]:
    """The page of a summary."""
    title, named = headline(summary), Lines([line for lines in fields(summary) for line in lines.lines])
    parts = [_fields(named), *map(_block, sections(summary)), _by(summary)]
    yield from _document(title, [f"<h1>{_text(title)}</h1>", *parts])


def _document(title: str, body: Iterable[str]) -> Iterator[str]:
    style = _CSS.read_text(encoding="ascii")
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
    )
    for part in body:
        yield part.encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"
    yield "</main>\n</body>\n</html>\n"


def _report(report: contract.Report, place: str) -> Iterator[str]:
    """The parts of a report; `place` begins each of its ids."""
    yield _block(verdict_line(report))
    grouped = groups(report)
    if grouped:
        yield f'<p>First: <a href="#{place}f0">{_where(grouped[0])}</a></p>'
    yield _fields(header(report))
    if preflight := preflight_table(report):
        yield _block(preflight)
    if report["cpus"] or report["findings"]:
        yield _picture(report, grouped, place)
    if grouped:
        yield "<h2>What is wrong, and what it does to a crash</h2>"
        yield from (_group(group, number, place) for number, group in enumerate(grouped[:_GROUPS]))
        if (more := len(grouped) - _GROUPS) > 0:
            yield f'<p class="unknown" id="{place}more">{more} more are in the JSON report.</p>'
    if "gate_changes" in report:
        yield _block(gate_changes_table(report))
        if "writers_absent" in report:
            yield f'<p class="unknown">writers not seen: {_text(report["writers_absent"])}</p>'
    if report["cpus"]:
        last = report["stages"][-1]["stage"] if report["stages"] else "none"
        yield _block(_fold(cpus_table(report["cpus"], last)))
    if report["findings"]:
        yield f"<details><summary>All checks, counted</summary>{_block(_counts(report))}</details>"


def _by(report: contract.Report | Json) -> str:
    tool = report["tool"]
    return f"<footer>{_text(tool['name'])} {_text(tool['version'])}</footer>"


# -- the picture ------------------------------------------------------------------------------


def _picture(report: contract.Report, grouped: Sequence[Group], place: str) -> str:
    drawn = picture(report, grouped)
    lines = [number for number, name in enumerate(LINES) if name not in drawn.unread]
    several = len(drawn.columns) > 1
    heads = "".join(map(_head, drawn.columns))
    rows = "".join(_row(row, lines, place) for row in (drawn.machine, *drawn.cpus))
    toggle = (
        f'<input type="checkbox" id="{place}all"> <label for="{place}all">Show every value, not only changes</label>'
        if several else ""
    )  # fmt: skip
    legend = "Gates as handler/IST." + (" \u25b8 changed since the stage before, = as it was there." * several)
    legend += " \u2717 failed, ? could not be decided: each leads to its finding. \u2713 passed, \u2013 not read."
    unread = "".join(f'<p class="dim">{_text(name)}: {_text(why)}</p>' for name, why in drawn.unread.items())
    title = "CPUs at each stage" if several else "CPUs"
    order = _order(report["stages"]) if len(report["stages"]) > len(drawn.columns) else ""
    many = " many" if len(drawn.columns) > _WIDE else ""
    return (
        f'<h2 id="{place}picture">{title}</h2><p class="dim">{legend}</p>{toggle}'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{place}picture"><table class="picture{many}">'
        f'<thead><tr><th scope="row">CPU</th><td class="names"></td>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{unread}{order}"
    )


def _head(column: Column) -> str:
    whose = cpu_list(column.cpus)
    if len(whose) > _HEAD:
        whose = f"{len(column.cpus)} CPUs"
    small = f" <small>{_text(whose)}</small>" if column.cpus else ""
    return f'<th scope="col"><span>{_text(column.stage)}{small}</span></th>'


def _order(stops: Sequence[contract.Stage]) -> str:
    """All stops as they came."""
    came = ", ".join(s["stage"] + ("" if s["cpu"] is None else f" CPU {s['cpu']}") for s in stops)
    return f"<details><summary>The order of all {len(stops)} stops</summary><p>{_text(came)}</p></details>"


def _row(row: Row, lines: Sequence[int], place: str) -> str:
    role = f"<span>{_text(row.role)}</span>" if row.role else ""
    names = "".join(f"<div>{LINES[line]}</div>" for line in lines if row.squares[0].values)
    before = [(), *(square.marks for square in row.squares)]
    squares = "".join(_square(square, old, lines, place) for square, old in zip(row.squares, before, strict=False))
    return f'<tr><th scope="row">{_text(row.name)}{role}</th><td class="names">{names}</td>{squares}</tr>\n'


def _square(square: Square, before: Sequence[Mark], lines: Sequence[int], place: str) -> str:
    values = "".join(_value(square.values[line]) for line in lines) if square.values else ""
    new = [mark for mark in square.marks if mark not in before]
    marks = "".join(_mark(mark, _text(mark.check), place) for mark in new[:_MARKS])
    if (more := len(new) - _MARKS) > 0:
        marks += f'<a href="{_href(new[_MARKS].group, place)}">and {more} more</a>'
    if still := [mark for mark in square.marks if mark in before]:
        others = f" and {len(still) - 1} more" * (len(still) > 1)
        marks += _mark(still[0], f"<span>still {_text(still[0].check)}{others}</span>", place, ' class="same"')
    if not values and not marks:
        values = _SIGNS[square.verdict]
    return f'<td class="{square.verdict}">{values}{marks}</td>'


def _value(value: Value) -> str:
    if value.text is None:
        return '<div class="dim">\u2013</div>'
    text = _text(value.text)
    if value.text == value.before:
        return f'<div class="same"><span>{text}</span></div>'
    new = ' class="new"' if value.before else ""
    return f'<div{new} title="{text}">{text}</div>'


def _mark(mark: Mark, said: str, place: str, kind: str = "") -> str:
    return f'<a{kind} href="{_href(mark.group, place)}">{_SIGNS[mark.verdict]} {said}</a>'


def _href(group: int, place: str) -> str:
    return f"#{place}f{group}" if group < _GROUPS else f"#{place}more"


# -- findings ---------------------------------------------------------------------------------


def _group(group: Group, number: int, place: str) -> str:
    finding = group[0][0]
    verdict = finding["verdict"]
    later = [stage for stage in dict.fromkeys(f["stage"] for f in group[0]) if stage != finding["stage"]]
    fields = [("Expected", _text(show(finding["expected"]))), ("Observed", _text(show(finding["observed"])))]
    if later:
        fields.append(("Still at", _text(", ".join(later))))
    if finding.get("reason"):
        fields.append(("In a crash" if verdict == "fail" else "Because", _text(finding["reason"])))
    if finding.get("follows"):
        fields.append(("Follows from", f"<code>{_text(finding['follows'])}</code>"))
    if evidence := list(_evidence([same[0] for same in group])):
        fields.append(("Bytes", "<br>".join(evidence)))
    fields.append(("Source", _text(finding["source"])))
    follows = " follows" if finding.get("follows") else ""
    unfolded = " open" if number < _OPEN and not follows else ""
    inside = "".join(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in fields)
    return (
        f'<details class="finding {verdict}{follows}" id="{place}f{number}"{unfolded}>'
        f"<summary><b>{_SIGNS[verdict]} {verdict.upper()}</b> {_where(group)}</summary><dl>{inside}</dl>"
        f'<p class="back"><a href="#{place}picture">Back to the CPUs</a></p></details>'
    )


def _where(group: Group) -> str:
    """The check, the CPUs and the first stage of a group."""
    finding = group[0][0]
    numbers = sorted(same[0]["cpu"] for same in group if same[0]["cpu"] is not None)
    whose = cpu_list(numbers) if numbers else "the machine"
    return f"<code>{_text(finding['check'])}</code> {_text(whose)} at {_text(finding['stage'])}"


def _evidence(findings: Sequence[contract.Finding]) -> Iterator[str]:
    for finding in findings[:CPUS_WITH_EVIDENCE]:
        for item in finding["evidence"]:
            whose = f"CPU {finding['cpu']}: " if len(findings) > 1 else ""
            where = " ".join(str(item[name]) for name in ("source", "symbol", "address") if name in item)
            raw = f' <span class="bytes">{_text(shorten(item["raw"]))}</span>' if "raw" in item else ""
            yield f"{_text(whose + where)}{raw}"
    if findings[0]["evidence"] and (rest := len(findings) - CPUS_WITH_EVIDENCE) > 0:
        yield f"of {rest} more CPUs: in the JSON report"


def _counts(report: contract.Report) -> Table:
    """Each check, and how often it came to which verdict."""
    counts: dict[str, Counter[str]] = {}
    for finding in report["findings"]:
        counts.setdefault(finding["check"], Counter())[finding["verdict"]] += 1
    words = ("fail", "unknown", "pass", "skip")
    rows = [
        [Cell(check), *(Cell(str(count[word]), word if count[word] else "dim") for word in words)]
        for check, count in counts.items()
    ]
    return Table("Checks", ["check", *words], rows)


# -- tables and lines -------------------------------------------------------------------------


def _index(reports: Sequence[contract.Report], links: Sequence[str]) -> str:
    listed = dumps_table(reports)
    count = Counter(report["verdict"] for report in reports)
    said = ", ".join(f"{count[word]} {word}" for word in ("fail", "unknown", "pass") if count[word])
    rows = [
        [_verdict(report["verdict"]), f'<a href="{escape(link)}">{_text(row[1].text)}</a>', *map(_cell, row[2:])]
        for report, link, row in zip(reports, links, listed.rows, strict=True)
    ]
    return f'<h1 id="index">{len(reports)} dumps: {said}</h1><div class="index">{_rows(listed.columns, rows)}</div>'


def _block(block: Block) -> str:
    if isinstance(block, Lines) and block.title:
        lines = "\n".join("".join(map(_cell, line)) for line in block.lines)
        return f'<h2>{_text(block.title)}</h2><pre class="scroll" tabindex="0">{lines}</pre>'
    if isinstance(block, Lines):
        return "".join(f"<p>{''.join(map(_cell, line))}</p>" for line in block.lines)
    rows = [[_cell(cell) for cell in row] for row in block.rows]
    return f"<h2>{_text(block.title)}</h2>{_rows(block.columns, rows)}"


def _folded(table: Table) -> str:
    rows = _rows(table.columns, ([_cell(cell) for cell in row] for row in table.rows))
    return f"<details><summary>{_text(table.title)}</summary>{rows}</details>"


def _fields(lines: Lines) -> str:
    """Lines whose first cell is a name."""
    inside = "".join(
        f"<dt>{_text(line[0].text.strip())}</dt><dd>{''.join(map(_cell, line[1:])).removeprefix(': ')}</dd>"
        for line in lines.lines
    )
    return f"<dl>{inside}</dl>"


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. One that a telephone is too narrow for names its columns in each cell: there, a row is a paragraph."""
    rows = list(rows)
    longest = (max(len(re.sub("<[^>]*>", "", cell)) for cell in column) for column in zip(columns, *rows, strict=True))
    kind = "wide" if sum(longest) > _NARROW else "plain"
    names = [f' data-name="{_text(column)}"' if kind == "wide" else "" for column in columns]
    heads = "".join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    cells = ("".join(f"<td{name}>{cell}</td>" for name, cell in zip(names, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{row}</tr>\n" for row in cells)
    inside = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{inside}</table></div>'


def _fold(table: Table) -> Table:
    """A table of CPUs, those whose rows are equal on one."""
    equal: dict[tuple[Cell, ...], list[int]] = {}
    for row in table.rows:
        equal.setdefault(tuple(row[1:]), []).append(int(row[0].text))
    rows = [[Cell(",".join(ranges(numbers)), "strong"), *cells] for cells, numbers in equal.items()]
    return table._replace(rows=rows)


def _cell(cell: Cell) -> str:
    if not (cell.style and cell.text):
        return _text(cell.text)
    sign = f"{_SIGNS[cell.style]} " if cell.style in ("fail", "unknown") else ""
    return f'<span class="{_text(cell.style)}">{sign}{_text(cell.text)}</span>'


def _verdict(word: str) -> str:
    return f'<span class="{_text(word)}">{_SIGNS.get(word, "?")} {_text(word)}</span>'


def _text(value: Any) -> str:
    """Text that came from wherever: no markup, and nothing that a terminal or a reader's eye would be led by."""
    return escape(escaped(str(value), keep="\t\n"))
