"""`xencrash lab storm` on the reference guest: what it finds that nothing else does, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import xencrash.lab.storm
from tests.live import machines
from xencrash.guests import FAULTS, Fault
from xencrash.lab.specification import Specification
from xencrash.lab.storm.begin import Scenery, begin
from xencrash.lab.storm.experiment import Experiment, describe, parse
from xencrash.lab.storm.explore import plan
from xencrash.lab.storm.judge import Verdict
from xencrash.lab.storm.record import shared_words
from xencrash.lab.storm.run import Budget, Result, Storm, run_one
from xencrash.lab.storm.snapshot import folder_for_snapshot

pytestmark = pytest.mark.live

SCHEMA = json.loads((Path(xencrash.lab.storm.__file__).parent / "schema.json").read_text())
IN_A_STORM = [fault for fault in FAULTS if fault.storm]
NEWEST = {
    "own-nmi-not-ignored": "4.21.2",
    "save-done-ignored": "4.3.0",
}  # the generation that a fault is shown in: 4.17.0, if it makes sense there
# Of 4.17.0 without a fault: what it cannot help.
WINDOWS = {"own-mc-handler", "unreachable", "kernel-mc-handler"}


@contextlib.contextmanager
def scenery(generation: str = "4.17.0", fault: str | None = None, cpus: int = 3) -> Iterator[Scenery]:
    with folder_for_snapshot() as folder:
        yield begin(Specification(guest=generation, fault=fault, cpus=cpus), folder, lambda text: None)


@pytest.fixture(scope="module")
def clean() -> Iterator[Scenery]:
    with scenery() as found:
        yield found


def made(where: Scenery, experiments: list[Experiment]) -> list[Result]:
    return Storm(where, Budget(), lambda text: None).run(experiments, len(experiments))


def planned(where: Scenery, kind: str, seed: int = 1) -> list[Experiment]:
    return list(plan(where, [kind], 1, seed, False)[0])


def replay(where: Scenery, text: str) -> Result:
    return run_one(where, 0, parse(text, where.scene.symbols, where.scene.cpus))


def test_the_words_that_cpus_share_are_found_by_watching(clean: Scenery) -> None:
    words = {clean.scene.symbols.describe(word) for word in shared_words(clean.recording.touches)}
    named = {word for word in words if not word.startswith("0x")}
    assert {"waiting_to_crash", "crash_saved_cpus", "cpu_online_map", "kexecing", "nmi_callback"} <= named
    gates = [word for word in words if word.startswith("0x")]  # each other CPU's #MC gate, in a page of the heap
    assert [int(word, 16) & 0xFFF for word in sorted(gates)] == [18 * 16] * 2


def test_a_sample_of_injections_passes_except_for_windows(clean: Scenery) -> None:
    results = made(clean, planned(clean, "injection")[:60])
    assert [(r.id, r.outcome) for r in results if r.outcome.verdict in (Verdict.FAIL, Verdict.UNDECIDED)] == []
    assert {r.outcome.what for r in results if r.outcome.verdict is Verdict.WINDOW} <= WINDOWS
    assert sum(r.outcome.verdict is Verdict.PASS for r in results) > 20
    assert all(r.unfired == 0 for r in results)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("none", "handed-over"),
        ("nmi@0:smp_send_nmi_allbutself", "handed-over"),  # trap_nop
        ("nmi>1@0:kexec_crash", "handed-over"),  # Xen's own handler, before the shootdown
        ("mc@0:kexec_crash", "own-mc-handler"),
        ("mc>1@0:kexec_reloc", "handed-over"),  # it wakes, and parks again
        ("mc>1@0:kexec_reloc,nmi>1@0:kexec_reloc", "handed-over"),
        ("nmi@0:kexec_reloc+0x6", "unreachable"),  # the stack is gone
        ("yield@1:do_nmi_crash", "handed-over"),  # late
        # Late, with an NMI that is blocked when the machine check comes, whose IRET unblocks it.
        ("yield@1:do_nmi_crash,nmi@1:do_nmi_crash,mc@1:do_nmi_crash", "handed-over"),
        ("stop@1:do_nmi_crash", "handed-over"),  # never
    ],
)
def test_experiments_by_name(clean: Scenery, text: str, what: str) -> None:
    result = replay(clean, text)
    assert (result.outcome.what, result.unfired) == (what, 0), result.outcome


@pytest.mark.parametrize("fault", IN_A_STORM, ids=lambda fault: fault.id)
def test_each_fault_is_found_and_what_shows_it_passes_without_it(fault: Fault) -> None:
    assert fault.storm
    generation = NEWEST.get(fault.id, "4.17.0")
    cpus = min(fault.most_cpus, 3)
    with scenery(generation, fault.id, cpus) as faulty:
        assert replay(faulty, "none").outcome.verdict is Verdict.PASS
        found = None
        experiments = _likely(faulty, fault)
        for number in range(0, len(experiments), 6):
            results = made(faulty, experiments[number : number + 6])
            found = next((r for r in results if r.outcome.verdict is Verdict.FAIL), None)
            if found:
                break
        assert found is not None
        assert found.outcome.what in fault.storm.what
        again = replay(faulty, found.id)
        assert again.outcome == found.outcome
    with scenery(generation, None, cpus) as sound:
        assert replay(sound, found.id).outcome.verdict is Verdict.PASS


def _likely(where: Scenery, fault: Fault) -> list[Experiment]:
    """Those of its kind that can show it, or it would take too long: an NMI, for a fault of NMIs; a machine check that
    wakes a parked CPU; a CPU that is late."""
    assert fault.storm
    wanted = {
        "ist-lost-update": "yield@1:set_ist",
        "late-never-halts": "yield@1",
        "own-nmi-not-ignored": "nmi@0",
        "trap-nop-stays": "nmi@0",
        "save-done-ignored": "mc>1@0",
        "nmis-unblocked-early": "nmi@1",
    }.get(fault.id, "")
    symbols = where.scene.symbols
    return [one for one in planned(where, fault.storm.kind) if describe(one, symbols).startswith(wanted)]


@pytest.mark.parametrize("text", ["nmi@0:machine_kexec+0x4", "mc>1@0:kexec_reloc", "nmi@1:do_nmi_crash+0x4"])
def test_a_replay_is_exact(clean: Scenery, text: str) -> None:
    experiment = parse(text, clean.scene.symbols, clean.scene.cpus)
    outcomes = {result.outcome for result in made(clean, [experiment] * 8)}
    assert len(outcomes) == 1


def test_a_qemu_that_dies_is_an_outcome(clean: Scenery) -> None:
    def kill(live: Any) -> None:
        live.process.kill()

    result = run_one(clean, 0, Experiment(), kill)
    assert (result.outcome.verdict, result.outcome.what) == (Verdict.FAIL, "qemu-died")
    assert "status -9" in result.outcome.says


def ours() -> set[str]:
    """Processes of this process's own, and folders of its storms."""
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
    processes = {line for line in children.stdout.splitlines() if "qemu" in line}
    folders = [*Path("/dev/shm").glob(f"xencrash-storm-{os.getpid()}-*"), *Path("/tmp").glob("xencrash-storm-*")]
    return processes | {str(path) for path in folders}


