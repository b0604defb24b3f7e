"""Text that came out of a machine or a file, made safe to print, and numbers as it has them."""

from __future__ import annotations

from collections.abc import Iterable


def escaped(text: str, keep: str = "") -> str:
    """`text` with every character that a terminal might obey as an escape, those in `keep` excepted."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else repr(c)[1:-1] for c in text)


def ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers, ascending, as Xen prints CPUs: 0, 1, 2, 5 are "0-2" and "5"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ["-".join(map(str, one)) for one in found]


def cpu_list(cpus: Iterable[int]) -> str:
    """CPU numbers as Xen prints them: "CPU 1", "CPUs 0-3,5"; "none" without any."""
    listed = ",".join(ranges(cpus))
    return f"CPU{'s' * (not listed.isdecimal())} {listed}" if listed else "none"
