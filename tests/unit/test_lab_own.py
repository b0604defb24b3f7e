"""A Xen of one's own: which files are its image and its symbols, and what is said of others; without a machine."""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.machines import pewriter
from tests.machines.elfwriter import BUILD_ID, START, Sym, build_id_note, function, sections, variable, xen_syms
from xencrash.lab import boot, cells, images, options
from xencrash.lab.commands import matrix, repeat
from xencrash.lab.errors import BadSpecification, LabError
from xencrash.lab.own import OwnXen, own_xen
from xencrash.lab.rows import GDBS, QEMUS
from xencrash.lab.serial import Serial
from xencrash.lab.specification import Specification

ELF32 = b"\x7fELF\1\1\1".ljust(16, b"\0")
IMAGE = ELF32 + bytes(112) + (0x1BADB002).to_bytes(4, "little") + bytes(60) + build_id_note()
SYMBOLS = [Sym("_start", START), function("kexec_crash", START + 0x100), variable("cpu_online_map", START + 0x600000)]


def syms(build_id: bytes = BUILD_ID, symbols: list[Sym] = SYMBOLS) -> bytes:
    return xen_syms(symbols, sections(note=build_id_note(build_id)))


def put(folder: Path, **files: bytes) -> Path:
    """The files, whose names' `_` is a `.`."""
    for name, data in files.items():
        (folder / name.replace("_", ".").replace("..", "-")).write_bytes(data)
    return folder


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
def test_a_build_is_taken_from_its_folder(tmp_path: Path, pack: Any) -> None:
    put(tmp_path, xen_gz=pack(IMAGE), xen__syms=syms())
    own = own_xen(tmp_path / "xen.gz")
    assert own == OwnXen(tmp_path / "xen.gz", tmp_path / "xen-syms")
    assert own.plain == IMAGE
    own.check(crash_kernel=True)


def test_an_installed_one_has_its_symbols_under_usr_lib_debug(tmp_path: Path) -> None:
    for folder in ("boot", "usr/lib/debug/boot"):
        (tmp_path / folder).mkdir(parents=True)
    image, symbols = tmp_path / "boot/xen-4.22.0.gz", tmp_path / "usr/lib/debug/boot/xen-syms-4.22.0"
    image.write_bytes(IMAGE)
    with pytest.raises(BadSpecification, match=r"no xen-syms-4\.22\.0 or xen-syms beside it: give the xen-syms of"):
        own_xen(image)
    symbols.write_bytes(syms())
    assert own_xen(image).symbols.resolve() == symbols
    assert own_xen(image, tmp_path / "others").symbols == tmp_path / "others"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (syms(), "a 64-bit ELF file, as xen-syms is: give {folder}/xen.gz"),
        (pewriter.xen_efi([]), "a PE image (xen.efi, perhaps): give {folder}/xen.gz, or boot it by --boot efi"),
        (ELF32 + bytes(9000), "an ELF file: give {folder}/xen.gz"),
        (bytes(9000), "not an image of Xen: give {folder}/xen.gz"),
        (b"", "empty: give {folder}/xen.gz"),
    ],
)
def test_another_file_is_named_with_the_right_one(tmp_path: Path, wrong: bytes, why: str) -> None:
    put(tmp_path, xen_gz=IMAGE, wrong=wrong)
    with pytest.raises(BadSpecification) as refused:
        own_xen(tmp_path / "wrong", tmp_path / "xen-syms").check(crash_kernel=True)
    assert str(refused.value) == f"--xen-image {tmp_path}/wrong: {why.format(folder=tmp_path)}"
    with pytest.raises(BadSpecification) as again:
        own_xen(tmp_path / "wrong")
    assert str(again.value) == str(refused.value)


@pytest.mark.parametrize(
    ("symbols", "why"),
    [
        (syms(bytes(20)), f"they are of another build (build-id {bytes(20).hex()}) than"),
        (syms(symbols=SYMBOLS[::2]), "was built without CONFIG_KEXEC"),
        (pewriter.xen_efi([*SYMBOLS[:1], Sym("__base_relocs_start", START), Sym("__base_relocs_end", START + 256)]),
         "these are of xen.efi, whose variables lie elsewhere: give its xen-syms or xen-syms.map"),
        (b"", "empty"),
    ],
)  # fmt: skip
def test_symbols_of_another_build_are_refused_before_anything_boots(
    tmp_path: Path, symbols: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "own_images", lambda *_: pytest.fail("something was made"))
    put(tmp_path, xen_gz=IMAGE, xen__syms=symbols)
    spec = Specification(xen_image=own_xen(tmp_path / "xen.gz"))
    with pytest.raises(BadSpecification) as refused:
        boot._images(spec, None)  # type: ignore[arg-type]
    assert why in str(refused.value)


