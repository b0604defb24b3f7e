"""A crash on one page, as JSON: which Xen, why it crashed and where, what each CPU did, and what the dump is worth.

What is not known is null, and `absent` of the same object says why. Of a guest's memory nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xen_symbols.absence import Absent, Unreadable
from xen_symbols.describe.backtrace import describe_backtrace
from xen_symbols.describe.notes import describe_crash_notes
from xen_symbols.targets import PhysicalCpu
from xen_symbols.xen import frames, savedcpus
from xen_symbols.xen.backtrace import Backtrace, backtrace
from xen_symbols.xen.console import console_parts, printable
from xen_symbols.xen.doing import Doing, doing, function
from xen_symbols.xen.kexec import crash_area, crash_image_loaded, image_size
from xen_symbols.xen.memory import XenMemory, image_region
from xen_symbols.xen.reason import Reason, around, find_reason, lines_of_xen
from xen_symbols.xen.stacks import REGS_SIZE, stacks_of_each
from xen_symbols.xen.state import CpuState, State, read_state
from xen_symbols.xen.vcpus import Vcpu, running_vcpus
from xen_symbols.xen.version import command_line, xen_version

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json

_CONSOLE = 128 << 10  # bytes of the ring's end: a panic's report takes less than 16 KiB
_LINE = 200  # characters of a line of the console
_CONTROL = ("cr0", "cr2", "cr3", "cr4")


def summarise(memory: XenMemory, report: contract.Report) -> Json:
    """Xen in a target, and the report on its crash path. Raises Unreadable where its CPUs cannot be found."""
    state = read_state(memory)
    crashed = bool(state.system["kexecing"].value is True or report["crashing_cpu"] is not None)
    cpus = [cpu for cpu in state.cpus.values() if cpu.exists]
    crashing = _crashing(state, report) if crashed else None
    if crashing is not None:
        cpus = [_while_in_xen(memory, cpu) if cpu.cpu == crashing else cpu for cpu in cpus]
    stacks = stacks_of_each(memory, state, cpus)
    traces = {cpu.cpu: backtrace(memory, state, cpu, stacks[cpu.cpu]) for cpu in cpus}
    vcpus = running_vcpus(memory, {cpu: trace.stacks for cpu, trace in traces.items()})
    trace = None if crashing is None else traces[crashing]
    summary: Json = {
        **{name: report[name] for name in ("schema", "tool", "target", "symbols", "generation")},
        "xen": _xen(memory, report),
        "crashed": crashed,
        "crashing_cpu": None,
        "crashing_cpu_by": report["target"].get("crashing_cpu_by", []),
        **_why(memory, trace, crashed),
        "others": _groups({cpu: one for cpu, one in traces.items() if cpu != crashing}, vcpus),
        "verdict": _verdict(report),
        "crash_kernel": _crash_kernel(memory, state),
    }
    for cpu in cpus:
        if cpu.cpu == crashing:
            summary["crashing_cpu"] = _crashing_cpu(memory, cpu, traces[crashing], vcpus[crashing])
    return summary


def _with_absent(values: Mapping[str, Any]) -> Json:
    """Values as JSON: an Absent is null, and its reason stands in `absent`."""
    absent = {name: value.reason for name, value in values.items() if isinstance(value, Absent)}
    out = {name: None if isinstance(value, Absent) else value for name, value in values.items()}
    return out | ({"absent": absent} if absent else {})


def _xen(memory: XenMemory, report: contract.Report) -> Json:
    version = xen_version(memory)
    return _with_absent(
        {
            "version": version.text,
            "changeset": version.changeset,
            "compiler": version.compiler,
            "compile_date": version.date,
            "build_id": memory.build_id if isinstance(memory.build_id, Absent) else memory.build_id.hex(),
            "command_line": command_line(memory),
        }
    )


# -- why, and where ---------------------------------------------------------------------------


def _crashing(state: State, report: contract.Report) -> int | None:
    """By the report's evidence; of a Xen that is not judged by what kexec.c noted."""
    if report["crashing_cpu"] is not None:
        return report["crashing_cpu"]
    owner = state.system["crash_owner"].value
    return owner if owner in state.cpus and state.of(owner).exists else None


