"""What goes wrong in the lab. Each message is one line: which step, why, and what to do."""

from __future__ import annotations


class LabError(Exception):
    """A step of the lab failed."""


class PackageGone(LabError):
    """The package source itself says that it does not have a package (any more).

    This is the one failure that is not ours: old suites leave the mirrors one day.
    """
