"""Dumps of a machine: the vmcore that its crash kernel leaves on the disk, and QEMU's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from xen_symbols.formats.elf import ELF64, Header
from xencrash.lab.errors import LabError
from xencrash.lab.process import Process
from xencrash.lab.sparse import copy_sparse

_COPIED = rb"^@vmcore (?:copied (?P<size>\d+)|failed: (?P<reason>[^\r\n]*))\r?\n"


VMCORE_IN = 600.0  # seconds until the crash kernel has copied it, on a busy host


class Dumps:
    """The dumps of a machine."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def vmcore(self, path: str | Path, timeout: float = VMCORE_IN) -> Path:
        """Wait until the crash kernel has copied /proc/vmcore, and write exactly that file to `path`."""
        process = self._process
        match = process.wait_log(process.paths.line_log, _COPIED, timeout, "waiting for the vmcore")
        if match["size"] is None:
            reason = match["reason"].decode(errors="replace")
            raise LabError(
                f"taking the vmcore: the crash kernel could not copy it: {reason}: {process.where_to_look()}"
            )
        size = int(match["size"])
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            copy_sparse(process.paths.disk, partial, size)
            if (described := elf_size(partial)) != size:
                raise LabError(
                    f"taking the vmcore: the copy is broken: its headers describe {described} bytes, "
                    f"/proc/vmcore had {size}: {process.where_to_look()}"
                )
            partial.rename(target)
        except OSError as error:
            raise LabError(f"taking the vmcore: {target}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
        process.progress(f"vmcore: {target} ({size / 1e6:.0f} MB)")
        return target

    def qemu(self, path: str | Path, format: str = "elf", paging: bool = False) -> Path:
        """QEMU's own dump of the whole machine; `format` is one of its `dump-guest-memory` formats."""
        target = Path(path).absolute()
        arguments: dict[str, Any] = {} if format == "elf" else {"format": format}
        # Of a QEMU in another machine only the run's folder is here.
        there = self._process.paths.run_dir / "dump" if self._process.accel_row.nested else target
        self._process.qmp("dump-guest-memory", timeout=300, protocol=f"file:{there}", paging=paging, **arguments)
        if there != target:
            shutil.move(there, target)
        return target


def elf_size(path: Path) -> int:
    """Where the last segment of an ELF64 core ends: the size of the whole file. 0 if it is not an ELF64 core."""
    with path.open("rb") as stream:
        start = stream.read(ELF64.header.size)
        if len(start) < ELF64.header.size or start[:6] != ELF64.ident[:6]:
            return 0
        header = Header(*ELF64.header.unpack(start))
        stream.seek(header.phoff)
        table = stream.read(header.phnum * ELF64.program.size)
    whole = len(table) - len(table) % ELF64.program.size
    return max((segment.offset + segment.filesz for segment in ELF64.programs(table[:whole])), default=0)
