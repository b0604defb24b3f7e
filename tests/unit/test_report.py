"""The result model, its JSON contract, and what users see."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines.changed import Machine
from tests.machines.recorded import load
from tests.schema import SCHEMA
from xen_symbols.absence import Absent
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.report.blocks import dumps_table, report_blocks, show, why_not_pass
from xen_symbols.report.console import draw, plain, print_blocks
from xen_symbols.report.junit import to_junit
from xen_symbols.report.model import ExitStatus, Finding, Report, StageSeen, Verdict, exit_status, worst
from xen_symbols.xen.console import printable
from xen_symbols.xen.locate import locate
from xencrash.output import why_undecided


def report(**changes: Any) -> Report:
    target, symbols = load("4.17-handover")
    made = evaluate(locate(target, symbols))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def finding(verdict: Verdict) -> Finding:
    return Finding("nmi-gate-ist", "handover", 0, verdict, 0, 2, "77ad1faa6b", reason="because")


@given(st.lists(st.sampled_from(list(Verdict))))
def test_the_verdict_is_the_worst_skips_aside(verdicts: list[Verdict]) -> None:
    real = [verdict for verdict in verdicts if verdict is not Verdict.SKIP]
    assert worst(verdicts) is (max(real) if real else Verdict.UNKNOWN)
    assert Report({}, {}, {}, map(finding, verdicts)).verdict is worst(verdicts)


def test_exit_statuses() -> None:
    def status(*verdicts: Verdict, undecided: str | None = None) -> ExitStatus:
        return Report({}, {}, {}, findings=[finding(v) for v in verdicts], undecided=undecided).exit_status

    assert status(Verdict.PASS, Verdict.SKIP) is ExitStatus.PASSED
    assert status(Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN) is ExitStatus.FAILED
    assert status(Verdict.PASS, Verdict.UNKNOWN) is ExitStatus.UNDECIDED
    assert status(Verdict.SKIP) is ExitStatus.UNDECIDED
    assert status() is ExitStatus.UNDECIDED
    assert status(Verdict.PASS, undecided="the target was lost") is ExitStatus.UNDECIDED
    assert status(Verdict.FAIL, undecided="the target was lost") is ExitStatus.FAILED


def test_a_real_report_keeps_the_contract() -> None:
    made = report().to_json()
    jsonschema.validate(made, SCHEMA)
    assert made["cpus"][0]["nmi_gate"] == {
        "handler": {"address": "0xffff82d0402020b3", "symbol": "trap_nop"},
        "selector": "0xe008", "type": 14, "dpl": 0, "present": True, "ist": 0,
        "raw": "b32008e0008e2040d082ffff00000000",
    }  # fmt: skip
    assert made["cpus"][1]["lapic"]["mode"] == "xapic"
    assert made["stages"] == [
        {"stage": "handover", "cpu": 0, "at": {"symbol": "kexec_reloc", "pc": "0xffff82d040204000"}}
    ]


def test_each_null_of_a_cpu_has_its_reason_beside_it() -> None:
    """On a machine known by QEMU's monitor alone: local APIC registers, but no IA32_APIC_BASE."""
    machine = Machine()
    gone = Absent("needs QMP")
    machine.lapic(1, apic_base=gone)
    machine.physical(2, lambda p: p._replace(lapic=gone, nmi_blocked=gone))
    machine.physical(3, lambda p: p._replace(registers={}))
    made = machine.report().to_json()
    jsonschema.validate(made, SCHEMA)
    _, monitors, without, still = made["cpus"]
    assert (monitors["lapic"]["mode"], monitors["lapic"]["apic_base"]) == (None, None)
    assert monitors["lapic"]["absent"] == {"mode": "needs QMP", "apic_base": "needs QMP"}
    assert monitors["lapic"]["spiv"] is not None and "absent" not in monitors
    assert (without["lapic"], without["nmi_blocked"]) == (None, None)
    assert without["absent"] == {"nmi_blocked": "needs QMP", "lapic": "needs QMP"}
    assert (still["at"], still["absent"]) == (None, {"at": "no registers"})


def test_the_contract_refuses_a_failure_without_a_reason() -> None:
    made = report().to_json()
    made["findings"][0]["verdict"] = "fail"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made, SCHEMA)


