"""What is made from packages: QEMU, and its input: Xen, its symbols, the dom0 kernel and its initramfs.

Everything made is kept in the cache under a key of its inputs, with the SHA-256 of each file, and compared
with it before each use. The packages are fetched, and compared with the signed index, where something is to be made.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xencrash.lab import initramfs, vmlinux
from xencrash.lab.digests import sha256_of
from xencrash.lab.errors import LabError
from xencrash.lab.own import OwnXen
from xencrash.lab.packages import Cache, Package
from xencrash.lab.rows import (
    BUSYBOX_PACKAGE,
    DEFAULT_XEN,
    KERNEL_PACKAGE,
    KERNEL_SUITE,
    LIBXEN_HEADERS,
    QEMU_DATA_PACKAGES,
    QEMU_FILES,
    QEMU_PACKAGE,
    XENS,
    QemuRow,
    XenRow,
)

_HERE = Path(__file__).parent
_DOMU_SOURCES = (_HERE / "domu.c", _HERE / "domu_kernel.S")
_ANY_XEN_SOURCE = _HERE / "anyxen.c"
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


Files = dict[str, Path]  # of packages, by name


@dataclass(frozen=True)
class Wanted:
    """Packages of a suite, which `choose` picks from its index."""

    suite: str
    choose: Callable[[Cache], list[Package]]


def xen_images(cache: Cache, row: XenRow) -> XenImages:
    """The images of a row, fetched and made if the cache has no complete ones."""
    wanted = [
        *_kexec(row),
        Wanted(row.suite, lambda cache: cache.packages(row.suite, row.packages)),
        Wanted(KERNEL_SUITE, kernel_packages),
    ]

    def build(folder: Path, tools: Files, libxenctrl: Files, xen: Files, base: Files) -> None:
        _build_xen(folder, row, list(xen.values()))
        kernel = next(path for name, path in base.items() if name != BUSYBOX_PACKAGE)
        kexec = [*tools.values(), *libxenctrl.values()]
        _build_dom0(folder, kernel, base[BUSYBOX_PACKAGE], kexec, row.libxenctrl_as)

    with cache.lock():
        made = make_once(cache, f"xen-{row.name}", wanted, build)
    return XenImages(made / "xen", made / "xen-syms", made / "vmlinux", made / "dom0.cpio.gz")


def domu_images(cache: Cache, row: XenRow) -> XenImages:
    """The images of a row, with a dom0 that has `domu` (domu.c), which creates a domU."""
    plain = xen_images(cache, row)
    _require_gcc("creates a domU")
    wanted = [*_kexec(row), Wanted(row.suite, lambda cache: cache.packages(row.suite, [LIBXEN_HEADERS]))]

    def build(folder: Path, *packages: Files) -> None:
        _add(folder, plain, _domu([path for files in packages for path in files.values()]))

    with cache.lock():
        made = make_once(cache, f"domu-{row.name}", wanted, build, [plain.dom0_initramfs, *_DOMU_SOURCES])
    return replace(plain, dom0_initramfs=made / "dom0.cpio.gz")


def own_images(cache: Cache, own: OwnXen) -> XenImages:
    """The images of a Xen that no row has, with a dom0 that loads a crash kernel whatever Xen's version (anyxen.c)."""
    plain = xen_images(cache, XENS[DEFAULT_XEN])
    _require_gcc("lets kexec talk to any Xen")
    with cache.lock():
        dom0 = make_once(
            cache, "dom0-any", [], lambda folder: _add(folder, plain, _any_xen()),
            [plain.dom0_initramfs, _ANY_XEN_SOURCE],
        )  # fmt: skip
        made = make_once(cache, "own", [], lambda folder: _write(folder / "xen", own.plain), [own.image])
    return replace(plain, xen=made / "xen", symbols=own.symbols, dom0_initramfs=dom0 / "dom0.cpio.gz")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _add(folder: Path, plain: XenImages, more: list[initramfs.Entry]) -> None:
    """Write dom0's initramfs with more in it: Linux unpacks archives that follow each other (buffer-format.rst)."""
    whole = plain.dom0_initramfs.read_bytes() + initramfs.compressed(initramfs.cpio(more))
    _write(folder / "dom0.cpio.gz", whole)