OF_EFI, OF_GZ = (
    [*SYMBOLS, Sym("__base_relocs_start", START), Sym("__base_relocs_end", START + size)] for size in (256, 0)
)


def test_a_xen_efi_has_its_symbols_or_they_are_beside_it(tmp_path: Path) -> None:
    image = tmp_path / "xen.efi"
    image.write_bytes(pewriter.xen_efi(OF_EFI))
    own = own_xen(image, efi=True)
    assert own == OwnXen(image, image, True) and own.plain == image.read_bytes()
    own.check(crash_kernel=True)
    for kind in ("map", "elf"):
        (tmp_path / f"xen.efi.{kind}").touch()
        assert own_xen(image, efi=True).symbols == tmp_path / f"xen.efi.{kind}"


@pytest.mark.parametrize(
    ("image", "symbols", "why"),
    [
        (IMAGE, syms(), "--xen-image {folder}/image: an ELF file: --boot efi boots a xen.efi: give that"),
        (pewriter.xen_efi(OF_EFI), xen_syms(OF_GZ),
         "--symbols {folder}/symbols: these are of xen.gz, whose variables lie elsewhere: give its xen.efi, "
         "xen.efi.elf or xen.efi.map"),
        (pewriter.xen_efi(OF_EFI), pewriter.xen_efi(OF_EFI, pewriter.sections(guid=bytes(16))),
         "--symbols {folder}/symbols: they are of another build"),
    ],
)  # fmt: skip
def test_what_does_not_boot_by_efi_is_refused(tmp_path: Path, image: bytes, symbols: bytes, why: str) -> None:
    (tmp_path / "image").write_bytes(image)
    (tmp_path / "symbols").write_bytes(symbols)
    with pytest.raises(BadSpecification) as refused:
        own_xen(tmp_path / "image", tmp_path / "symbols", efi=True).check(crash_kernel=True)
    assert str(refused.value).startswith(why.format(folder=tmp_path))


def test_a_xen_without_kexec_boots_where_no_crash_kernel_is_wanted(tmp_path: Path) -> None:
    put(tmp_path, xen_gz=IMAGE, xen__syms=syms(symbols=SYMBOLS[::2]))
    own_xen(tmp_path / "xen.gz").check(crash_kernel=False)


def test_rules(tmp_path: Path) -> None:
    own = OwnXen(tmp_path / "xen.gz", tmp_path / "xen-syms")
    for fields, why in (
        ({"xen": "4.17"}, "--xen and --xen-image are two Xens"),
        ({"domu_vcpus": 1}, "--domu-vcpus needs the libraries of this Xen"),
        ({"guest": "rfc-v1"}, "--xen-image is for real Xen"),
    ):
        with pytest.raises(BadSpecification, match=why):
            Specification(xen_image=own, **fields)  # type: ignore[arg-type]
    spec = Specification(xen_image=own)
    assert (spec.name, spec.boots_dom0, spec.generation) == ("xen.gz", True, None)
    with pytest.raises(BadSpecification, match="--symbols is for --xen-image"):
        options.own(argparse.Namespace(symbols="xen-syms"))


def test_its_cells_are_those_of_a_row_without_domus(tmp_path: Path) -> None:
    own = OwnXen(tmp_path / "xen.gz", tmp_path / "xen-syms")
    made = cells.cells(own)
    assert len(made) == len(GDBS) * sum(len(row.cpu) for row in QEMUS.values())
    assert {cell.own for cell in made} == {own} and {cell.generation for cell in made} == {None}
    assert not any(cell.domu for cell in (*made, *cells.moments(40, 1, made)))
    assert {cell.qemu for cell in cells.settled(made)} == {"7.2", "10.0"}
    with pytest.raises(BadSpecification, match="--xen and --xen-image are two Xens"):
        matrix.run(argparse.Namespace(xen=["4.17"], xen_image=str(own.image), symbols=str(own.symbols)))


