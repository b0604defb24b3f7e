"""What is made from packages: QEMU, and what it is given: Xen, its symbols, the dom0 kernel and its initramfs.

Everything made is kept in the cache under a key of its inputs, with the SHA-256 of each file, and compared
with it before each use.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from xencrash.lab import initramfs
from xencrash.lab.digests import sha256_of
from xencrash.lab.errors import LabError
from xencrash.lab.packages import Cache, Package
from xencrash.lab.rows import (
    BUSYBOX_PACKAGE,
    KERNEL_PACKAGE,
    KERNEL_SUITE,
    LIBXEN_HEADERS,
    QEMU_DATA_PACKAGES,
    QEMU_FILES,
    QEMU_PACKAGE,
    QemuRow,
    XenRow,
)

_HERE = Path(__file__).parent
_DOMU_SOURCES = (_HERE / "domu.c", _HERE / "domu_kernel.S")
_LIBRARIES = "lib/x86_64-linux-gnu"
_UNUSED = 7 * 86400.0  # seconds after which what an earlier recipe made is removed
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class XenImages:
    """Files for one Xen: what QEMU loads, and the symbols of exactly this build."""

    xen: Path
    symbols: Path
    kernel: Path
    dom0_initramfs: Path


def xen_images(cache: Cache, row: XenRow) -> XenImages:
    """The images of a row, fetched and made where the cache has none that are whole."""
    with cache.lock():
        kexec = _kexec_packages(cache, row)
        xen = cache.collect(row.suite, lambda at: at.packages(row.suite, row.packages))
        base = cache.collect(KERNEL_SUITE, _kernel_packages)
        inputs = [*kexec, *xen.values(), *base.values()]

        def build(folder: Path) -> None:
            _build_xen(folder, row, list(xen.values()))
            kernel = next(path for name, path in base.items() if name != BUSYBOX_PACKAGE)
            _build_dom0(folder, kernel, base[BUSYBOX_PACKAGE], kexec, row.libxenctrl_as)

        made = _made(cache, f"xen-{row.name}", inputs, build)
    return XenImages(made / "xen", made / "xen-syms", made / "vmlinuz", made / "dom0.cpio.gz")


def domu_images(cache: Cache, row: XenRow) -> XenImages:
    """The images of a row, with a dom0 that has `domu` (domu.c), which creates a domU."""
    plain = xen_images(cache, row)
    if not shutil.which("gcc"):
        raise LabError("making the images: gcc is missing, which builds what creates a domU: install gcc and binutils")
    with cache.lock():
        libraries = _kexec_packages(cache, row)
        headers = cache.collect(row.suite, lambda at: at.packages(row.suite, [LIBXEN_HEADERS])).values()
        packages = [*libraries, *headers]

        def build(folder: Path) -> None:
            # Linux unpacks archives that lie behind each other (buffer-format.rst).
            whole = plain.dom0_initramfs.read_bytes() + initramfs.compressed(initramfs.cpio(_domu(packages)))
            (folder / "dom0.cpio.gz").write_bytes(whole)

        made = _made(cache, f"domu-{row.name}", [plain.xen.parent, *packages], build, _DOMU_SOURCES)
    return replace(plain, dom0_initramfs=made / "dom0.cpio.gz")


def qemu_words(cache: Cache, row: QemuRow) -> tuple[str, ...]:
    """The command for a row's QEMU, which runs from the cache with its own libraries, modules and firmware."""
    suite = row.suite
    with cache.lock():
        program = cache.collect(suite, lambda at: at.with_libraries(suite, [QEMU_PACKAGE]))
        data = cache.collect(suite, lambda at: at.packages(suite, QEMU_DATA_PACKAGES))

        def build(folder: Path) -> None:
            _build_qemu(folder, list(program.values()), list(data.values()))

        made = _made(cache, f"qemu-{row.name}", [*program.values(), *data.values()], build)
    return (
        *("env", f"QEMU_MODULE_DIR={made / 'data'}"),
        *(str(made / "lib/ld-linux-x86-64.so.2"), "--library-path", str(made / "lib")),
        *(str(made / "qemu-system-x86_64"), "-L", str(made / "data")),
    )


