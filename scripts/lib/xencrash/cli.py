"""The xencrash command: from the words of a command line to an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.report.model import ExitStatus
from xencrash import commands, garbage
from xencrash.errors import UsageError, complain, internal_error
from xencrash.output import UNENCODABLE
from xencrash.subcommands import find

_INTERRUPTED = 130  # as a shell has it: 128 and SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status; errors are one line on standard error."""
    _open_streams()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # what cannot be written is said here, not at exit
        return status
    except UsageError as error:
        complain(error)
        return ExitStatus.USAGE
    except (Undecidable, Unreadable) as error:
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
        complain("interrupted")
        return _INTERRUPTED
    except Exception:
        complain(internal_error())
        return ExitStatus.UNDECIDED  # Python's own status would say that a check failed


def _open_streams() -> None:
    """Whatever is printed can be: into nothing where a stream is closed, as an escape where its encoding has no such
    character (a file's name may hold any byte)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us (>&-)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=UNENCODABLE))  # noqa: SIM115 - kept open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=UNENCODABLE)


def _run(words: list[str]) -> int:
    with garbage.none_in_cycles():
        args = _parsed(words)
    return int(args.run(args))


def _parsed(words: list[str]) -> Namespace:
    """What the words ask for, with the module of the sub-command that does it."""
    ours, theirs = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser, left = find(commands, "xencrash", ours)
    args = parser.parse_args(left)
    if theirs:
        if "gdb_arguments" not in args:
            parser.error("only gdb takes arguments after --")
        args.gdb_arguments = theirs
    return args


def _drop_output() -> None:
    """What is still to be written to standard output goes nowhere, and is not tried again at exit."""
    with contextlib.suppress(OSError, ValueError):  # standard output may not be a file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
