"""The xencrash command: what each sub-command is called, takes, and exits with."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xen_symbols.absence import Undecidable
from xen_symbols.report.model import ExitStatus, Finding, Report, Verdict
from xen_symbols.version import VERSION

Json = dict[str, Any]

_LIVE = "gdb:HOST:PORT, or gdb:/path/of/a/unix/socket (QEMU's -gdb)"
_ANY = f"TARGET is a dump's path, or {_LIVE}."
_JUDGED = """

exit status:
  0  every check passed          2  bad usage
  1  at least one check failed   3  could not be decided (the reason is on standard error)
"""
EPILOG = _ANY + _JUDGED
TRACE_EPILOG = f"TARGET is {_LIVE}." + _JUDGED
INFO_EPILOG = f"""\
{_ANY}

exit status:
  0  everything was told     2  bad usage     3  some could not be (the reason is on standard error)
"""
GDB_EPILOG = f"""\
{_ANY}

exit status:
  gdb's own, or
  2  bad usage     3  no gdb, or what was named cannot be opened (the reason is on standard error)
"""

_TELL_EVERY = 2.0  # seconds
COMMANDS = ("trace", "check", "gdb", "info", "lab")
LAB = "real Xen, or a reference guest, in QEMU"


class UsageError(Exception):
    """Bad usage that argparse cannot see: exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status; errors are one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    ours, theirs = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us (>&-)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for the process's life
    parser = _parser(next((word for word in ours[:1] if word in COMMANDS), None))
    args = parser.parse_args(ours)
    if theirs and args.run is not run_gdb:
        parser.error("only gdb takes arguments after --")
    args.gdb_arguments = theirs
    try:
        if "target" in args:
            _require_sense(args)
        status = int(args.run(args))
        sys.stdout.flush()  # what cannot be written is told here, not at exit
        return status
    except UsageError as error:
        complain(error)
        return ExitStatus.USAGE
    except Undecidable as error:
        complain(error)
        return ExitStatus.UNDECIDED
    except BrokenPipeError:
        _drop_output()  # the reader has gone
        return ExitStatus.UNDECIDED
    except OSError as error:
        _drop_output()
        complain(f"{error.filename or 'writing the output'}: {error.strerror or error}")
        return ExitStatus.UNDECIDED
    except KeyboardInterrupt:
        print("xencrash: interrupted", file=sys.stderr)
        return 130
    except Exception:
        import traceback

        traceback.print_exc()
        print("xencrash: an error of its own, above: nothing was decided", file=sys.stderr)
        return ExitStatus.UNDECIDED  # Python's own status would say that a check failed


def complain(what: object) -> None:
    """What went wrong, on standard error, in one line, whatever a file is called."""
    from xen_symbols.text import escaped

    print(f"xencrash: {escaped(str(what))}", file=sys.stderr)


def _drop_output() -> None:
    """What is still to be written to standard output goes nowhere, and is not tried again at exit."""
    try:  # noqa: SIM105 - contextlib is not worth its import here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # standard output is no file of the system's