def test_a_xen_is_not_crashed_in_ways_that_it_lacks_symbols_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, xen_gz=IMAGE, xen__syms=syms(symbols=[*SYMBOLS, function("do_kexec_op", START + 0x200)]))
    ran: list[cells.Cell] = []
    monkeypatch.setattr(repeat, "crash_all", lambda crashes, *_: ran.extend(crashes) or [])
    monkeypatch.setattr(repeat, "finish", lambda *_: 0)
    parser = argparse.ArgumentParser()
    repeat.add_options(parser)
    assert repeat.run(parser.parse_args(["--xen-image", str(tmp_path / "xen.gz"), "-n", "200", "--seed", "1"])) == 0
    assert {cell.how for cell in ran} == {"key", "panic", "nmi", "bug", "page-fault", "double-fault"}
    assert [line for line in capsys.readouterr().err.splitlines() if "--how" in line] == [
        f"xencrash: --how {way} needs {name}, which its symbols do not have: it is not crashed in this way"
        for way, name in (("watchdog", "do_nmi_trigger"), ("mce", "mca_allbanks"))
    ]


@pytest.mark.parametrize("says", ["Serial input to ", "Serial input -> "])
def test_the_console_of_an_old_xen_is_switched_too(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([f"(XEN) *** {says}{who} (type 'CTRL-a' three times to switch input)" for who in ("DOM0", "Xen")])
    typed: list[bytes] = []

    def wait(_: Serial, pattern: bytes, *__: object) -> re.Match[bytes]:
        """The log is read while a line is printed: half a word is not what the input was switched to."""
        line = next(lines).encode()
        return next(found for end in range(len(line)) if (found := re.search(pattern, line[:end])))

    monkeypatch.setattr(Serial, "wait", wait)
    monkeypatch.setattr(Serial, "size", lambda _: 0)
    monkeypatch.setattr(Serial, "send", lambda _, data: typed.append(data))
    Serial.__new__(Serial).to_xen()
    assert typed == [b"\x01\x01\x01"] * 2


def test_what_killed_a_boot_is_said() -> None:
    console = b"(XEN) Panic on CPU 0:\r\n(XEN) Could not construct d0\r\n(XEN) ****************\r\n\r\n(XEN) Reboot"
    assert boot.last_words(console) == "Panic on CPU 0: | Could not construct d0 | Reboot"


SHIM_TEST = r"""
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
int xencall1(void *handle, unsigned int number, uint64_t argument);
int main(int count, char **words)
{
    uint32_t sysctl[2] = {3, 0x15};
    int result = xencall1(0, atoi(words[1]), (uintptr_t)sysctl);
    printf("%d %x %d\n", result, sysctl[1], result ? errno : 0);
    return count != 2;
}
"""
XENCALL = r"""
#include <errno.h>
#include <stdint.h>
int xencall1(void *handle, unsigned int number, uint64_t argument)
{
    uint32_t *sysctl = (uint32_t *)(uintptr_t)argument;
    (void)handle;
    if (number == 36 || sysctl[1] == VERSION)
        return number == 36 ? 7 : 0;
    errno = EACCES;
    return -1;
}
"""


@pytest.mark.parametrize(
    ("version", "number", "answer"),
    [
        (0x15, 35, "0 15 0"), (0x0B, 35, "0 b 0"), (0x3F, 35, "0 3f 0"),
        (0x99, 35, "-1 40 13"), (0x99, 40, "-1 15 13"), (0, 36, "7 15 0"),
    ],
)  # fmt: skip
def test_a_sysctl_of_another_version_is_made_again(tmp_path: Path, version: int, number: int, answer: str) -> None:
    """anyxen.c, preloaded before a libxencall that knows one version."""
    (tmp_path / "call.c").write_text(XENCALL)
    (tmp_path / "main.c").write_text(SHIM_TEST)
    library = tmp_path / "libxencall.so"
    images._compile(tmp_path / "call.c", "-shared", "-fPIC", f"-DVERSION={version}", "-o", library)
    images._compile(tmp_path / "main.c", library, f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "main")
    (shim, preload) = images._any_xen()
    assert preload.path == "etc/ld.so.preload" and preload.data == f"/{shim.path}\n".encode()
    (tmp_path / "shim.so").write_bytes(shim.data)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")}
    said = subprocess.run([tmp_path / "main", str(number)], stdout=subprocess.PIPE, env=environment, check=False).stdout
    assert said.decode().strip() == answer


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    (tmp_path / "wrong.c").write_text("int main(void) { return one; }\n")
    with pytest.raises(LabError, match=r"building wrong\.c failed: .*'one' undeclared"):
        images._compile(tmp_path / "wrong.c", "-o", tmp_path / "wrong")
