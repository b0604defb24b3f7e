"""A report as JUnit XML, for CI systems: a test case per finding, a suite per stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from xen_symbols.report.blocks import show


def to_junit(report: Mapping[str, Any]) -> str:
    """JUnit XML. A failure is <failure>, an unknown (or an undecided report) <error>, a skip <skipped>."""
    root = ET.Element("testsuites", name="xencrash")
    stages = list(dict.fromkeys(finding["stage"] for finding in report["findings"]))
    for stage in stages:
        findings = [finding for finding in report["findings"] if finding["stage"] == stage]
        suite = ET.SubElement(root, "testsuite", _counts(findings) | {"name": stage})
        for finding in findings:
            _case(suite, finding)
    if report.get("undecided"):
        suite = ET.SubElement(root, "testsuite", name="xencrash", tests="1", failures="0", errors="1", skipped="0")
        case = ET.SubElement(suite, "testcase", classname="xencrash", name="decided")
        ET.SubElement(case, "error", message=_legal(report["undecided"]))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(findings: list[Mapping[str, Any]]) -> dict[str, str]:
    verdicts = [finding["verdict"] for finding in findings]
    return {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count("fail")),
        "errors": str(verdicts.count("unknown")),
        "skipped": str(verdicts.count("skip")),
    }


def _case(suite: ET.Element, finding: Mapping[str, Any]) -> None:
    where = "machine" if finding["cpu"] is None else f"cpu{finding['cpu']}"
    stop = "" if finding.get("stop") is None else f" (stop {finding['stop']})"
    case = ET.SubElement(suite, "testcase", classname=f"{finding['stage']}.{where}", name=f"{finding['check']}{stop}")
    element = {"fail": "failure", "unknown": "error", "skip": "skipped"}.get(finding["verdict"])
    if element is None:
        return
    message = finding.get("reason") or ""
    if element != "skipped":
        message = f"expected {show(finding['expected'])}, observed {show(finding['observed'])}: {message}"
    ET.SubElement(case, element, message=_legal(message))


def _legal(text: str) -> str:
    """XML 1.0 allows no control characters but tab and line ends, even escaped."""
    return "".join(c if c in "\t\n" or c.isprintable() else "\ufffd" for c in text)
