"""What a check could not read decides nothing: it is `unknown`, and nothing is inferred from the gap."""

from __future__ import annotations

from typing import Any

import pytest

from tests.machines.changed import GATE_CHECKS, MC, NMI, Machine, bad, silent
from xen_symbols.absence import Absent, Kind, Unreadable
from xen_symbols.crashpath.checks import CHECKS
from xen_symbols.crashpath.checks.model import Outcome
from xen_symbols.crashpath.context import Context
from xen_symbols.crashpath.engine import judge
from xen_symbols.crashpath.generations import Bookkeeping, function_text
from xen_symbols.crashpath.identification import identify
from xen_symbols.crashpath.position import infer
from xen_symbols.report.model import Finding, Verdict
from xen_symbols.symbols.table import SymbolNotFound
from xen_symbols.xen.reads import Read, absent
from xen_symbols.xen.state import read_state

HOLE = absent("it lies in a hole")
UNNAMED = absent("no symbol", Kind.NO_SYMBOL)
NOT_HELD = Absent("not held", Kind.NOT_HELD)


def judged(machine: Machine, generation: dict[str, Any] | None = None, **system: Read) -> list[Finding]:
    """The findings on a machine whose variables are replaced by these."""
    state = read_state(machine.memory)
    ours = identify(machine.memory).generation
    position = infer(state, ours)
    state = state._replace(system={**state.system, **system})
    return judge(Context(machine.memory, state, position, ours._replace(**generation or {})))


def of(findings: list[Finding], check: str, cpu: int | None = None) -> tuple[Verdict, str | None]:
    found = next(f for f in findings if (f.check, f.cpu) == (check, cpu))
    return found.verdict, found.reason


# -- a CPU that may or may not be halted ----------------------------------------------------


def parked(
    machine: Machine, before: bytes | None, halted: bool | Absent = NOT_HELD, **registers: int
) -> tuple[Verdict, Any, Any, str | None]:
    """(verdict, expected, observed, reason) of CPU 1; `before` is the byte before its RIP, None for a hole there."""
    machine.physical(1, lambda p: p._replace(halted=halted, registers={**p.registers, **registers}))
    rip, read = machine.example.physical_cpus[1].registers["rip"], machine.memory.read

    def patched(at: int, size: int) -> bytes:
        if at != rip - 1:
            return read(at, size)
        if before is None:
            raise Unreadable("it lies in a hole")
        return before

    machine.memory.read = patched  # type: ignore[method-assign]
    found = next(f for f in machine.report().findings if (f.check, f.cpu) == ("cpu-parked", 1))
    return found.verdict, found.expected, found.observed, found.reason


AFTER_HLT = "after HLT in do_nmi_crash, interrupts off"


def test_a_cpu_after_hlt_may_be_halted() -> None:
    machine = Machine()
    machine.physical(1, lambda p: p._replace(halted=NOT_HELD))
    assert bad(machine.report()) == set()  # in the code of the recorded Xen
    assert parked(Machine(), b"\xf4") == (Verdict.PASS, AFTER_HLT, AFTER_HLT, None)


def test_a_cpu_that_is_not_after_hlt_is_awake() -> None:
    """It may be on its way into the halt loop; who does not follow the crash does not look again."""
    verdict, _, observed, reason = parked(Machine(), b"\x90")
    assert (verdict, observed) == (Verdict.UNKNOWN, None) and "awake where it should halt" in str(reason)
    machine = Machine()
    machine.physical(0, lambda p: p._replace(registers={**p.registers, "rip": 0xFFFFFFFF81000000}))
    verdict, _, observed, reason = parked(machine, b"\x90")
    assert (verdict, observed) == (Verdict.UNKNOWN, None) and "awake where it should halt" in str(reason)


def test_code_that_cannot_be_read_decides_nothing() -> None:
    assert parked(Machine(), None) == (Verdict.UNKNOWN, AFTER_HLT, None, "it lies in a hole")
    halted = "halted in do_nmi_crash, interrupts off"  # as the target says; by which instruction is not known
    assert parked(Machine(), None, halted=True) == (Verdict.UNKNOWN, halted, None, "it lies in a hole")
    assert parked(Machine(), b"\xf4", halted=True) == (Verdict.PASS, halted, halted, None)


def test_elsewhere_or_with_interrupts_on_it_is_not_parked_halted_or_not() -> None:
    machine = Machine()
    elsewhere = machine.symbols.address("kexec_reloc")
    assert parked(machine, None, rip=elsewhere)[:3] == (Verdict.FAIL, AFTER_HLT, "kexec_reloc, interrupts off")
    at = "after HLT in do_nmi_crash+0x51, interrupts on"
    assert parked(Machine(), b"\xf4", rflags=0x202)[:3] == (Verdict.FAIL, AFTER_HLT, at)


