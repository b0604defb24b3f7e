"""Recorded examples: the bytes, registers and symbols of a real Xen that one judgement reads, and nothing else.

`record` makes an example from any target, and tests/machines/recorded.py loads it; exampletext.py defines the file. It
records a row of the lab, which it boots and crashes, or any dump (with a file from QEMU's xen-save-devices-state for
its CPUs, if there is one):

    python -m tests.recording lab 4.20 --qemu 10.0
    python -m tests.recording dump DUMP XEN-SYMS EXAMPLE [DEVICE-STATE]

and what a summary of a dump reads besides:

    python -m tests.recording summary DUMP XEN-SYMS EXAMPLE

A machine that died on its crash path is a row's, with a fault planted in one of Xen's functions:

    python -m tests.recording died 4.17 page-fault machine_kexec

For a QEMU it records its monitor's output, and its device state with a crashed Xen's CPUs at the handover:

    python -m tests.recording qemu 10.0
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.machines import exampletext
from tests.machines.recorded import RECORDED, path_of
from xen_symbols.absence import Absent, Unreadable
from xen_symbols.crashpath.engine import evaluate
from xen_symbols.describe.summary import summarise
from xen_symbols.formats.elfnotes import Note
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import Lapic, PhysicalCpu, Target
from xen_symbols.targets.dump import open_dump
from xen_symbols.targets.qemu_state import parse_cpus, raw_sections
from xen_symbols.targets.qmp import Qmp
from xen_symbols.xen.locate import locate

MONITOR = {"registers": "info registers -a", "lapic": "info lapic 1", "mtree": "info mtree -f",
           "kvm": "info kvm", "jit": "info jit"}  # fmt: skip


class _Recorder(Target):
    """A target that remembers what was read from another."""

    def __init__(self, target: Any, cpus: Sequence[PhysicalCpu] | None) -> None:
        self._target = target
        self.kind, self.format, self.location = target.kind, target.format, "example"
        self._cpus = target.cpus() if cpus is None else cpus
        self.reads: dict[int, bytes] = {}
        if cpus is not None:
            self.kind, self.format = "live", "QEMU gdbstub"

    def read_physical(self, address: int, size: int) -> bytes:
        data: bytes = self._target.read_physical(address, size)
        self._keep(address, data)
        return data

    def read_physical_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | Absent]:
        answers: list[bytes | Absent] = self._target.read_physical_many(requests)
        for (address, _), answer in zip(requests, answers, strict=True):
            if not isinstance(answer, Absent):
                self._keep(address, answer)
        return answers

    def _keep(self, address: int, data: bytes) -> None:
        if len(data) > len(self.reads.get(address, b"")):
            self.reads[address] = data

    def physical_ranges(self) -> Any:
        return self._target.physical_ranges()

    def cpus(self) -> Sequence[PhysicalCpu]:
        return self._cpus

    def notes(self) -> Sequence[Note]:
        return [] if self.kind == "live" else self._target.notes()


def record(
    target: Any, symbols: SymbolTable, about: str, cpus: Sequence[PhysicalCpu] | None = None, summary: bool = False
) -> dict[str, Any]:
    """An example of what one judgement reads, and a summary. `cpus`, if given, are used instead of the target's."""
    recorder = _Recorder(target, cpus)
    used = _watch(symbols)
    memory = locate(recorder, symbols)
    report = evaluate(memory)
    if summary:
        summarise(memory, report.to_json())
    for cpu in recorder.cpus():
        symbols.lookup(cpu.registers.get("rip", 0))
        with contextlib.suppress(Unreadable):  # a check reads it where the target does not say whether a CPU is halted
            memory.read(cpu.registers.get("rip", 0) - 1, 1)
    return {
        "about": about,
        "verdict": str(report.verdict),
        "crashing_cpu": report.crashing_cpu,
        "kind": recorder.kind,
        "format": recorder.format,
        "build_id": symbols.build_id.hex() if symbols.build_id else None,
        "cpus": [_to_json(cpu) for cpu in recorder.cpus()],
        "notes": [[note.name, note.type, note.desc.hex()] for note in recorder.notes()],
        "symbols": [[hex(address), kind, name] for address, kind, name in sorted(used)],
        "memory": {hex(address): data.hex() for address, data in _merged(recorder.reads).items()},
    }