def _require_gcc(what: str) -> None:
    if not shutil.which("gcc"):
        raise LabError(f"making the images: gcc is missing, which builds what {what}: install gcc and binutils")


def qemu_words(cache: Cache, row: QemuRow) -> tuple[str, ...]:
    """The command for a row's QEMU, which runs from the cache with its own libraries, modules and firmware."""
    wanted = [
        Wanted(row.suite, lambda cache: cache.with_libraries(row.suite, [QEMU_PACKAGE])),
        Wanted(row.suite, lambda cache: cache.packages(row.suite, QEMU_DATA_PACKAGES)),
    ]

    def build(folder: Path, program: Files, data: Files) -> None:
        _build_qemu(folder, list(program.values()), list(data.values()))

    with cache.lock():
        made = make_once(cache, f"qemu-{row.name}", wanted, build)
    return (
        *("env", f"QEMU_MODULE_DIR={made / 'data'}"),
        *(str(made / "lib/ld-linux-x86-64.so.2"), "--library-path", str(made / "lib")),
        *(str(made / "qemu-system-x86_64"), "-L", str(made / "data")),
    )


def kernel_packages(cache: Cache) -> list[Package]:
    (meta,) = cache.packages(KERNEL_SUITE, [KERNEL_PACKAGE])
    kernels = [name for name in meta.depends if name.startswith("linux-image-")]
    return cache.packages(KERNEL_SUITE, [*kernels, BUSYBOX_PACKAGE])


def _kexec(row: XenRow) -> list[Wanted]:
    """kexec, its libraries, and this Xen's own libxenctrl if that differs."""
    return [
        Wanted(row.kexec_suite, lambda cache: cache.with_libraries(row.kexec_suite, ["kexec-tools"])),
        Wanted(row.suite, lambda cache: _libxenctrl(cache, row)),
    ]


def _libxenctrl(cache: Cache, row: XenRow) -> list[Package]:
    """This Xen's own libraries, for a kexec that comes with another's."""
    packages = cache.with_libraries(row.suite, [row.libxenctrl]) if row.libxenctrl else []
    return [package for package in packages if package.name.startswith("libxen")]


def make_once(
    cache: Cache, kind: str, wanted: Sequence[Wanted], build: Callable[..., None], sources: Iterable[Path] = ()
) -> Path:
    """The folder that `build(folder, files…)` makes, from the files of each that is wanted and from source files.

    It is complete and checked. Its name is a digest of the packages' names, with versions, and of the sources' content.
    """
    recipe = hashlib.sha256()
    for source in (Path(__file__), Path(initramfs.__file__), Path(vmlinux.__file__), *sources):
        recipe.update(source.read_bytes())

    def folder_of(names: Iterable[str]) -> Path:
        whole = recipe.copy()
        for name in names:
            whole.update(name.encode() + b"\0")
        return cache.root / "made" / f"{kind}-{whole.hexdigest()[:16]}"

    with contextlib.suppress(LabError):  # `collect` reports or repairs a broken index
        made = folder_of(package.file for want in wanted for package in want.choose(cache))
        if _usable(cache, made):
            return made
    files = [cache.collect(want.suite, want.choose) for want in wanted]
    made = folder_of(path.name for found in files for path in found.values())
    if not _usable(cache, made):
        cache.progress(f"unpacking and making {kind}")
        _make(made, lambda folder: build(folder, *files))
    for old in made.parent.glob(f"{kind}-*"):
        if time.time() - old.stat().st_mtime > _UNUSED:
            shutil.rmtree(old)
    return made


