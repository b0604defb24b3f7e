"""The main job on real Xen 4.17: boot, crash, follow, judge every stage, take the vmcore, judge it.

What each stage must show was seen on this Xen by hand, and in its sources; the values are asserted, not only verdicts.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.live.machines import booted, ready, wrong
from tests.machines.changed import CHANGES, LOST, NOT_IN_MEMORY, RENAMED
from tests.machines.realxen import EVERY_ROW, MAIN, ROWS, LiveMachine, Row, follow
from tests.schema import SCHEMA
from xen_symbols.report.page import page
from xen_symbols.targets.qemu_state import parse_cpus
from xen_symbols.targets.qmp import Qmp
from xencrash.gdbmi import GdbSession, open_session
from xencrash.lab.gdbs import gdb_words
from xencrash.lab.images import xen_images
from xencrash.lab.machine import Machine as Lab
from xencrash.lab.packages import Cache
from xencrash.lab.qemu import Boot
from xencrash.lab.rows import DEFAULT_XEN, GDBS, XENS
from xencrash.trace import trace

pytestmark = pytest.mark.live

Json = dict[str, Any]


# (NMI handler, IST, #MC handler, IST) by stage: of the crashing CPU, of every other one.
NORMAL = ("nmi", 2, "machine_check", 1)
GATES = {
    "normal": (NORMAL, NORMAL),
    "crash-entry": (NORMAL, NORMAL),
    "shutdown-entry": (NORMAL, NORMAL),
    "shootdown": (("trap_nop", 0, "machine_check", 0), NORMAL),
    "shootdown-done": (("trap_nop", 0, "machine_check", 0), ("nmi", 2, "machine_check", 0)),
    "crash-info": (("trap_nop", 0, "machine_check", 0), ("nmi", 2, "machine_check", 0)),
    "exec-entry": (("trap_nop", 0, "machine_check", 0), ("nmi", 2, "machine_check", 0)),
    "handover": (("trap_nop", 0, "trap_nop", 0), ("nmi", 2, "trap_nop", 0)),
    "crashed": (("trap_nop", 0, "trap_nop", 0), ("nmi", 2, "trap_nop", 0)),
}  # fmt: skip


def xencrash(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "xencrash", *words], capture_output=True, text=True, timeout=timeout)


def observed(report: Json, stop: int, check: str, cpu: int | None) -> Any:
    found = [f["observed"] for f in report["findings"] if (f.get("stop"), f["check"], f["cpu"]) == (stop, check, cpu)]
    assert len(found) == 1, (stop, check, cpu)
    return found[0]


def gates(report: Json, stop: int, cpu: int) -> tuple[str, int, str, int]:
    return (
        observed(report, stop, "nmi-gate-handler", cpu)["symbol"],
        observed(report, stop, "nmi-gate-ist", cpu),
        observed(report, stop, "mc-gate-handler", cpu)["symbol"],
        observed(report, stop, "mc-gate-ist", cpu),
    )


def expected(row: Row, gates: tuple[str, int, str, int]) -> tuple[str, int, str, int]:
    nmi, nmi_ist, mc, mc_ist = gates
    return (RENAMED.get(nmi, nmi), nmi_ist, RENAMED.get(mc, mc), mc_ist) if row.renamed else gates


def assert_lapic_modes(report: Json, stop: int, crashing: int, row: Row) -> None:
    name = report["stages"][stop]["stage"]
    modes = {cpu: observed(report, stop, "lapic-mode", cpu) for cpu in range(4)}
    if name in ("normal", "crash-entry", "shutdown-entry", "shootdown"):
        assert set(modes.values()) == {row.lapic}, name
    elif name == "shootdown-done":
        assert modes == {cpu: row.lapic if cpu == crashing else "xapic" for cpu in range(4)}
    elif name in GATES:
        assert set(modes.values()) == {"xapic"}, name
    elif name == "after-handover":  # the crash kernel's, on the crashing CPU
        assert modes == {cpu: None if cpu == crashing else "xapic" for cpu in range(4)}
    else:  # an other CPU is on its way, through `disabled`
        assert set(modes.values()) <= {row.lapic, "xapic", *(("disabled",) * (row.lapic == "x2apic"))}, name


def assert_every_stage(report: Json, crashing: int, row: Row = MAIN) -> None:
    """The values of each stage of a crash of 4 CPUs, on CPU `crashing`."""
    jsonschema.validate(report, SCHEMA)
    assert [f for f in report["findings"] if f["verdict"] in ("fail", "unknown")] == []
    assert report.get("undecided") is None
    assert (report["verdict"], report["crashing_cpu"], report["generation"]["id"]) == (
        *("pass", crashing), XENS[row.xen].generation,
    )  # fmt: skip
    assert report["symbols"]["match"] is True
    stages = [stage["stage"] for stage in report["stages"]]
    others = [cpu for cpu in range(4) if cpu != crashing]
    assert [s for s in stages if s in GATES] == [s for s in GATES if s != "crashed"]
    for name in ("nmi-taken", "cpu-save", "cpu-stop"):
        assert sorted(s["cpu"] for s in report["stages"] if s["stage"] == name) == others, name
    for stop, stage in enumerate(report["stages"]):
        name = stage["stage"]
        if name in GATES:
            assert gates(report, stop, crashing) == expected(row, GATES[name][0]), name
            assert {gates(report, stop, cpu) for cpu in others} == {expected(row, GATES[name][1])}, name
        armed = name not in ("normal", "crash-entry", "shutdown-entry")
        hook = observed(report, stop, "nmi-dispatch", None)
        assert hook["symbol"] == ("do_nmi_crash" if armed else row.unhooked), name
        done = {cpu: observed(report, stop, "crash-save-done", cpu) for cpu in range(4)}
        waiting = {cpu: observed(report, stop, "waiting-cpus", cpu) for cpu in range(4)}
        online = {cpu: observed(report, stop, "online-cpus", cpu) for cpu in range(4)}
        saved = {cpu: observed(report, stop, "saved-cpus", cpu) for cpu in range(4)}
        assert done[crashing] is False and waiting[crashing] is False, name
        if name == "shootdown":
            assert waiting == {cpu: cpu != crashing for cpu in range(4)}
            assert saved == {cpu: cpu == crashing for cpu in range(4)}
            assert not any(done.values()) and all(online.values())
        if name in ("shootdown-done", "crash-info", "exec-entry", "handover"):
            assert not any(waiting.values()) and all(saved.values())
            assert done == {cpu: cpu != crashing for cpu in range(4)}
            assert online == {cpu: cpu == crashing and name == "shootdown-done" for cpu in range(4)}
            assert all(observed(report, stop, "lapic-enabled", cpu) is False for cpu in others)
        assert_lapic_modes(report, stop, crashing, row)
        if name == "handover":
            assert observed(report, stop, "nmi-latch", crashing) == "unblocked"
        if name == "after-handover":
            assert gates(report, stop, crashing) == expected(row, GATES["handover"][0])
            assert {gates(report, stop, cpu) for cpu in others} == {expected(row, GATES["handover"][1])}
        if name in ("handover", "after-handover"):
            for cpu in others:
                assert observed(report, stop, "nmi-latch", cpu) == "blocked"
                assert observed(report, stop, "nmi-pending", cpu) is True
                assert observed(report, stop, "lapic-self-nmi", cpu) == "an NMI to itself"
                assert observed(report, stop, "lapic-lvt", cpu) == []
                assert observed(report, stop, "cpu-parked", cpu) == "halted in do_nmi_crash, interrupts off"


@pytest.mark.usefixtures("default_row")
def test_the_crash_key_judged_stage_by_stage_and_in_the_vmcore(tmp_path: Path) -> None:
    done = xencrash("lab", "run", "--output", str(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "trace.json").read_text())
    assert_every_stage(report, report["crashing_cpu"])
    assert (tmp_path / "trace.xml").read_text().count("<failure") == 0
    assert "".join(page(report)) == (tmp_path / "trace.html").read_text()
    checked = json.loads((tmp_path / "check.json").read_text())
    jsonschema.validate(checked, SCHEMA)
    assert (checked["verdict"], checked["crashing_cpu"]) == ("pass", report["crashing_cpu"])
    assert [stage["stage"] for stage in checked["stages"]] == ["crashed"]
    for cpu in range(4):
        assert gates(checked, 0, cpu) == GATES["crashed"][cpu != report["crashing_cpu"]]
    assert "\x1b" not in done.stdout
    # The same dump, asked again by the command, without symbols: by the table that Xen carries.
    again = xencrash("check", str(tmp_path / "vmcore"), "--format", "json")
    assert again.returncode == 0, again.stderr
    carried = json.loads(again.stdout)
    assert carried["symbols"]["source"] == "table embedded in Xen"
    assert carried["cpus"] == checked["cpus"]
    (tmp_path / "vmcore").unlink()


def assert_not_crashed(lab: Lab, dump: Path) -> None:
    """A dump of a Xen that runs is judged as one, in words too."""
    done = xencrash("check", str(dump), "--symbols", str(lab.symbols))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\ncrashed     no: Xen runs; judged as a running one\n" in done.stdout
    assert "CPUs at stage normal" in done.stdout
    checked = json.loads(xencrash("check", str(dump), "--format", "json").stdout)
    jsonschema.validate(checked, SCHEMA)
    assert (checked["verdict"], checked["crashing_cpu"]) == ("pass", None)
    for cpu in range(4):
        assert gates(checked, 0, cpu) == NORMAL
        assert observed(checked, 0, "crash-save-done", cpu) is False
        assert observed(checked, 0, "online-cpus", cpu) is True
    dump.unlink()


def test_dom0s_panic_on_another_cpu_and_the_machine_after_it(tmp_path: Path) -> None:
    with ready(dom0_vcpus=4) as lab:
        assert_not_crashed(lab, lab.dumps.qemu(tmp_path / "running"))
        report = follow(lab, 2)
        assert_every_stage(report, 2)
        vmcore = lab.dumps.vmcore(tmp_path / "vmcore")
        checked = xencrash("check", str(vmcore), "--symbols", str(lab.symbols), "--format", "json")
        assert checked.returncode == 0, checked.stderr
        assert json.loads(checked.stdout)["crashing_cpu"] == 2
        Path(vmcore).unlink()
        # After the fact: the crash kernel runs on CPU 2, the others are parked.
        after = xencrash("check", f"gdb:{lab.gdb_socket}", "--symbols", str(lab.symbols), "--qmp",
                         str(lab.qmp_socket), "--format", "json")  # fmt: skip
        assert after.returncode == 0, after.stderr
        live = json.loads(after.stdout)
        assert [stage["stage"] for stage in live["stages"]] == ["crashed"]
        assert {gates(live, 0, cpu) for cpu in (0, 1, 3)} == {GATES["crashed"][1]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stopped" in metafunc.fixturenames:
        rows = EVERY_ROW if metafunc.config.getoption("all_rows") else ROWS
        metafunc.parametrize("stopped", rows, indirect=True, scope="module")


@pytest.fixture(scope="module")
def stopped(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, GdbSession, LiveMachine]]:
    """Real Xen of each row, stopped at the handover of a crash on CPU 0, with gdb attached to it."""
    row = (ROWS | EVERY_ROW)[request.param]
    with ready(xen=row.xen, qemu=row.qemu, lapic=row.lapic, dom0_vcpus=4, shared_ram=True) as lab:
        gdb = gdb_words(Cache(), GDBS[row.gdb])[0]
        report = follow(lab, 0, leave_stopped=True, gdb=gdb)
        assert_every_stage(report, 0, row)
        with open_session(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), gdb=gdb) as session:
            yield lab, session, LiveMachine(lab)


@pytest.mark.parametrize("what", [w for w, (_, c, _) in CHANGES.items() if c not in NOT_IN_MEMORY])
def test_one_change_of_guest_memory_is_found_and_nothing_else(
    what: str, stopped: tuple[Lab, GdbSession, LiveMachine]
) -> None:
    _, session, machine = stopped
    change, check, cpu = CHANGES[what]
    assert wrong(session.xen("crash-check")) == set()
    change(machine)
    try:
        assert wrong(session.xen("crash-check")) == {(check, cpu, "fail", "handover")}
    finally:
        machine.restore()
    assert wrong(session.xen("crash-check")) == set()


@pytest.mark.parametrize("what", LOST)
def test_what_is_lost_of_an_online_cpu_is_unknown(what: str, stopped: tuple[Lab, GdbSession, LiveMachine]) -> None:
    _, session, machine = stopped
    change, lost = LOST[what]
    change(machine)
    try:
        assert wrong(session.xen("crash-check")) == {
            (check, cpu, "unknown", "handover") for cpu, found in lost.items() for check in found
        }
    finally:
        machine.restore()
    assert wrong(session.xen("crash-check")) == set()


def test_bt_and_notes_at_the_handover(
    stopped: tuple[Lab, GdbSession, LiveMachine], request: pytest.FixtureRequest
) -> None:
    row = (ROWS | EVERY_ROW)[request.node.callspec.params["stopped"]]
    _, session, _ = stopped
    crashed, *others = session.xen("bt")["cpus"]
    assert [stack["name"] for stack in crashed["stacks"]["list"]] == ["#MC", "NMI", "#DB", "#DF", "primary"]
    assert crashed["steps"][0]["at"]["symbol"] == "kexec_reloc" and crashed["steps"][0]["stack"] == "primary"
    assert "kexec_crash" in [call["symbol"].partition("+")[0] for call in crashed["steps"][0]["calls"]]
    for cpu in others:
        assert cpu["steps"][0]["at"]["symbol"].startswith("do_nmi_crash+") and not cpu["lost"]
        (frame,) = [frame for frame in cpu["frames"] if frame["stack"] == "NMI"]
        assert (frame["vector"], frame["state"]) == (2, "moved" if int(frame["cs"], 16) & 3 else "current")
        if frame["state"] == "current":
            assert cpu["steps"][0]["stack"] == "NMI" and cpu["steps"][1]["interrupted_by"] == "NMI"
            names = [call["symbol"].partition("+")[0] for call in cpu["steps"][0]["calls"]]
            # exception_table[] led the entry code to do_nmi_crash itself, until e7f147bf4a (4.17.0).
            assert (names[0] == "do_nmi") is (row.unhooked is None) and "handle_ist_exception" in names
    notes = session.xen("notes")
    assert [(buffer["state"], buffer["says"]) for buffer in notes["buffers"]] == [("saved", "complete")] * 4
    assert notes["info"]["version"].startswith(f"{XENS[row.xen].version}.")


def test_a_check_changes_nothing(stopped: tuple[Lab, GdbSession, LiveMachine], tmp_path: Path) -> None:
    lab, session, machine = stopped

    def everything() -> tuple[str, list[Any]]:
        with Qmp(lab.qmp_socket) as qmp:
            qmp.execute("xen-save-devices-state", filename=str(tmp_path / "state"), live=False)
        return hashlib.sha256(machine.ram.bytes).hexdigest(), parse_cpus((tmp_path / "state").read_bytes())

    before = everything()
    assert session.xen("crash-check")["verdict"] == "pass"
    session.xen("cpus")
    session.xen("idt")
    session.xen("log")
    assert everything() == before


def test_a_cpu_that_never_takes_the_nmi_is_the_only_one_blamed() -> None:
    deaf: list[int] = []

    def divert(session: GdbSession) -> None:
        """The first other CPU at its handler's first instruction halts elsewhere instead, NMIs latched."""
        if deaf:
            return
        pc = session.mi('-data-evaluate-expression "(unsigned long)$pc"')["value"]
        if int(pc) != machine.symbols.address("do_nmi_crash", "tT"):
            return
        deaf.append(int(session.mi("-thread-info")["current-thread-id"]) - 1)
        session.cli(f"set var $pc = {loop:#x}")

    with ready(dom0_vcpus=4, shared_ram=True) as lab:
        machine = LiveMachine(lab)
        start, end = machine.symbols.address("_start", "tT"), machine.symbols.address("_etext")
        text = machine.memory.read(start, end - start)
        halts = [start + match.start() for match in re.finditer(rb"\xf4\xeb\xfd", text)]  # hlt; jmp back to it
        first, last = machine.symbols.extent("do_nmi_crash")
        loop = next(address for address in halts if not first <= address < last)
        report = follow(lab, 0, on_stop=divert)
    failures = [f for f in report["findings"] if f["verdict"] == "fail"]
    assert len(deaf) == 1 and deaf[0] != 0
    assert {f["cpu"] for f in failures} == {deaf[0], None}
    assert {f["check"] for f in failures if f["cpu"] is None} == {"shootdown-report"}
    assert {f["check"] for f in failures if "follows" not in f} == {"nmi-answered"}
    at_the_end = {f["check"] for f in failures if f["stage"] == "handover" and f["cpu"] == deaf[0]}
    assert at_the_end == {
        "nmi-answered", "nmi-entries", "waiting-cpus", "saved-cpus", "online-cpus", "crash-save-done", "crash-notes",
        "mc-gate-ist", "lapic-enabled", "lapic-lvt", "lapic-self-nmi", "nmi-pending", "cpu-parked",
    }  # fmt: skip
    said = next(f["observed"] for f in failures if f["check"] == "shootdown-report")
    assert f"{{{deaf[0]}}}" in said
    assert report["stages"][-1]["stage"] == "after-handover"


