"""A report as JUnit XML, for CI systems: a test case per finding, a suite per stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree as ET

from xen_symbols.report.blocks import show


def to_junit(*reports: Mapping[str, Any]) -> str:
    """JUnit XML. A failure is <failure>, an unknown (or an undecided report) <error>, a skip <skipped>.

    With several reports the names of suites and cases begin with the target's.
    """
    root = ET.Element("testsuites", name="xencrash")
    for report in reports:
        _suites(root, report, f"{_legal(report['target']['location'])}: " if len(reports) > 1 else "")
    ET.indent(root)
    # ASCII, the rest as references: right in whatever encoding standard output has.
    text: bytes = ET.tostring(root, encoding="us-ascii")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text.decode("ascii") + "\n"


def _suites(root: ET.Element, report: Mapping[str, Any], prefix: str) -> None:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for finding in report["findings"]:
        stages.setdefault(finding["stage"], []).append(finding)
    for stage, findings in stages.items():
        suite = ET.SubElement(root, "testsuite", _counts(findings) | {"name": f"{prefix}{stage}"})
        for finding in findings:
            _case(suite, finding, prefix)
    if report.get("undecided"):
        counts = {"tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
        suite = ET.SubElement(root, "testsuite", counts | {"name": f"{prefix}xencrash"})
        case = ET.SubElement(suite, "testcase", classname=f"{prefix}xencrash", name="decided")
        ET.SubElement(case, "error", message=_legal(report["undecided"]))


def _counts(findings: list[Mapping[str, Any]]) -> dict[str, str]:
    verdicts = [finding["verdict"] for finding in findings]
    return {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count("fail")),
        "errors": str(verdicts.count("unknown")),
        "skipped": str(verdicts.count("skip")),
    }


def _case(suite: ET.Element, finding: Mapping[str, Any], prefix: str) -> None:
    where = "machine" if finding["cpu"] is None else f"cpu{finding['cpu']}"
    stop = "" if finding.get("stop") is None else f" (stop {finding['stop']})"
    names = {"classname": f"{prefix}{finding['stage']}.{where}", "name": f"{finding['check']}{stop}"}
    case = ET.SubElement(suite, "testcase", names)
    element = {"fail": "failure", "unknown": "error", "skip": "skipped"}.get(finding["verdict"])
    if element is None:
        return
    message = finding.get("reason") or ""
    if element != "skipped":
        message = f"expected {show(finding['expected'])}, observed {show(finding['observed'])}: {message}"
    said = ET.SubElement(case, element, message=_legal(message))
    if element != "skipped":
        said.text = _legal("\n".join(_where_to_look(finding)))


def _where_to_look(finding: Mapping[str, Any]) -> Iterator[str]:
    if finding.get("follows"):
        yield f"follows from {finding['follows']}"
    if finding.get("source"):  # the outcome of a whole crash, in the lab's matrix, has none
        yield f"see {finding['source']}"
    for item in finding.get("evidence", ()):
        yield "evidence " + " ".join(str(item[name]) for name in ("source", "symbol", "address", "raw") if name in item)


def _legal(text: str) -> str:
    """XML 1.0 allows no control characters but tab and line ends, even escaped."""
    return "".join(c if c in "\t\n" or c.isprintable() else "\ufffd" for c in text)