def test_nothing_is_left() -> None:
    before = ours()
    with scenery(cpus=2) as found:
        inside = ours() - before
        assert len(inside) == 1  # the folder of the snapshot
        made(found, planned(found, "injection", seed=3)[:40])
        assert ours() - before == inside
        (folder,) = map(Path, inside)
        assert {path.name for path in folder.iterdir()} == {"ram", "state"}
    assert ours() == before


COMMAND = [sys.executable, "-m", "xencrash", "lab", "storm", "--guest", "4.17.0", "--cpus", "2"]


def storm(*words: str, before: Sequence[str] = (), **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, *COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def test_the_same_seed_gives_the_same_list() -> None:
    words = ("--seed", "5", "--experiments", "8", "--kind", "injection", "--format", "json")
    processes = [storm(*words) for _ in range(2)]
    lists = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        report = json.loads(out)
        jsonschema.validate(report, SCHEMA)
        lists.append([(one["id"], one["verdict"], one["what"]) for one in report["experiments"]])
    assert lists[0] == lists[1]
    assert len(lists[0]) == 8


@pytest.mark.parametrize(
    ("sign", "before"),
    [
        (signal.SIGINT, ["env", "--default-signal=INT"]),
        (signal.SIGTERM, ["env", "--ignore-signal=INT"]),  # as what a shell or nohup starts in the background
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_an_ended_storm_gives_the_report_of_what_was_done(sign: signal.Signals, before: list[str]) -> None:
    process = storm("--kind", "injection", "--format", "json", before=before)
    assert process.stderr is not None
    for line in process.stderr:
        if "a second" in line:
            break
    process.send_signal(sign)
    out, errors = process.communicate(timeout=60)
    assert out, errors
    report = json.loads(out)
    jsonschema.validate(report, SCHEMA)
    assert report["interrupted"]
    assert 0 < len(report["experiments"]) < report["planned"]
    assert process.returncode == 0


def test_gdb_attaches_where_a_replay_stopped() -> None:
    process = storm("--replay", "nmi@0:smp_send_nmi_allbutself", "--stop-at", "1", stdin=subprocess.PIPE)
    assert process.stdout is not None
    said = "".join(iter(process.stdout.readline, "Enter ends it.\n"))
    socket, symbols = re.search(r"gdb:(\S+) .*--symbols (\S+)", said).groups()  # type: ignore[union-attr]
    output = machines.run_gdb(f"file {symbols}", f"target remote {socket}", "echo === begin\\n", "info symbol $pc")
    assert output.startswith("trap_nop in section")
    process.communicate("\n", timeout=30)
    assert process.returncode == 0
