"""Reports as HTML: what stands in the picture, where its links lead, and that nothing read from a dump is obeyed."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from tests.machines.changed import Machine
from tests.machines.pages import Element, parsed, poisoned, traced
from tests.machines.recorded import write_files
from xen_symbols.report.page import page, pages
from xencrash.cli import main

STAGES = ("4.17-normal", "4.17-shootdown", "4.17-handover")


@pytest.fixture(scope="module")
def trace() -> Any:
    return traced(*STAGES)


@pytest.fixture(scope="module")
def drawn(trace: Any) -> Element:
    return parsed("".join(page(trace)))


def rows(root: Element) -> dict[str, list[Element]]:
    """The cells of each row of the picture, by its head."""
    (picture,) = root.all("table", class_="picture")
    (body,) = picture.all("tbody")
    found = {}
    for row in body.all("tr"):
        head, _names, *cells = [child for child in row.children if isinstance(child, Element)]
        found[str(head.children[0])] = cells
    return found


def lines(cell: Element) -> list[str]:
    return [line.text() for line in cell.all("div")]


def test_cpus_down_and_stages_across(drawn: Element) -> None:
    (picture,) = drawn.all("table", class_="picture")
    assert [head.text() for head in picture.all("th", scope="col")] == ["normal", "shootdown CPU 0", "handover CPU 0"]
    assert {name: len(cells) for name, cells in rows(drawn).items()} == {
        "Machine": 3, "CPU 0": 3, "CPUs 1-2": 3, "CPU 3": 3
    }  # fmt: skip


def test_a_cell_has_both_gates_the_lapic_and_the_latch_and_marks_what_changed(drawn: Element) -> None:
    crashing = rows(drawn)["CPU 0"]
    assert lines(crashing[0])[:3] == ["nmi/2", "machine_check/1", "xapic, on"]
    assert lines(crashing[1])[:3] == ["trap_nop/0", "machine_check/0", "xapic, on"]
    assert lines(crashing[2]) == ["trap_nop/0", "trap_nop/0", "xapic, on", "unblocked"]
    changed = [[line.text() for line in cell.all("div", class_="new")] for cell in crashing]
    assert changed == [[], ["trap_nop/0", "machine_check/0"], ["trap_nop/0"]]
    assert [line.text() for line in crashing[2].all("div", class_="same")] == ["trap_nop/0", "xapic, on"]


def test_what_no_check_asked_for_at_the_last_stage_is_the_reports(trace: Any) -> None:
    report = copy.deepcopy(trace)
    asked = {(2, "lapic-enabled"), (2, "nmi-latch")}
    report["findings"] = [finding for finding in report["findings"] if (finding["stop"], finding["check"]) not in asked]
    last = [lines(cells[2])[2:] for name, cells in rows(parsed("".join(page(report)))).items() if name != "Machine"]
    assert last == [["xapic, on", "unblocked"], ["xapic, off", "blocked"], ["xapic, off", "blocked"]]


def test_what_failed_leads_to_its_finding(drawn: Element) -> None:
    cells = rows(drawn)["CPUs 1-2"]
    assert [cell.attributes["class"] for cell in cells] == ["pass", "fail", "pass"]
    (link,) = cells[1].all("a")
    assert link.text() == "\u2717 nmi-gate-ist"
    (finding,) = [one for one in drawn.all("details") if f"#{one.attributes.get('id')}" == link.attributes["href"]]
    assert finding.all("summary")[0].text() == "\u2717 FAIL nmi-gate-ist CPUs 1-2 at shootdown"
    names = [name.text() for name in finding.all("dt")]
    said = dict(zip(names, [one.text() for one in finding.all("dd")], strict=True))
    assert (said["Expected"], said["Observed"]) == ("2", "0")
    raw = "CPU 2: memory idt_tables[2][NMI] 0xffff83003fd6d020 b01e08e0008e2040d082ffff00000000"
    assert said["Bytes"].startswith("CPU 1: memory idt_tables[1][NMI]") and said["Bytes"].endswith(raw)
    assert said["Source"].startswith("xen/arch/x86/crash.c")
    assert said["In a crash"]


def crash_of(*stops: tuple[str, int | None], broken: int | None = None) -> Any:
    """A trace with these stops, CPU 0 crashing. `broken` has its #MC gate's IST from its cpu-save on."""
    report: Any = Machine("4.17-handover").report().to_json()
    keep = {"mc-gate-handler", "mc-gate-ist"}
    per_cpu = [finding for finding in report["findings"] if finding["check"] in keep]
    report["stages"] = [{"stage": stage, "cpu": cpu, "at": None} for stage, cpu in stops]
    report["findings"] = []
    saved: set[int] = set()
    for number, (stage, by) in enumerate(stops):
        saved |= {by} if stage == "cpu-save" and by is not None else set()
        for finding in per_cpu:
            cpu, ist = finding["cpu"], finding["check"] == "mc-gate-ist"
            observed = int(cpu not in saved) if ist else finding["observed"]
            one = {**finding, "stop": number, "stage": stage, "observed": observed}
            if ist and cpu == broken and cpu in saved:
                one.update(verdict="fail", observed=1, reason="because")
            report["findings"].append(one)
    return report