def test_junit_counts_and_names() -> None:
    machine = Machine()
    machine.gate(0, 2, 4, b"\x02")
    made = machine.report().to_json() | {"undecided": "lost \x1b[2J"}
    root = ElementTree.fromstring(to_junit(made).encode())
    suites = root.findall("testsuite")
    assert [(s.get("name"), s.get("failures"), s.get("errors")) for s in suites] == [
        ("handover", "1", "0"), ("xencrash", "0", "1"),
    ]  # fmt: skip
    failed = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert [(case.get("classname"), case.get("name")) for case in failed] == [
        ("handover.cpu0", "nmi-gate-ist (stop 0)")
    ]
    assert "\x1b" not in to_junit(made)
    text = str(failed[0].findtext("failure")).splitlines()
    assert text[0].startswith("see xen/arch/x86/crash.c, nmi_shootdown_cpus") and text[1].startswith("evidence memory ")


def test_junit_says_what_a_failure_follows_from() -> None:
    made = report().to_json()
    made["findings"] = [made["findings"][0] | {"verdict": "fail", "follows": "nmi-answered"}]
    (failure,) = ElementTree.fromstring(to_junit(made).encode()).iter("failure")
    assert str(failure.text).splitlines()[0] == "follows from nmi-answered"


def test_a_xen_that_has_not_crashed_is_said_to_run() -> None:
    made = report(crashing_cpu=None, stages=[StageSeen("normal", None, None, None)]).to_json()
    assert "\ncrashed     no: Xen runs; judged as a running one\n" in plain(report_blocks(made))
    (row,) = dumps_table([made]).rows
    path = "as in Xen 4.17 - 4.20 (e7f147bf4a)"
    assert [cell.text for cell in row] == ["pass", "4.17-handover", path, "not crashed", ""]


def test_plain_text_names_what_is_wrong_where_and_why() -> None:
    machine = Machine()
    machine.gate(0, 2, 4, b"\x02")
    text = plain(report_blocks(machine.report().to_json()))
    assert "FAIL    nmi-gate-ist CPU 0 at handover\n         expected 0, observed 2\n" in text
    assert "that one's frame is overwritten" in text
    assert "evidence memory idt_tables[0][NMI] 0x" in text
    assert "\x1b" not in text


def test_what_follows_names_a_cpu_only_where_the_finding_has_one() -> None:
    machine = Machine()
    machine.gate(0, 2, 4, b"\x02")
    made = machine.report().to_json()
    first = next(f for f in made["findings"] if f["verdict"] == "fail") | {"follows": "nmi-answered"}
    made["findings"] = [first, first | {"check": "shootdown-report", "cpu": None}]
    lines = plain(report_blocks(made)).splitlines()
    assert [line.strip() for line in lines if "follows" in line] == [
        "follows from nmi-answered of this CPU",
        "follows from nmi-answered",
    ]


def test_cpus_with_the_same_finding_are_reported_together() -> None:
    machine = Machine()
    for cpu in (1, 2, 3):
        machine.gate(cpu, 18, 4, b"\x03")
    lines = plain(report_blocks(machine.report().to_json())).splitlines()
    at = lines.index("FAIL    mc-gate-ist CPUs 1-3 at handover")
    assert lines[at + 1] == "         expected 0, observed 3"
    assert [line.split(" memory ")[0].strip() for line in lines[at + 3 : at + 6]] == [
        f"evidence of CPU {cpu}" for cpu in (1, 2, 3)
    ]
    assert sum(line.startswith("FAIL    ") for line in lines) == 1


def test_many_cpus_have_their_evidence_in_the_json_report() -> None:
    machine = Machine()
    machine.gate(1, 18, 4, b"\x03")
    made = machine.report().to_json()
    one = next(f for f in made["findings"] if f["verdict"] == "fail")
    made["findings"] = [one | {"cpu": cpu} for cpu in (*range(6), 9, 11)]
    lines = [line.strip() for line in plain(report_blocks(made)).splitlines()]
    assert "FAIL    mc-gate-ist CPUs 0-5,9,11 at handover" in lines
    assert "evidence of 4 more CPUs is in the JSON report" in lines
    assert sum(line.startswith("evidence of CPU") for line in lines) == 4