class _Help(argparse.RawDescriptionHelpFormatter):
    """At the terminal's width. argparse would import shutil for that, and make one of these for every argument."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size().columns
        except (ValueError, OSError):
            columns = 80
        super().__init__(prog, width=columns - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """What has lines keeps them; a paragraph is filled."""
        whole = argparse.HelpFormatter if "\n" not in text else argparse.RawDescriptionHelpFormatter
        return whole._fill_text(self, text, width, indent)


def _parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The command's parser, or as much of it as takes the one sub-command that is `asked` for: all of them cost more
    than judging a dump."""
    parser = argparse.ArgumentParser(
        prog="xencrash",
        description="Validate the crash path of x86 Xen: live in QEMU, stage by stage, or in a dump.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"xencrash {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog="xencrash")

    if asked in (None, "trace"):
        trace = _command(
            commands, "trace", run_trace, "follow a crash live, stage by stage, and judge each",
            "Attach to QEMU's gdbstub, wait for Xen to crash, stop at each stage of the crash path, read every gate "
            "and every CPU there, and judge them. The machine then runs on into its crash kernel.",
        )  # fmt: skip
        trace.epilog = TRACE_EPILOG
        _target_options(trace, dumps=False)
        _output_options(trace)
        trace.add_argument("--timeout", type=_seconds, metavar="S", help="give up after S seconds without a crash")
        trace.add_argument(
            "--gates",
            action="store_true",
            help="also list every change of an NMI or #MC gate, and who wrote it where that was seen",
        )
        trace.add_argument("--leave-stopped", action="store_true", help="leave the machine stopped at the last stage")

    if asked in (None, "check"):
        check = _command(
            commands, "check", run_check, "judge what is there now: a dump, or a stopped or parked live machine",
            "Judge the state that a dump or a live machine is in. Several dumps give a line each (as json a list of "
            "reports, as junit one document); --output then names a directory for a report of each. The status is the "
            "worst: 1 when a check of any failed, else 3 when any could not be decided or opened.",
        )  # fmt: skip
        _target_options(check, many=True)
        _output_options(check)

    if asked in (None, "gdb"):
        gdb = _command(
            commands, "gdb", run_gdb, "an interactive gdb with the plugin loaded",
            "Start gdb with the xen commands, the symbols and the target loaded. Arguments after -- go to gdb.",
        )  # fmt: skip
        gdb.epilog = GDB_EPILOG
        _target_options(gdb)

    if asked in (None, "info"):
        info = _command(
            commands, "info", run_info, "what this is: format, notes, CPUs, symbols, build-id, generation and evidence",
            "Say what a target is and what is known of it, without judging it.",
        )  # fmt: skip
        info.epilog = INFO_EPILOG
        _target_options(info)
        _output_options(info, formats=("table", "json"))

    if asked in (None, "lab"):
        from xencrash.lab import cli as lab

        lab.add_parser(commands, LAB)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, epilog=EPILOG,
        formatter_class=_Help,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _target_options(parser: argparse.ArgumentParser, many: bool = False, dumps: bool = True) -> None:
    if many:
        parser.add_argument("target", nargs="+", metavar="TARGET", help="dumps, or one gdb:…")
    else:
        parser.add_argument("target", metavar="TARGET", help="a dump, or gdb:…" if dumps else "gdb:…")
    parser.add_argument(
        "--symbols", metavar="FILE", help="xen-syms, a .map, or an image; default: what Xen itself carries"
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="QEMU's QMP socket: a live machine's LAPIC modes, NMI latches, IDTRs"
    )
    if dumps:
        parser.add_argument(
            "--base", type=_address, metavar="ADDRESS", help="physical address of a raw image's first byte"
        )
    parser.add_argument(
        "--allow-build-id-mismatch", action="store_true", help="go on with symbols of another build; the report says so"
    )


def _output_options(parser: argparse.ArgumentParser, formats: tuple[str, ...] = ("table", "json", "junit")) -> None:
    parser.add_argument("--format", choices=formats, default="table", help="default: %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write the report there instead of standard output")


def _address(text: str) -> int:
    from xen_symbols.targets import PHYSICAL_END

    try:
        if 0 <= (value := int(text, 0)) < PHYSICAL_END:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no physical address, such as 0x100000")


def _seconds(text: str) -> float:
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def is_live(target: str) -> bool:
    return target.startswith("gdb:")


def _require_sense(args: argparse.Namespace) -> None:
    """Raises UsageError for a target that the command does not take, or an option that has no effect on it."""
    for target in args.target if isinstance(args.target, list) else [args.target]:
        if not is_live(target) and args.run is run_trace:
            raise UsageError(
                f"{target} is not a live machine: trace takes gdb:HOST:PORT or gdb:SOCKET; a dump takes check"
            )
        if is_live(target) and getattr(args, "base", None) is not None:
            raise UsageError(f"--base is for a raw image of memory, and {target} is a live machine: leave it out")
        if not is_live(target) and args.qmp is not None:
            raise UsageError(f"--qmp is for a live machine, and {target} is a dump: leave it out")
    if args.allow_build_id_mismatch and args.symbols is None and args.run is not run_gdb:  # gdb may load some itself
        raise UsageError("--allow-build-id-mismatch is for --symbols, and none are given: leave it out")


def run_check(args: argparse.Namespace) -> int:
    target, *more = args.target
    if not more and not is_live(target):
        gc.disable()  # one report and the process ends: looking for cycles among its findings would only cost
        try:
            return finish(check_dump(target, args), args)
        finally:
            gc.freeze()  # nor is there anything for the interpreter to look for when it ends
            gc.enable()
    from xencrash import judging

    return judging.check_many(args) if more else finish(judging.check_live(args), args)


def check_dump(path: str, args: argparse.Namespace) -> Report:
    """The report on one dump. Raises Undecidable."""
    from xen_symbols import api

    xen = api.open_dump(
        path, args.symbols, base=args.base, allow_mismatch=args.allow_build_id_mismatch, progress=searching(path)
    )
    return api.evaluate(xen)


def searching(path: str) -> Callable[[int, int], None] | None:
    """Tells whoever watches how far the search for Xen in a dump has come: a line every few seconds, on a terminal."""
    if not sys.stderr.isatty():  # a script finds the reason there, and nothing else
        return None
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            print(f"xencrash: {path}: looking for Xen, {done >> 20} of {total >> 20} MiB so far", file=sys.stderr)

    return tell


def run_info(args: argparse.Namespace) -> int:
    from xencrash import judging

    return judging.info(args)


def run_trace(args: argparse.Namespace) -> int:
    from xencrash.judging import trace_live

    return finish(trace_live(args), args)


def run_gdb(args: argparse.Namespace) -> int:
    from xencrash.interactive import run

    return run(args)


def finish(report: Report | Json, args: argparse.Namespace) -> int:
    """Write a report in the asked format, say on standard error why it is undecided, and return its status."""
    if isinstance(report, Report):
        if args.format == "json":
            return _finish_json(report, args)
        report = report.to_json()
    if args.format != "table" or args.output:
        write(render(report, args.format), args.output)
    else:
        show(report)
    _say_why(report)
    return status_of(report)


def _finish_json(report: Report, args: argparse.Namespace) -> int:
    """The same, without ever holding all findings as JSON."""
    from xen_symbols.report.jsontext import json_text

    write_pieces(json_text(report.members()), args.output)
    unknowns = [finding for finding in report.findings if finding.verdict is Verdict.UNKNOWN]
    _say_why({**report.members(), "findings": map(Finding.to_json, unknowns)})
    return report.exit_status


def _say_why(report: Json) -> None:
    if report.get("undecided"):
        complain(report["undecided"])
    elif report["verdict"] == str(Verdict.UNKNOWN):
        complain(_first_unknown(report))


def status_of(report: Json) -> int:
    return {"pass": ExitStatus.PASSED, "fail": ExitStatus.FAILED}.get(report["verdict"], ExitStatus.UNDECIDED)


def _first_unknown(report: Json) -> str:
    unknowns = [finding for finding in report["findings"] if finding["verdict"] == "unknown"]
    if not unknowns:
        return "nothing could be judged: every check was skipped"
    first = unknowns[0]
    more = f" (and {len(unknowns) - 1} more)" if len(unknowns) > 1 else ""
    return f"{first['check']} could not be decided: {first['reason']}{more}"


def render(report: Json, format: str) -> str:
    """A report as text in one of the formats."""
    if format == "json":
        from xen_symbols.report.jsontext import json_text

        return "".join(json_text(report))
    if format == "junit":
        from xen_symbols.report.junit import to_junit

        return to_junit(report)
    from xen_symbols.report.blocks import report_blocks
    from xen_symbols.report.console import plain

    return plain(report_blocks(report))


def show(report: Json) -> None:
    from xen_symbols.report.blocks import report_blocks
    from xen_symbols.report.console import print_blocks

    print_blocks(report_blocks(report), sys.stdout)


def write(text: str, output: str | None) -> None:
    """As `write_pieces`."""
    write_pieces([text], output)


def write_pieces(pieces: Iterable[str], output: str | None) -> None:
    """To a file, or to standard output. Raises UsageError for a file that cannot be written."""
    if output is None:
        sys.stdout.writelines(pieces)
        sys.stdout.flush()
        return
    try:
        with open(output, "w", encoding="utf-8") as file:  # noqa: PTH123 - pathlib is not worth its import here
            file.writelines(pieces)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}") from None