INTERLEAVED = (("shootdown", 0), ("nmi-taken", 2), ("cpu-save", 2), ("nmi-taken", 1), ("nmi-taken", 3), ("cpu-save", 3),
               ("cpu-save", 1), ("shootdown-done", 0))  # fmt: skip


def heads(root: Element) -> list[str]:
    (picture,) = root.all("table", class_="picture")
    return [head.text() for head in picture.all("th", scope="col")]


def test_the_stops_of_other_cpus_at_a_stage_are_one_column_each_cpu_as_at_its_own() -> None:
    root = parsed("".join(page(crash_of(*INTERLEAVED))))
    assert heads(root) == ["shootdown CPU 0", "nmi-taken CPUs 1-3", "cpu-save CPUs 1-3", "shootdown-done CPU 0"]
    assert list(rows(root)) == ["Machine", "CPU 0", "CPUs 1-3"]
    others = [lines(cell)[1] for cell in rows(root)["CPUs 1-3"]]  # CPU 2 was saved before CPUs 1 and 3 took theirs
    assert others == ["trap_nop/1", "trap_nop/1", "trap_nop/0", "trap_nop/0"]
    (order,) = [one for one in root.all("details") if one.all("summary")[0].text() == "The order of all 8 stops"]
    assert "nmi-taken CPU 2, cpu-save CPU 2, nmi-taken CPU 1" in order.text()


def test_a_second_time_at_a_stage_is_a_column_and_a_stop_of_the_crashing_cpu_divides() -> None:
    again = crash_of(("shootdown", 0), ("nmi-taken", 1), ("nmi-taken", 2), ("nmi-taken", 1), ("shootdown-done", 0),
                     ("nmi-taken", 3))  # fmt: skip
    assert heads(parsed("".join(page(again)))) == [
        "shootdown CPU 0", "nmi-taken CPUs 1-2", "nmi-taken CPU 1", "shootdown-done CPU 0", "nmi-taken CPU 3"
    ]  # fmt: skip


def test_a_failure_at_any_stop_of_a_column_is_in_it_and_persists_as_one_link() -> None:
    root = parsed("".join(page(crash_of(*INTERLEAVED, broken=2))))
    cells = rows(root)["CPU 2"]
    assert [cell.attributes["class"] for cell in cells] == ["pass", "fail", "fail", "fail"]
    links = [[link.text() for link in cell.all("a")] for cell in cells]
    assert links == [[], ["\u2717 mc-gate-ist"], ["\u2717 still mc-gate-ist"], ["\u2717 still mc-gate-ist"]]


