"""Where each CPU is and how it got there, as `xen bt` answers it in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xen_symbols.absence import Absent
from xen_symbols.xen.backtrace import Backtrace, Step
from xen_symbols.xen.frames import Frame

if TYPE_CHECKING:
    from xen_symbols.report.contract import Json


def describe_backtrace(trace: Backtrace) -> Json:
    """One CPU's call chain, from the innermost frame outwards."""
    out: Json = {"cpu": trace.cpu, "source": trace.source, "current": trace.current}
    if trace.registers is not None:
        out["absent"] = trace.registers.reason
    stacks = trace.stacks
    if isinstance(stacks, Absent):
        out |= {"stacks": None, "stacks_absent": stacks.reason}
    else:
        out["stacks"] = {
            "start": hex(stacks.base), "end": hex(stacks.end), "by": stacks.found_by,
            "names_by": stacks.numbering, "guest_regs": hex(stacks.guest_regs),
            "processor_id": None if isinstance(stacks.processor_id, Absent) else stacks.processor_id,
            "list": [{"name": s.name, "ist": s.ist, "start": hex(s.start), "end": hex(s.end)}
                     for s in stacks.stacks],
        }  # fmt: skip
    out["steps"] = [_describe_step(step) for step in trace.steps]
    out |= {"end": trace.end, "lost": trace.lost}
    out["guest"] = None if trace.guest is None else _describe_frame(trace.guest, None)
    out["frames"] = [
        {
            "stack": found.stack.name,
            "state": found.state,
            "says": found.says,
            **_describe_frame(found.frame, found.name),
        }
        for found in trace.frames
    ]
    return out


def _describe_frame(frame: Frame, name: str | None) -> Json:
    return {
        "address": hex(frame.address), "vector": frame.vector, "event": frame.name, "rip": hex(frame.rip),
        "symbol": name, "cs": hex(frame.cs), "rflags": hex(frame.rflags), "rsp": hex(frame.rsp), "ss": hex(frame.ss),
    }  # fmt: skip


def _describe_step(step: Step) -> Json:
    out: Json = {
        "at": {"symbol": step.name, "pc": hex(step.rip)},
        "rsp": hex(step.rsp),
        "cs": hex(step.cs),
        "stack": step.stack.name if step.stack else None,
        "place": step.place,
        "interrupted_by": None if step.frame is None else step.frame.name,
        "frame": None if step.frame is None else hex(step.frame.address),
        "calls": [{"at": hex(call.at), "address": hex(call.address), "symbol": call.name} for call in step.calls],
    }
    return out if step.unread is None else out | {"absent": step.unread}