def _while_in_xen(memory: XenMemory, cpu: CpuState) -> CpuState:
    """The crashing CPU with the registers that it saved, where it runs the crash kernel by now."""
    physical, notes = cpu.physical, cpu.notes.value
    rip = None if isinstance(physical, Absent) else physical.registers.get("rip")
    if rip is None or image_region(rip) == image_region(memory.table) or isinstance(notes, Absent) or not notes.saved:
        return cpu
    return cpu._replace(physical=savedcpus.from_memory(cpu.cpu, notes.saved))


def _why(memory: XenMemory, trace: Backtrace | None, crashed: bool) -> Json:
    """`why`, and the `console` around the line that says it."""
    try:
        parts = console_parts(memory, _CONSOLE)
    except Unreadable as error:
        parts = [error.absent]
    unread = next((part for part in parts if isinstance(part, Absent)), None)
    lines = lines_of_xen("\n".join(part for part in parts if isinstance(part, str)))
    calls = [] if trace is None else [function(call.name) for step in trace.steps for call in step.calls]
    reason = find_reason(lines, calls) if crashed else None
    start, end = around(lines, None if reason is None else reason.line)
    shown = [_short(printable(line)) for line in lines[start:end]]
    console: Json = {"lines": shown, "at": None if reason is None or reason.line is None else reason.line - start}
    if unread is not None:
        console["absent"] = f"not all of the console ring could be read: {unread}"
    return {"why": _reason(reason, unread) if crashed else None, "console": console}


def _reason(reason: Reason | None, unread: Absent | None) -> Json:
    if reason is None:
        why = "the crashing CPU's stack does not show it, and neither does the console"
        return {"id": None, "says": None, "by": None, "absent": why + (f": {unread}" if unread else "")}
    return {"id": reason.id, "says": _short(printable(reason.says)), "by": reason.known_by}


def _short(text: str) -> str:
    return text if len(text) <= _LINE else f"{text[:_LINE]}… ({len(text)} characters)"


def _crashing_cpu(memory: XenMemory, cpu: CpuState, trace: Backtrace, vcpu: Vcpu | Absent) -> Json:
    where = doing(trace)
    return _with_absent(
        {
            "cpu": cpu.cpu,
            "doing": where if isinstance(where, Absent) else _describe_doing(where),
            "vcpu": vcpu if isinstance(vcpu, Absent) else _describe_vcpu(vcpu),
            **_registers(memory, cpu, where),
            "backtrace": describe_backtrace(trace),
        }
    )


def _registers(memory: XenMemory, cpu: CpuState, where: Doing | Absent) -> Json:
    """Of what the crash interrupted, where its frame is there; else those that are known of the CPU."""
    physical = cpu.physical
    known: dict[str, int] = {} if isinstance(physical, Absent) else dict(physical.registers)
    source = physical if isinstance(physical, Absent) else physical.source
    frame = None if isinstance(where, Absent) or where.step is None else where.step.frame
    if frame is not None and not frame.ring:
        try:
            general = frames.registers(memory.read(frame.address, REGS_SIZE))
        except Unreadable as error:
            return {"registers": error.absent, "registers_of": None}
        pushed = {name: getattr(frame, name) for name in ("rip", "cs", "rflags", "rsp", "ss")}
        known = {**general, **pushed, **{name: known[name] for name in _CONTROL if name in known}}
        source = f"the frame of {frame.name} at {frame.address:#x}"
    elif isinstance(physical, PhysicalCpu) and not physical.current:
        source = f"{physical.source}: where it saved them"
    if not known:
        return {"registers": source if isinstance(source, Absent) else Absent(f"none ({source})"), "registers_of": None}
    return {"registers": {name: hex(value) for name, value in known.items()}, "registers_of": source}