def test_a_failure_that_persists_is_reported_once() -> None:
    machine = Machine()
    machine.gate(0, 2, 4, b"\x02")
    made = machine.report().to_json()
    first = next(f for f in made["findings"] if f["verdict"] == "fail")
    other = first | {"stage": "crashed", "observed": 1}
    made["findings"] += [first | {"stage": "crash-info"}, other, first | {"stage": "exec-entry"}]
    text = plain(report_blocks(made))
    assert text.count("FAIL    nmi-gate-ist") == 2
    assert (
        "FAIL    nmi-gate-ist CPU 0 at handover\n         expected 0, observed 2\n"
        "         still at crash-info, exec-entry\n         so an NMI there switches to an IST stack"
    ) in text
    assert "FAIL    nmi-gate-ist CPU 0 at crashed\n         expected 0, observed 1\n         so " in text


def test_a_pipe_gets_plain_text() -> None:
    stream = io.StringIO()
    print_blocks(report_blocks(report().to_json()), stream)
    assert stream.getvalue() == plain(report_blocks(report().to_json()))


def test_a_terminal_gets_the_same_words() -> None:
    from rich.console import Console

    stream = io.StringIO()
    draw(report_blocks(report().to_json()), Console(file=stream, force_terminal=True, width=200))
    assert "\x1b[" in stream.getvalue()
    for word in ("trap_nop, IST 0", "do_nmi_crash+0x51", "PASS"):
        assert word in stream.getvalue()


def test_values_are_shown_as_people_read_them() -> None:
    assert show({"one_of": [0, {"address": "0x1", "symbol": "nmi"}]}) == "0 or nmi"
    assert show({"address": "0x1", "symbol": None}) == "0x1"
    assert [show(value) for value in (None, True, False, [], ["LINT0", "timer"])] == [
        "-", "yes", "no", "none", "LINT0, timer",
    ]  # fmt: skip


def test_a_guests_escape_sequences_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b]0;title\x07\tb\r\n\x9b2J") == "a\\x1b]0;title\\x07\tb\n\\x9b2J"


def test_several_reports_have_the_status_of_the_worst() -> None:
    assert exit_status() is ExitStatus.UNDECIDED
    assert exit_status(Verdict.PASS, Verdict.PASS) is ExitStatus.PASSED
    assert exit_status(Verdict.PASS, Verdict.UNKNOWN) is ExitStatus.UNDECIDED
    assert exit_status(Verdict.UNKNOWN, Verdict.FAIL, Verdict.PASS) is ExitStatus.FAILED
    for verdict in Verdict:
        assert Verdict.of(verdict.word) is verdict and verdict.word == str(verdict)


@pytest.mark.parametrize(
    ("verdicts", "undecided", "why", "said"),
    [
        ([Verdict.PASS, Verdict.SKIP], None, "", None),
        ([Verdict.PASS, Verdict.FAIL, Verdict.FAIL], None, "fail: nmi-gate-ist on CPU 1 at handover", None),
        ([Verdict.UNKNOWN, Verdict.FAIL], None, "fail: nmi-gate-ist on CPU 1 at handover", None),
        ([Verdict.UNKNOWN], None, "unknown: nmi-gate-ist on CPU 0 at handover: because", ...),
        ([Verdict.PASS, *[Verdict.UNKNOWN] * 3], None,
         "unknown: nmi-gate-ist on CPU 1 at handover: because (and 2 more)", ...),
        ([Verdict.UNKNOWN], "the target was lost", "the target was lost", ...),
        ([Verdict.PASS], "the target was lost", "the target was lost", ...),
        ([Verdict.FAIL], "the target was lost", "fail: nmi-gate-ist on CPU 0 at handover", "the target was lost"),
        ([Verdict.SKIP], None, "nothing could be judged", ...),
        ([], None, "nothing could be judged", ...),
    ],
)  # fmt: skip
def test_why_a_report_did_not_pass(verdicts: list[Verdict], undecided: str | None, why: str, said: Any) -> None:
    """The same in a table of dumps and, if it is undecided, on standard error (`...`)."""
    findings = [finding(verdict)._replace(cpu=cpu) for cpu, verdict in enumerate(verdicts)]
    made = report(findings=findings, undecided=undecided)
    assert why_not_pass(made.to_json()) == why
    assert why_undecided(made) == why_undecided(made.to_json()) == (why if said is ... else said)