def _watch(symbols: SymbolTable) -> set[tuple[int, str, str]]:
    """Remember every symbol that is asked for by name or found by address, and what follows it."""
    used: set[tuple[int, str, str]] = set()
    by_name = symbols._rows_of
    lookup = symbols.lookup

    def keep(row: int) -> None:
        addresses, rows = symbols._by_address
        after = bisect.bisect_right(addresses, symbols.rows.addresses()[row])
        for kept in (row, *rows[after : after + 1]):
            symbol = symbols.rows.symbol(kept)
            used.add((symbol.address, symbol.kind, f"{symbol.file}#{symbol.name}" if symbol.file else symbol.name))

    def rows_of(name: str) -> list[int]:
        rows = by_name(name)
        for row in rows:
            keep(row)
        return rows

    def watched(address: int) -> Any:
        found = lookup(address)
        if found:
            rows_of(found[0].name)
        return found

    symbols._rows_of = rows_of  # type: ignore[method-assign]
    symbols.lookup = watched  # type: ignore[method-assign]
    for name in ("_start", "_end", "__note_gnu_build_id_start"):
        rows_of(name)
    return used


def _merged(reads: dict[int, bytes]) -> dict[int, bytes]:
    """Overlapping and adjacent reads merged into stretches."""
    merged: dict[int, bytearray] = {}
    last = None
    for address in sorted(reads):
        data = reads[address]
        if last is not None and address <= last + len(merged[last]):
            stretch = merged[last]
            offset = address - last
            stretch[offset : offset + len(data)] = data
        else:
            merged[address] = bytearray(data)
            last = address
    return {address: bytes(data) for address, data in merged.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, Absent):
        return {"absent": value.reason, "kind": value.kind.name}
    if hasattr(value, "_asdict"):
        return {name: _to_json(part) for name, part in value._asdict().items()}
    return value


def _save(name: str, example: dict[str, Any]) -> None:
    words = (shlex.quote(Path(word).name) for word in sys.argv[1:])  # a file's folder means nothing to others
    how = f"Recorded by `python -m tests.recording {' '.join(words)}`"
    example["about"] += f"\n{how}; the layout is described in tests/machines/exampletext.py."
    path_of(name).write_text(exampletext.write(example))


LIVE = ("normal", "shootdown", "handover")
OF_A_ROW = (*LIVE, "crashed-vmcore")


def record_row(xen: str, qemu: str, wanted: Sequence[str]) -> None:
    """Crash a row of the lab; record it live at its stages, and its vmcore: those of OF_A_ROW that were asked for."""
    from xencrash.lab.boot import up
    from xencrash.lab.specification import Specification
    from xencrash.trace import trace

    with up(Specification(xen=xen, qemu=qemu), progress=print, fresh=True) as lab:
        symbols = str(lab.symbols)

        def at_stage(stage: dict[str, Any], findings: object) -> None:
            if stage["stage"] in LIVE and stage["stage"] in wanted:
                name = f"{xen}-{stage['stage']}"
                with Qmp(lab.qmp_socket) as qmp:
                    cpus = parse_cpus(device_state(qmp))
                moment = "before any crash" if stage["stage"] == "normal" else f"at {stage['stage']} of a crash"
                about = f"Xen {xen} under QEMU {qemu}, 4 CPUs: stopped {moment}."
                _save(name, record(open_dump(str(lab.ram_file), base=0), load_symbols(symbols), about, cpus))

        report = trace(f"gdb:{lab.gdb_socket}", symbols, str(lab.qmp_socket), timeout=60, progress=at_stage,
                       trigger=lab.crash)  # fmt: skip
        if report["verdict"] != "pass":
            raise SystemExit(f"the crash was not clean ({report['verdict']}): see xencrash lab run --xen {xen}")
        if "crashed-vmcore" not in wanted:
            return
        with tempfile.TemporaryDirectory() as folder:
            vmcore = lab.dumps.vmcore(Path(folder) / "vmcore")
            about = f"Xen {xen} under QEMU {qemu}, 4 CPUs: the vmcore that the crash kernel wrote after a crash."
            _save(f"{xen}-crashed-vmcore", record(open_dump(str(vmcore)), load_symbols(symbols), about))


def record_died(xen: str, fault: str, function: str) -> None:
    """Crash a row of the lab whose crash path runs into a fault; record QEMU's dump of it, once Xen has said so."""
    from xencrash.lab.boot import up
    from xencrash.lab.planted import plant
    from xencrash.lab.specification import Specification

    with up(Specification(xen=xen), progress=print) as lab, tempfile.TemporaryDirectory() as folder:
        plant(fault, lab.gdb_socket, lab.symbols, lab.state.cpus, function)
        lab.qmp("cont")
        lab.crash()
        lab.wait_log(lab.serial_log, r"Manual reset required", 60, "recording a machine that died")
        time.sleep(3)  # until other CPUs have said it, too
        dump = lab.dumps.qemu(Path(folder) / "dump")
        about = f"Xen {xen}, 4 CPUs: QEMU's dump after a {fault.replace('-', ' ')} in {function} on the crash path."
        _save(f"died/{xen}-{function}", record(open_dump(str(dump)), load_symbols(str(lab.symbols)), about))