def _describe_doing(where: Doing) -> Json:
    calls = [] if where.step is None or where.at is None else [call.name for call in where.step.calls]
    if where.at in calls:  # it is one of them
        calls = calls[calls.index(where.at) + 1 :]
    return {"at": where.at, "event": where.event, "calls": calls}


def _describe_vcpu(vcpu: Vcpu) -> Json:
    hardware = vcpu.hardware_domain
    return {
        "name": vcpu.name, "idle": vcpu.idle, "domain": vcpu.domain, "vcpu": vcpu.number,
        "hardware_domain": None if isinstance(hardware, Absent) else hardware,
    }  # fmt: skip


# -- the other CPUs ---------------------------------------------------------------------------


def _groups(traces: Mapping[int, Backtrace], vcpus: Mapping[int, Vcpu | Absent]) -> list[Json]:
    """CPUs that did the same: in one function, for one domain. The largest group first. Where it is not known, the
    reason is that of a group's first CPU."""
    found: dict[tuple[Any, ...], Json] = {}
    for cpu, trace in traces.items():
        where, vcpu = doing(trace), vcpus[cpu]
        domain = vcpu if isinstance(vcpu, Absent) else "idle" if vcpu.idle else vcpu.domain
        did = where if isinstance(where, Absent) else {"at": where.at and function(where.at), "event": where.event}
        key = tuple(None if isinstance(one, Absent) else str(one) for one in (domain, did))
        if key not in found:
            found[key] = _with_absent({"domain": domain, "doing": did}) | {"cpus": [], "vcpus": []}
        found[key]["cpus"].append(cpu)
        if isinstance(vcpu, Vcpu) and not vcpu.idle:
            found[key]["vcpus"].append(vcpu.number)
    return sorted(found.values(), key=lambda group: -len(group["cpus"]))


# -- what it is worth -------------------------------------------------------------------------


def _verdict(report: contract.Report) -> Json:
    """The crash path's verdict, the counts behind it, and the first failure that does not follow from another."""
    counts: dict[str, int] = {}
    for finding in report["findings"]:
        counts[finding["verdict"]] = counts.get(finding["verdict"], 0) + 1
    bad = _of(report["findings"], "fail") or _of(report["findings"], "unknown")
    first = next((finding for finding in bad if not finding.get("follows")), bad[0] if bad else None)
    out: Json = {"verdict": report["verdict"], "counts": counts, "first": first}
    if "undecided" in report:
        out["undecided"] = report["undecided"]
    return out


def _of(findings: Sequence[contract.Finding], verdict: str) -> list[contract.Finding]:
    return [finding for finding in findings if finding["verdict"] == verdict]


def _crash_kernel(memory: XenMemory, state: State) -> Json:
    """Whether one is loaded, the memory reserved for it, and the notes that it finds, CPUs with equal ones together."""
    flags = state.system["kexec_flags"]
    loaded: bool | Absent = flags.value if isinstance(flags.value, Absent) else crash_image_loaded(flags.value)
    area: Json | Absent
    try:
        found = crash_area(memory).value
        area = {"start": hex(found.start), "size": found.size,
                "image": image_size(memory, flags.value, found) if loaded is True else None}  # fmt: skip
    except Unreadable as error:
        area = error.absent
    notes: dict[tuple[str | None, str], list[int]] = {}
    described = describe_crash_notes(memory, state)
    for buffer in described["buffers"]:
        notes.setdefault((buffer["state"], buffer["says"]), []).append(buffer["cpu"])
    info = described["info"]
    return _with_absent({"loaded": loaded, "area": area}) | {
        "notes": [{"cpus": cpus, "state": state, "says": says} for (state, says), cpus in notes.items()],
        "info": "xen_phys_start" in info,
        "info_absent": info.get("absent", {}).get("info"),
    }