def test_what_follows_from_another_failure_is_folded(trace: Any) -> None:
    report = copy.deepcopy(trace)
    (one, *_) = [finding for finding in report["findings"] if finding["verdict"] == "fail"]
    report["findings"].append({**one, "check": "mc-gate-ist", "follows": "nmi-gate-ist"})
    first, second = parsed("".join(page(report))).all("details", class_="finding")
    assert "open" in first.attributes and "open" not in second.attributes
    assert "nmi-gate-ist" in first.all("summary")[0].text() and "mc-gate-ist" in second.all("summary")[0].text()


def test_what_could_not_be_decided_says_why() -> None:
    machine = Machine("4.17-handover")
    machine.physical(1, lambda p: p._replace(registers={}))
    report = machine.report().to_json()
    unknown = [f for f in report["findings"] if f["verdict"] == "unknown"]
    root = parsed("".join(page(report)))
    found = {one.all("code")[0].text(): one for one in root.all("details", class_="unknown")}
    assert set(found) == {f["check"] for f in unknown} and unknown
    assert unknown[0]["reason"] in found[unknown[0]["check"]].text()


def test_every_link_leads_to_an_element_of_the_page(trace: Any) -> None:
    for text in ("".join(page(trace)), "".join(pages([trace, trace]))):
        root = parsed(text)
        ids = [one.attributes["id"] for one in root.all() if "id" in one.attributes]
        assert len(ids) == len(set(ids))
        links = [one.attributes["href"] for one in root.all("a")]
        assert len(links) > 1 and {link.removeprefix("#") for link in links} <= set(ids)


