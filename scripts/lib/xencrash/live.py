"""A live machine as it is now: its report, and what it is. It goes on as it was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from xen_symbols.report.model import SCHEMA_VERSION
from xencrash.errors import complain
from xencrash.gdbmi import GdbSession, MiError, open_session
from xencrash.options import Request

if TYPE_CHECKING:
    from xen_symbols.report import contract
    from xen_symbols.report.contract import Json



def judge(asked: Request) -> contract.Report:
    """The report. Raises Undecidable."""
    with _session(asked) as session:
        return cast("contract.Report", session.xen("crash-check"))


def preflight(asked: Request) -> contract.Report:
    """The report on whether a crash would work. Raises Undecidable."""
    with _session(asked) as session:
        return cast("contract.Report", session.xen("preflight"))


def describe(asked: Request) -> Json:
    """What a machine is. Raises Undecidable when there is no Xen to be seen."""
    with _session(asked) as session:
        known = session.xen("symbols")
        data: Json = {"schema": SCHEMA_VERSION} | {name: known[name] for name in ("target", "symbols", "missing")}
        if known["generation"] is None:
            data |= {"nearest": known["nearest"], "undecided": known["absent"]}
        else:
            data["generation"] = known["generation"]
        try:
            status = session.xen("crash-status")
        except MiError as error:
            return {"undecided": str(error)} | data
    return data | {name: status[name] for name in ("stage", "crashing_cpu", "online_at_crash")}


def console(asked: Request) -> str:
    """Xen's console ring. Raises Undecidable."""
    with _session(asked) as session:
        return str(session.xen("log")["text"])


def summary(asked: Request) -> Json:
    """A crash on one page. Raises Undecidable."""
    with _session(asked) as session:
        found: Json = session.xen("summary")
    return found


def _session(asked: Request) -> GdbSession:
    return open_session(asked.target, asked.symbols, asked.qmp, asked.given, notice=complain)