def _usable(cache: Cache, made: Path) -> bool:
    if not made.exists():
        return False
    if _whole(made):
        os.utime(made)
        return True
    cache.progress(f"{made.name} in the cache is broken: making it again")
    shutil.rmtree(made)
    return False


def _make(made: Path, build: Callable[[Path], None]) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".tmp-") as name:
        folder = Path(name) / "made"
        folder.mkdir()
        build(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest = {str(path.relative_to(folder)): sha256_of(path) for path in files}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        folder.rename(made)


def _whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest) and all(sha256_of(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _build_xen(folder: Path, row: XenRow, packages: list[Path]) -> None:
    found = members(packages, (row.image, row.symbols))
    image = only(found, row.image)
    symbols = only(found, row.symbols)
    (folder / "xen").write_bytes(gzip.decompress(image) if image[:2] == b"\x1f\x8b" else image)
    (folder / "xen-syms").write_bytes(gzip.decompress(symbols) if symbols[:2] == b"\x1f\x8b" else symbols)


def _build_dom0(folder: Path, kernel: Path, busybox: Path, kexec: list[Path], libxenctrl_as: str) -> None:
    wanted = dict.fromkeys((*initramfs.DOM0_MODULES, *initramfs.CRASH_MODULES))
    found = members([kernel], ("boot/vmlinuz-*", *(f"*/{name}" for name in wanted)))
    modules = {name: only(found, f"*/{name}") for name in wanted}
    linux = vmlinux.unpacked(only(found, "boot/vmlinuz-*"))
    shell = only(members([busybox], ("*bin/busybox",)), "*bin/busybox")
    crash = initramfs.initramfs(initramfs.CRASH_INIT, shell, {name: modules[name] for name in initramfs.CRASH_MODULES})
    extra = [
        *_kexec_files(kexec, libxenctrl_as),
        initramfs.file("boot/vmlinux", vmlinux.movable(linux), 0o644),
        initramfs.file("boot/crash.cpio.gz", crash, 0o644),
    ]
    (folder / "vmlinux").write_bytes(linux)
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


def _kexec_files(packages: list[Path], libxenctrl_as: str) -> list[initramfs.Entry]:
    """kexec from these packages (later ones take precedence) and the libraries that it loads."""
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
        _compile(
            *_DOMU_SOURCES,
            *("-I", root / "usr/include", "-L", root / "usr" / _LIBRARIES, "-Wl,--allow-shlib-undefined"),
            *("-lxenctrl", "-lxenguest", "-o", program),
        )
        return [
            initramfs.file("sbin/domu", program.read_bytes()),
            *(
                initramfs.file(f"{_LIBRARIES}/{so}", path.read_bytes())
                for so, path in loaded_libraries(root, program).items()
            ),
        ]


def _any_xen() -> list[initramfs.Entry]:
    """anyxen.c, built, and what has it loaded with every program."""
    with tempfile.TemporaryDirectory() as temporary:
        library = Path(temporary) / "anyxen.so"
        _compile(_ANY_XEN_SOURCE, "-shared", "-fPIC", "-o", library)
        return [
            initramfs.file(f"{_LIBRARIES}/{library.name}", library.read_bytes()),
            initramfs.file("etc/ld.so.preload", f"/{_LIBRARIES}/{library.name}\n", 0o644),
        ]


def _compile(source: Path, *words: str | Path) -> None:
    built = subprocess.run(
        ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", source, *words],
        capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    if built.returncode:
        lines = built.stderr.strip().splitlines() or ["gcc did not say why"]
        why = next((line for line in lines if "error" in line), lines[0])
        raise LabError(f"making the images: building {source.name} failed: {why}")


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


def only(found: dict[str, bytes], pattern: str) -> bytes:
    matches = fnmatch.filter(found, pattern)
    if len(matches) != 1:
        raise LabError(f"making the images: expected one file like {pattern} in the packages, got {matches or 'none'}")
    return found[matches[0]]