@pytest.mark.parametrize("halted", [True, False])
def test_a_function_whose_end_is_not_known_holds_no_cpu(halted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.physical(1, lambda p: p._replace(halted=halted))

    def nameless(name: str) -> tuple[int, int]:
        raise SymbolNotFound(f"where {name} ends is not known")

    monkeypatch.setattr(machine.symbols, "extent", nameless)
    found = {(check, cpu) for check, cpu, verdict in bad(machine.report()) if verdict == "unknown"}
    assert found == {("cpu-parked", cpu) for cpu in (1, 2, 3)} | (
        set() if halted else {("nmi-pending", 1), ("lapic-self-nmi", 1)}
    )


def test_missing_registers_are_in_no_function() -> None:
    machine = Machine()
    machine.physical(1, lambda p: p._replace(halted=False, registers={}))
    assert {("cpu-parked", 1, "unknown"), ("nmi-pending", 1, "unknown")} <= bad(machine.report())


# -- whose state a CPU holds ------------------------------------------------------------------


def test_without_cs_a_pv_guest_cannot_be_distinguished_from_xen() -> None:
    machine = Machine("4.17-shootdown")
    for vector in (NMI, 8, MC):
        machine.gate(1, vector, 4, b"\0")
    machine.physical(1, lambda p: p._replace(registers={k: v for k, v in p.registers.items() if k != "cs"}))
    report = machine.report()
    assert bad(report) == {("nmi-gate-ist", 1, "unknown"), ("mc-gate-ist", 1, "unknown")}
    reasons = {f.reason for f in report.findings if f.verdict is Verdict.UNKNOWN}
    assert reasons == {
        "IST of #DF is 0 too, as while an AMD CPU holds an HVM guest's state, but TR is Xen's own: its CS, which "
        "would show a PV guest, could not be read"
    }


@pytest.mark.parametrize("fred, verdicts", [
    (Read(1), {Verdict.SKIP}), (Read(0), {Verdict.PASS}), (Read(-1), {Verdict.PASS}), (UNNAMED, {Verdict.PASS}),
    (HOLE, {Verdict.UNKNOWN}),
])  # fmt: skip
def test_gates_are_judged_where_it_is_known_that_they_are_used(fred: Read, verdicts: set[Verdict]) -> None:
    findings = judged(Machine(), fred=fred)
    of_gates = [f for f in findings if f.check in (GATE_CHECKS | {"idtr"})]
    assert len(of_gates) == 4 * 15 and {f.verdict for f in of_gates} == verdicts
    if fred is HOLE:
        assert {f.reason for f in of_gates} == {"it lies in a hole"}


# -- notes and bookkeeping --------------------------------------------------------------------


@pytest.mark.parametrize("at, junk", [(0, b"junk" * 5), (404 + 12, b"Xyz\0")])
@pytest.mark.parametrize("name", ["4.17-shootdown", "4.17-handover"])
def test_damaged_headers_are_not_an_empty_note(name: str, at: int, junk: bytes) -> None:
    machine = Machine(name)
    machine.poke(machine.notes(0) + at, junk)
    report = machine.report()
    found = next(f for f in report.findings if f.check == "crash-info-note")
    assert (found.verdict, found.observed) == (Verdict.UNKNOWN, None)
    assert found.reason == ("CPU 0's buffer of crash notes holds no CRASH_INFO" if at else
                            "the buffer does not have Xen's note headers")  # fmt: skip


def test_an_owner_that_has_a_name_and_was_not_read_is_unknown() -> None:
    count = {"bookkeeping": Bookkeeping.COUNT}
    assert of(judged(Machine(), count, crash_owner=UNNAMED), "crash-owner")[0] is Verdict.SKIP
    assert of(judged(Machine(), count, crash_owner=HOLE), "crash-owner") == (Verdict.UNKNOWN, "it lies in a hole")
    assert of(judged(Machine(), count, crash_owner=Read(3)), "crash-owner")[0] is Verdict.FAIL
    assert of(judged(Machine(), crash_owner=UNNAMED), "crash-owner") == (Verdict.UNKNOWN, "no symbol")


@pytest.mark.parametrize("sign", ["saved", "online", "waiting_mask"])
def test_a_cpu_is_silent_only_where_every_sign_says_so(sign: str) -> None:
    machine = Machine()
    silent(machine, 2)
    assert of(judged(machine), "nmi-answered", 2)[0] is Verdict.FAIL
    machine.memory.forget()
    findings = judged(machine, **{sign: HOLE})
    assert of(findings, "nmi-answered", 2) == (Verdict.UNKNOWN, "it lies in a hole")
    assert of(findings, "nmi-answered", 1)[0] is Verdict.PASS  # the other signs say so
    findings = judged(machine, {"bookkeeping": Bookkeeping.COUNT}, waiting_mask=UNNAMED)
    assert of(findings, "nmi-answered", 2)[0] is Verdict.FAIL


# -- code and the monitor ---------------------------------------------------------------------


def test_a_function_of_which_a_part_would_be_read_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    start, _ = machine.symbols.extent("do_nmi_crash")
    monkeypatch.setattr(machine.symbols, "extent", lambda name: (start, start + 0x10001))
    with pytest.raises(Unreadable, match="do_nmi_crash would be 65537 bytes long by the recorded example: its end"):
        function_text(machine.memory, "do_nmi_crash")


# -- what a failure is reported to do----------------------------------------------------------

DISPATCH = next(check for check in CHECKS if check.id == "nmi-dispatch")
BEFORE = "an ordinary NMI stops a CPU although the machine has not crashed"


def handler(symbol: str | None) -> dict[str, Any]:
    return {"address": "0x0", "symbol": symbol}


@pytest.mark.parametrize("expected, says", [
    (handler(None), BEFORE), (handler("do_nmi"), BEFORE), (handler("dummy_nmi_callback"), BEFORE),
    ({"one_of": [handler(None), handler("nmi_show_execution_state")]}, BEFORE),
    (handler("do_nmi_crash"), DISPATCH.consequence),
    ({"one_of": [handler(None), handler("do_nmi_crash")]}, DISPATCH.consequence),
])  # fmt: skip
def test_with_several_allowed_values_only_what_holds_for_all_is_said(expected: Any, says: str) -> None:
    assert DISPATCH.explain(Outcome(Verdict.FAIL, expected, handler("elsewhere"))) == says