def _kernel_packages(cache: Cache) -> list[Package]:
    (meta,) = cache.packages(KERNEL_SUITE, [KERNEL_PACKAGE])
    kernels = [name for name in meta.depends if name.startswith("linux-image-")]
    return cache.packages(KERNEL_SUITE, [*kernels, BUSYBOX_PACKAGE])


def _kexec_packages(cache: Cache, row: XenRow) -> list[Path]:
    """kexec, its libraries, and this Xen's own libxenctrl where that is another."""
    tools = cache.collect(row.kexec_suite, lambda at: at.with_libraries(row.kexec_suite, ["kexec-tools"]))
    return [*tools.values(), *cache.collect(row.suite, lambda at: _libxenctrl(at, row)).values()]


def _libxenctrl(cache: Cache, row: XenRow) -> list[Package]:
    """This Xen's own libraries, for a kexec that comes with another's."""
    packages = cache.with_libraries(row.suite, [row.libxenctrl]) if row.libxenctrl else []
    return [package for package in packages if package.name.startswith("libxen")]


def _made(
    cache: Cache, kind: str, inputs: Iterable[Path], build: Callable[[Path], None], sources: Iterable[Path] = ()
) -> Path:
    """The folder that `build` makes from these packages (whose names hold their versions) and source files, whole
    and checked."""
    recipe = hashlib.sha256()
    for source in (Path(__file__), Path(initramfs.__file__), *sources):
        recipe.update(source.read_bytes())
    for path in inputs:
        recipe.update(path.name.encode() + b"\0")
    made = cache.root / "made" / f"{kind}-{recipe.hexdigest()[:16]}"
    if made.exists():
        if _whole(made):
            os.utime(made)
            return made
        cache.progress(f"{made.name} in the cache is broken: making it again")
        shutil.rmtree(made)
    cache.progress(f"unpacking and making {kind}")
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".tmp-") as name:
        folder = Path(name) / "made"
        folder.mkdir()
        build(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest = {str(path.relative_to(folder)): sha256_of(path) for path in files}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        folder.rename(made)
    for old in made.parent.glob(f"{kind}-*"):
        if time.time() - old.stat().st_mtime > _UNUSED:
            shutil.rmtree(old)
    return made


def _whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest) and all(sha256_of(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _build_xen(folder: Path, row: XenRow, packages: list[Path]) -> None:
    found = members(packages, (row.image, row.symbols))
    image = _only(found, row.image)
    symbols = _only(found, row.symbols)
    (folder / "xen").write_bytes(gzip.decompress(image) if image[:2] == b"\x1f\x8b" else image)
    (folder / "xen-syms").write_bytes(gzip.decompress(symbols) if symbols[:2] == b"\x1f\x8b" else symbols)


def _build_dom0(folder: Path, kernel: Path, busybox: Path, kexec: list[Path], libxenctrl_as: str) -> None:
    wanted = dict.fromkeys((*initramfs.DOM0_MODULES, *initramfs.CRASH_MODULES))
    found = members([kernel], ("boot/vmlinuz-*", *(f"*/{name}" for name in wanted)))
    modules = {name: _only(found, f"*/{name}") for name in wanted}
    vmlinuz = _only(found, "boot/vmlinuz-*")
    shell = _only(members([busybox], ("*bin/busybox",)), "*bin/busybox")
    crash = initramfs.initramfs(initramfs.CRASH_INIT, shell, {name: modules[name] for name in initramfs.CRASH_MODULES})
    extra = [
        *_kexec(kexec, libxenctrl_as),
        initramfs.file("boot/vmlinuz", vmlinuz, 0o644),
        initramfs.file("boot/crash.cpio.gz", crash, 0o644),
    ]
    (folder / "vmlinuz").write_bytes(vmlinuz)
    (folder / "dom0.cpio.gz").write_bytes(
        initramfs.initramfs(initramfs.DOM0_INIT, shell, {name: modules[name] for name in initramfs.DOM0_MODULES}, extra)
    )


def _build_qemu(folder: Path, packages: list[Path], data: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        root = Path(temporary)
        for package in packages:
            unpack(package, root)
        program = root / "usr/bin/qemu-system-x86_64"
        (folder / "lib").mkdir()
        for name, path in (loaded_libraries(root, program) | {"ld-linux-x86-64.so.2": _loader(root)}).items():
            shutil.copy(path, folder / "lib" / name)
        shutil.copy(program, folder)
    (folder / "data").mkdir()
    for name, content in members(data, QEMU_FILES).items():
        (folder / "data" / Path(name).name).write_bytes(content)


def _kexec(packages: list[Path], libxenctrl_as: str) -> list[initramfs.Entry]:
    """kexec from these packages (of which later ones go before) and the libraries that it loads."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for package in packages:
            unpack(package, root)
        if libxenctrl_as:
            (asked,) = root.glob(f"**/{libxenctrl_as}")
            own = next(path for path in root.glob("**/libxenctrl.so.*") if not path.name.startswith(libxenctrl_as))
            asked.unlink()
            asked.write_bytes(own.read_bytes())
        (program,) = (path for path in root.glob("**/sbin/kexec") if path.is_file())
        libraries = loaded_libraries(root, program)
        loader = _loader(root)
        return [
            initramfs.file("sbin/kexec", program.read_bytes()),
            initramfs.file(f"lib64/{loader.name}", loader.read_bytes()),
            *(initramfs.file(f"{_LIBRARIES}/{so}", path.read_bytes()) for so, path in libraries.items()),
        ]


def _domu(packages: list[Path]) -> list[initramfs.Entry]:
    """domu.c, built with the headers and libraries in these packages, and the libraries that it loads."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for package in packages:
            unpack(package, root)
        program = root / "domu"
        # What the libraries themselves need is looked for where they run: it may be newer than what this machine has.
        built = subprocess.run(
            ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-I", root / "usr/include", *_DOMU_SOURCES,
             "-L", root / "usr" / _LIBRARIES, "-Wl,--allow-shlib-undefined", "-lxenctrl", "-lxenguest", "-o", program],
            capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        if built.returncode:
            lines = built.stderr.strip().splitlines() or ["gcc did not say why"]
            why = next((line for line in lines if "error" in line), lines[0])
            raise LabError(f"making the images: building {_DOMU_SOURCES[0].name} failed: {why}")
        return [
            initramfs.file("sbin/domu", program.read_bytes()),
            *(
                initramfs.file(f"{_LIBRARIES}/{so}", path.read_bytes())
                for so, path in loaded_libraries(root, program).items()
            ),
        ]


def loaded_libraries(root: Path, program: Path) -> dict[str, Path]:
    """The shared libraries that `program` loads from the packages unpacked in `root`, by the name it asks for."""
    folders = ":".join(str(root / name) for name in (_LIBRARIES, f"usr/{_LIBRARIES}"))
    listed = subprocess.run(
        [_loader(root), "--inhibit-cache", "--library-path", folders, "--list", program],
        capture_output=True,
        text=True,
        check=False,
    )
    libraries = {}
    for line in listed.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if "/" in name:  # the loader itself
            continue
        if arrow and rest.startswith(str(root)):
            libraries[name] = Path(rest.split(" (0x")[0])
        elif arrow:
            raise LabError(f"making the images: {program.name} needs {name}, which is in none of the fetched packages")
    if listed.returncode or not libraries:
        raise LabError(f"making the images: cannot list the libraries of {program.name}: {listed.stderr.strip()}")
    return libraries


def _loader(root: Path) -> Path:
    return next(path for path in root.glob("**/ld-linux-x86-64.so.2") if path.exists())


def unpack(package: Path, root: Path) -> None:
    done = subprocess.run(["dpkg-deb", "-x", package, root], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"unpacking {package.name}: {done.stderr.strip()}; is the disk full?")


def members(packages: Iterable[Path], patterns: Iterable[str]) -> dict[str, bytes]:
    """The regular files of the packages whose path (without a leading `./`) matches a pattern."""
    wanted = list(patterns)
    found: dict[str, bytes] = {}
    for package in packages:
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                path = member.name.removeprefix("./")
                if member.isreg() and any(fnmatch.fnmatch(path, pattern) for pattern in wanted):
                    stream = archive.extractfile(member)
                    if stream is not None:
                        found[path] = stream.read()
    return found


def _only(found: dict[str, bytes], pattern: str) -> bytes:
    matches = fnmatch.filter(found, pattern)
    if len(matches) != 1:
        raise LabError(f"making the images: expected one file like {pattern} in the packages, got {matches or 'none'}")
    return found[matches[0]]
