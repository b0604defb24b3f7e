"""The lab's errors. Each message is one line: which step, why, and what to do."""

from __future__ import annotations

from xen_symbols.absence import Undecidable


class LabError(Undecidable):
    """A step of the lab failed, so nothing can be said about Xen."""


class BadSpecification(LabError):
    """An impossible machine or crash was asked for; on the command line, bad usage."""


class PackageGone(LabError):
    """The package source itself says that it does not have a package, or no longer.

    This is the one failure that is not ours: old suites leave the mirrors one day.
    """