def test_the_page_refers_to_nothing_and_allows_its_own_style_alone(trace: Any) -> None:
    text = "".join(page(trace))
    root = parsed(text)
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|javascript:", text.replace("xen/", ""))
    assert {one.tag for one in root.all()} & {"script", "link", "img", "iframe", "object", "form", "base"} == set()
    assert not [one for one in root.all() for name in one.attributes if name.startswith("on") or name == "style"]
    (style,) = root.all("style")
    digest = b64encode(hashlib.sha256(style.text().encode()).digest()).decode()
    (policy,) = [one for one in root.all("meta") if one.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_hostile_text_stays_text(trace: Any) -> None:
    clean, hostile = (parsed("".join(page(report))) for report in (trace, poisoned(trace)))
    shown = [[(one.tag, sorted(one.attributes)) for one in root.all()] for root in (clean, hostile)]
    assert set(map(str, shown[1])) == set(map(str, shown[0]))
    text = hostile.text()
    assert "</script><img src=x onerror=alert(1)>\\x1b[31m\"'&\\u202e<b>" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "".join(page(poisoned(trace))).isascii()


def test_equal_cpus_are_one_row_and_others_are_not() -> None:
    report = many(4096)
    text = "".join(page(report))
    assert list(rows(parsed(text))) == ["Machine", "CPU 0", "CPUs 1-4095"]
    assert len(text) < 100_000
    report["cpus"][7]["nmi_gate"] = None
    for finding in report["findings"]:
        if finding["cpu"] == 7 and finding["check"] == "nmi-gate-handler":
            finding["observed"] = {"address": "0x1", "symbol": "wrong"}
    assert list(rows(parsed("".join(page(report))))) == ["Machine", "CPU 0", "CPUs 1-6,8-4095", "CPU 7"]


def test_a_page_on_which_every_cpu_fails_in_its_own_way_is_small_enough() -> None:
    report = many(4096)
    for finding in report["findings"]:
        if finding["cpu"] and finding["check"].startswith("nmi-gate-"):
            finding.update(verdict="fail", observed=f"wrong {finding['cpu']}", reason="because")
    text = "".join(page(report))
    assert len(text) < 5_000_000 and text.count('<tr><th scope="row"') == 1 + 2 + 4095
    groups = 4095 * len({f["check"] for f in report["findings"] if f["check"].startswith("nmi-gate-")})
    assert f'id="more">{groups - 500} more are in the JSON report.' in text and 'href="#more"' in text


def many(cpus: int) -> Any:
    """A report on so many CPUs: a recorded one of which CPU 1 is multiplied."""
    report: Any = copy.deepcopy(Machine("4.17-crashed-vmcore").report().to_json())
    one = [finding for finding in report["findings"] if finding["cpu"] == 1 and finding["check"].startswith("nmi-")]
    report["findings"] = [finding for finding in report["findings"] if finding["cpu"] in (None, 0)]
    report["findings"] += [{**finding, "cpu": cpu} for cpu in range(1, cpus) for finding in one]
    report["cpus"] = report["cpus"][:1] + [{**report["cpus"][1], "cpu": cpu} for cpu in range(1, cpus)]
    return report


class Files:
    def __init__(self, folder: Path) -> None:
        machine = Machine("4.17-crashed-vmcore")
        good, symbols = write_files(folder / "good", machine.target, machine.symbols)
        machine.gate(2, 18, 4, b"\x01")
        bad, _ = write_files(folder / "<bad> #1", machine.target, machine.symbols)
        self.good, self.bad, self.symbols = str(good), str(bad), str(symbols)

    def check(self, *words: str) -> int:
        return main(["check", *words, "--symbols", self.symbols])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def test_check_writes_a_page_and_render_the_same_later(files: Files, tmp_path: Path) -> None:
    html, report, later = tmp_path / "check.html", tmp_path / "check.json", tmp_path / "later.html"
    assert files.check(files.bad, "--format", "html", "--output", str(html)) == 1
    assert files.check(files.bad, "--format", "json", "--output", str(report)) == 1
    assert main(["render", str(report), "--output", str(later)]) == 0
    assert html.read_text() == later.read_text()
    assert f"fail: {files.bad}" in parsed(html.read_text()).all("title")[0].text()


def test_several_dumps_are_one_page_with_an_index(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.check(files.good, files.bad, "none", "--format", "html") == 1
    root = parsed(capsys.readouterr().out)
    assert root.all("h1")[0].text() == "3 dumps: 1 fail, 1 unknown, 1 pass"
    table = root.all("table")[0]
    assert [link.text() for link in table.all("a")] == [files.good, files.bad, "none"]
    sections = [section.attributes["id"] for section in root.all("section")]
    assert [link.attributes["href"] for link in table.all("a")] == [f"#{name}" for name in sections]


def test_a_folder_of_pages_has_an_index(files: Files, tmp_path: Path) -> None:
    assert files.check(files.good, files.bad, "--format", "html", "--output", str(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-vmcore.html", "1-vmcore.html", "index.html"]
    root = parsed((tmp_path / "index.html").read_text())
    assert [link.attributes["href"] for link in root.all("a")] == ["0-vmcore.html", "1-vmcore.html"]
    assert rows(parsed((tmp_path / "1-vmcore.html").read_text()))["CPU 2"][0].attributes["class"] == "fail"


@pytest.mark.parametrize("format", ["table", "junit"])
def test_render_in_another_format(
    format: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "check.json"
    files.check(files.good, files.bad, "--format", "json")
    report.write_text(capsys.readouterr().out)
    files.check(files.good, files.bad, "--format", format)
    said = capsys.readouterr().out
    assert main(["render", str(report), "--format", format]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "not a report: it holds something else"),
        ('{"schema": 1}', "not a report: it has no tool"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_not_a_report(text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    assert main(["render", str(path)]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"xencrash: {path}: {why}") and said.count("\n") == 1


def test_a_damaged_report_is_one_line(trace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    for damage in ({"cpus": [{}]}, {"findings": [{"cpu": 1}]}, {"target": []}, {"stages": [3]}, {"schema": 2}):
        path.write_text(json.dumps({**trace, **damage}))
        assert main(["render", str(path)]) == 3
        assert capsys.readouterr().err.count("\n") == 1