def device_state(qmp: Qmp) -> bytes:
    """The whole file that QEMU's xen-save-devices-state writes."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        qmp.execute("xen-save-devices-state", filename=str(state), live=False)
        return state.read_bytes()


def cpus_state(state: bytes) -> bytes:
    """A device state with the sections that are read, and one other, which must be skipped."""
    kept = [data for section, data in raw_sections(state) if section.name in ("cpu", "cpu_common", "apic", "i8259")]
    return b"".join((state[:8], *kept, b"\0"))


def record_qemu(row: str) -> None:
    """The monitor's output with the reference guest, idle on two CPUs; the device state with Xen 4.17 at its handover.

    The files are named after the version that QEMU reports. Prints the line for tests/unit/test_qemu_state.py.
    """
    from tests.live.machines import guest
    from xencrash.lab.boot import up
    from xencrash.lab.specification import Specification
    from xencrash.trace import trace

    with guest(cpus=2, qemu=row) as lab, Qmp(lab.qmp_socket) as qmp:
        messages = qmp.execute("query-version")["qemu"]
        version = f"{messages['major']}.{messages['minor']}"
        name = f"qemu-{version}"
        for about, command in MONITOR.items():
            text = qmp.execute("human-monitor-command", **{"command-line": command})
            (RECORDED / "monitor" / f"{name}-{about}.txt").write_bytes(text.encode())
    with up(Specification(qemu=row), progress=print, fresh=True) as lab:

        def at_stage(stage: dict[str, Any], findings: object) -> None:
            if stage["stage"] == "handover":
                with Qmp(lab.qmp_socket) as qmp:
                    state = cpus_state(device_state(qmp))
                (RECORDED / f"{name}-handover.devstate").write_bytes(state)
                lapic = parse_cpus(state)[stage["cpu"]].lapic
                assert isinstance(lapic, Lapic)
                line = f'"{version}": ({stage["cpu"]}, {lapic.icr_high:#x}),'
                print(f"for CRASHED of tests/unit/test_qemu_state.py: {line}")

        trace(f"gdb:{lab.gdb_socket}", str(lab.symbols), str(lab.qmp_socket), timeout=60, progress=at_stage,
              trigger=lab.crash)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.recording", description="Record examples of real Xens.")
    commands = parser.add_subparsers(dest="command", required=True)
    lab = commands.add_parser("lab", help="boot and crash a row of the lab, and record it on the way")
    lab.add_argument("xen", metavar="XEN", help="a row of scripts/lib/xencrash/lab/rows.py")
    lab.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(OF_A_ROW)}; default: all")
    lab.add_argument("--qemu", default="7.2", metavar="QEMU", help="default: %(default)s")
    qemu = commands.add_parser("qemu", help="a QEMU of the lab: what its monitor prints, and its device state")
    qemu.add_argument("qemu", metavar="QEMU", help="a row of scripts/lib/xencrash/lab/rows.py")
    died = commands.add_parser("died", help="crash a row of the lab that dies on the crash path, and record a dump")
    died.add_argument("xen", metavar="XEN")
    died.add_argument("fault", metavar="FAULT", help="of scripts/lib/xencrash/lab/planted.py")
    died.add_argument("function", metavar="FUNCTION", help="of Xen's")
    dump = commands.add_parser("dump", help="any dump: one example")
    dump.add_argument("dump", metavar="DUMP")
    dump.add_argument("symbols", metavar="XEN-SYMS")
    dump.add_argument("example", metavar="EXAMPLE", help="its name, without .txt")
    dump.add_argument("state", metavar="DEVICE-STATE", nargs="?", help="QEMU's device state of the same moment")
    summary = commands.add_parser("summary", help="any dump: what its summary reads")
    summary.add_argument("dump", metavar="DUMP")
    summary.add_argument("symbols", metavar="XEN-SYMS")
    summary.add_argument("example", metavar="EXAMPLE", help="its name below summary/, without .txt")
    args = parser.parse_args()
    if args.command == "summary":
        about = f"The summary of {Path(args.dump).name}, by {Path(args.symbols).name}."
        made = record(open_dump(args.dump), load_symbols(args.symbols), about, summary=True)
        _save(f"summary/{args.example}", made)
        return
    if args.command == "lab":
        if unknown := {*args.examples} - {*OF_A_ROW}:
            parser.error(f"no such example: {', '.join(sorted(unknown))}; there are {', '.join(OF_A_ROW)}")
        record_row(args.xen, args.qemu, args.examples or OF_A_ROW)
        return
    if args.command == "died":
        record_died(args.xen, args.fault, args.function)
        return
    if args.command == "qemu":
        record_qemu(args.qemu)
        return
    cpus = parse_cpus(Path(args.state).read_bytes()) if args.state else None
    about = f"Of {Path(args.dump).name}, by {Path(args.symbols).name}."
    _save(args.example, record(open_dump(args.dump), load_symbols(args.symbols), about, cpus))


if __name__ == "__main__":
    main()