def test_without_a_crash_kernel_the_path_stops_early_and_the_report_says_so() -> None:
    with ready(crash_kernel=False) as lab:
        report = trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60,
                       trigger=lambda: lab.crash("panic"))  # fmt: skip
    assert report["verdict"] == "unknown"
    assert "no crash kernel is loaded" in report["undecided"]
    assert [stage["stage"] for stage in report["stages"]][:2] == ["normal", "crash-entry"]


def test_before_xen_has_paging_on() -> None:
    with booted(paused=True) as lab:
        done = xencrash("check", f"gdb:{lab.gdb_socket}", "--symbols", str(lab.symbols), "--qmp", str(lab.qmp_socket))
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1 and "paging" in done.stderr


def test_a_guest_that_is_not_xen(tmp_path: Path) -> None:
    images = xen_images(Cache(), XENS[DEFAULT_XEN])
    boot = Boot(kernel=images.kernel, symbols=images.symbols, append="console=ttyS0 panic=0 earlyprintk=ttyS0")
    with booted(kernel=boot, memory=256) as lab:
        lab.serial.wait(rb"Kernel panic", 60)  # Linux without a root: paging is on, and no Xen anywhere
        for target in (("check",), ("trace",)):
            done = xencrash(*target, f"gdb:{lab.gdb_socket}", "--symbols", str(lab.symbols), "--qmp",
                            str(lab.qmp_socket))  # fmt: skip
            assert done.returncode == 3
            assert "is it Xen" in done.stderr.splitlines()[-1]
            assert "Traceback" not in done.stderr
        dumps = [lab.dumps.qemu(tmp_path / name, name) for name in ("elf", "kdump-zlib")]
    for dump in dumps:
        for symbols in (["--symbols", str(lab.symbols)], []):
            done = xencrash("check", str(dump), *symbols)
            assert done.returncode == 3 and "\nUNKNOWN  nothing was judged\n" in done.stdout
            assert re.fullmatch(rf"xencrash: .*{dump}.*is it Xen.*\n", done.stderr), done.stderr
        dump.unlink()
