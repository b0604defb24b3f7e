"""Build the reference guest: one image for each generation of the crash path, with the machine's gcc and binutils."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from xencrash.guests.generations import SOURCES, generations
from xencrash.lab.errors import LabError
from xencrash.lab.packages import default_root

_TOOLS = ("gcc", "ld", "objcopy")
_CRASH_IMAGE = "crash_image.c"
# No red zone: an NMI may strike anywhere. No floating point: it is nobody's to save. Each function whole and in
# its place, and under its own name: the crash path is followed by breakpoints on them.
_CFLAGS = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare",
    "-Wno-address-of-packed-member", "-Werror",
    "-ffreestanding", "-fno-builtin", "-nostdinc", "-fpie", "-m64", "-mno-red-zone", "-mgeneral-regs-only",
    "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-fno-strict-aliasing",
    "-fno-reorder-blocks-and-partition", "-fno-optimize-sibling-calls", "-fno-ipa-cp", "-fno-ipa-sra",
    "-fno-partial-inlining",
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """`kernel`: for QEMU's -kernel (multiboot). `symbols`: the ELF64 file, as Xen's xen-syms."""

    kernel: Path
    symbols: Path


def build(generation: str, out_dir: Path | None = None) -> Built:
    """The guest of one generation: about a second, or at once when sources and compiler are those of last time.

    `out_dir` is where builds are kept, by default in the cache. Raises LabError.
    """
    if generation not in generations():
        raise LabError(f"building the guest: there is no generation {generation}; xencrash lab guests lists them")
    for tool in _TOOLS:
        if not shutil.which(tool):
            raise LabError(f"building the guest: {tool} is missing; install gcc and binutils")
    folder = (out_dir or default_root() / "guests") / f"{generation}-{_fingerprint()}"
    built = Built(folder / "xen", folder / "xen-syms")
    if not built.kernel.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _build(generation, Path(temporary))
            # Another run may have been faster; its files are the same.
            if not folder.exists():
                folder.mkdir()
            for path in (built.symbols, built.kernel):
                (Path(temporary) / path.name).replace(path)
    return built


def _fingerprint() -> str:
    digest = hashlib.sha256(_run(["gcc", "--version"]).encode())
    for path in sorted((*SOURCES.glob("*.[chS]"), *SOURCES.glob("*.lds"), Path(__file__))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _build(generation: str, folder: Path) -> None:
    defines = [f"-DGENERATION={generations().index(generation)}", f'-DGENERATION_NAME="{generation}"']
    environment_include = _run(["gcc", "-print-file-name=include"]).strip()  # stdint.h and its like
    gcc = ["gcc", *_CFLAGS, *defines, f"-I{SOURCES}", "-isystem", environment_include]

    def script(name: str) -> str:
        _run(["gcc", "-E", "-P", "-x", "c", *defines, f"-I{SOURCES}", str(SOURCES / name), "-o", name], folder)
        return name

    _run([*gcc, "-c", str(SOURCES / _CRASH_IMAGE), "-o", "crash_image.o"], folder)
    _run(["ld", "-T", script("crash_image.lds"), "crash_image.o", "-o", "crash_image.elf"], folder)
    _run(["objcopy", "-O", "binary", "crash_image.elf", "crash_image.bin"], folder)

    sources = sorted(path for path in SOURCES.glob("*.[cS]") if path.name != _CRASH_IMAGE)
    _run([*gcc, '-DCRASH_IMAGE="crash_image.bin"', "-c", *map(str, sources)], folder)
    objects = [f"{path.stem}.o" for path in sources]
    _run(["ld", "-static", "--build-id=sha1", "-z", "max-page-size=4096", "-z", "noexecstack", "--no-warn-rwx-segments",
          "-T", script("xen.lds"), *objects, "-o", "xen-syms"], folder)  # fmt: skip
    _run(["objcopy", "-O", "binary", "xen-syms", "xen"], folder)


def _run(command: list[str], folder: Path | None = None) -> str:
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["it did not say why"]
        why = next((line for line in lines if re.search("error|undefined|overlap", line)), lines[0])
        raise LabError(f"building the guest: {command[0]} failed: {why}")
    return result.stdout
