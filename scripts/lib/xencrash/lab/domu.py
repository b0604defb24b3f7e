"""Domains beside dom0, by `domu` (domu.c) in dom0."""

from __future__ import annotations

import base64
import binascii
import contextlib
import gzip
import hashlib
from pathlib import Path

from xencrash.lab.dom0 import BUSY_ANSWERS, Dom0
from xencrash.lab.errors import LabError
from xencrash.lab.process import Process


class DomUs:
    """The running domUs. A machine specified with `domu_vcpus` has `domu` in dom0."""

    def __init__(self, process: Process, dom0: Dom0) -> None:
        self._process = process
        self._dom0 = dom0
        self.rounds: dict[int, list[int]] = {}  # by domain ID, how often each vCPU was seen to have counted

    def create(self, vcpus: int) -> int:
        """Create a PVH domU of 4 MiB, and return its domain ID.

        It spins, its vCPUs in SVM guest mode, each pinned to the CPU of its number.
        """
        said = self._dom0.run(f"domu create {vcpus}", BUSY_ANSWERS)
        if not said.strip().isdigit():
            raise LabError(f"in dom0: 'domu create' said {' '.join(said.split())!r}, no domain ID: try again")
        domid = int(said)
        self.rounds[domid] = [0] * vcpus
        self.require_busy()
        self._process.progress(f"domain {domid} runs")
        return domid

    def require_busy(self) -> None:
        """Wait until each vCPU has counted since the last look; raises LabError if one does not."""
        for domid, before in self.rounds.items():

            def counts(domid: int = domid, before: list[int] = before) -> list[int] | None:
                words = self._dom0.run(f"domu rounds {domid} {len(before)}", BUSY_ANSWERS).split()
                if not all(word.isdigit() for word in words):
                    return None  # a process of dom0 died (QemuRow.domu): it is asked again
                now = list(map(int, words))
                return now if all(count > then for count, then in zip(now, before, strict=True)) else None

            self.rounds[domid] = self._process.until(
                f"running domain {domid}: a vCPU makes no progress", BUSY_ANSWERS, counts
            )

    def dump_core(self, domid: int, path: str | Path) -> Path:
        """A domain's core, as `xl dump-core` writes it; the domain is paused meanwhile."""
        packed = "/tmp/core.gz"
        self._dom0.run(f"domu dump {domid} /tmp/core && gzip </tmp/core >{packed} && rm /tmp/core", 120)
        target = Path(path)
        target.write_bytes(gzip.decompress(self._file(packed)))
        return target

    def _file(self, path: str) -> bytes:
        """A file of dom0's. The serial line can lose a byte of a long text on a busy host, so it is read until its
        digest is right; LabError after five attempts."""
        digest = self._dom0.run(f"sha256sum {path}").split()[0]
        for _ in range(5):
            with contextlib.suppress(binascii.Error):
                content = base64.b64decode("".join(self._dom0.run(f"base64 {path}", 120).split()), validate=True)
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
        raise LabError(f"in dom0: {path} was read five times over the serial line, and its digest was wrong each time")
