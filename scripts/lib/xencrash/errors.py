"""What goes wrong, as it is said: in one line on standard error."""

from __future__ import annotations

import sys

from xen_symbols.text import escaped


class UsageError(Exception):
    """Bad usage that argparse cannot see: exit status 2."""


def complain(what: object) -> None:
    """Say what went wrong, or is to be known meanwhile, in one line whatever a file is called."""
    print(f"xencrash: {escaped(str(what))}", file=sys.stderr, flush=True)


def internal_error() -> str:
    """What is to be said of the exception that is being handled, an error of the tool's; its traceback is printed."""
    sys.__excepthook__(*sys.exc_info())
    return "internal error (traceback above); no verdict"
