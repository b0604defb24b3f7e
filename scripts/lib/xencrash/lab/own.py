"""A Xen of one's own, which no row has: its image and its symbols, looked at before anything boots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from xen_symbols.absence import Undecidable
from xen_symbols.formats.content import File, WrongFile
from xen_symbols.formats.elf import ELF32, ELF64
from xen_symbols.formats.magics import recognised
from xen_symbols.symbols import buildid
from xen_symbols.symbols.links import Link, link_of
from xen_symbols.symbols.load import load_symbols, unpacked
from xen_symbols.symbols.table import TEXT, SymbolTable
from xencrash.lab.errors import BadSpecification

_MULTIBOOT = (0x1BADB002).to_bytes(4, "little")  # within the first 8 KiB (Multiboot Specification 0.6.96, 3.1)
_MULTIBOOT_IN = 8192
_PE = b"MZ"
# Where a build, and its installation, have the symbols of an image, from the image's folder.
_SYMBOLS_IN = (".", "../usr/lib/debug", "../usr/lib/debug/boot", "/usr/lib/debug", "/usr/lib/debug/boot")


@dataclass(frozen=True)
class OwnXen:
    """An image that QEMU boots (`xen` or `xen.gz`; with `efi` OVMF boots `xen.efi`), and the symbols of its build."""

    image: Path
    symbols: Path
    efi: bool = False

    @property
    def link(self) -> Link:
        return Link.EFI if self.efi else Link.GZ

    @property
    def name(self) -> str:
        return self.image.name

    @cached_property
    def plain(self) -> bytes:
        """The image, unpacked. Raises BadSpecification for a file that is not one."""
        try:
            content = unpacked(File(str(self.image)))
            data = content.read(0, content.size)
        except OSError as error:
            raise BadSpecification(f"--xen-image {self.image}: {error.strerror}") from None
        except (WrongFile, Undecidable) as error:
            raise BadSpecification(f"--xen-image {self.image}: {error}: {self._right_image()}") from None
        if self.efi and data[: len(_PE)] == _PE:
            return data
        if not self.efi and data[: len(ELF32.ident)] == ELF32.ident and _MULTIBOOT in data[:_MULTIBOOT_IN]:
            return data
        kind = recognised(content)
        other = ", or boot it by --boot efi" if data[: len(_PE)] == _PE else ""
        what = kind.what if kind else "not an image of Xen"
        if data[: len(ELF64.ident)] == ELF64.ident:
            what = "a 64-bit ELF file, as xen-syms is"
        raise BadSpecification(f"--xen-image {self.image}: {what}: {self._right_image()}{other}")

    def _right_image(self) -> str:
        if self.efi:
            return "--boot efi boots a xen.efi: give that"
        stem = self.image.name.replace("-syms", "").removesuffix(".efi")
        beside = [self.image.parent / name for name in (f"{stem}.gz", stem, "xen.gz", "xen")]
        found = next((path for path in beside if path != self.image and path.is_file()), None)
        return f"give {found or 'the xen.gz or xen that the build made beside xen-syms'}"

    def check(self, crash_kernel: bool) -> None:
        """Raise BadSpecification unless the files go together, and the build can do what is wanted of it."""
        image = buildid.scan(self.plain)
        table = self._table()
        if link_of(table) is self.link.other:
            raise BadSpecification(
                f"--symbols {self.symbols}: these are of {self.link.other.value}, whose variables lie elsewhere: "
                f"give {self.link.symbols}"
            )
        if image and table.build_id and image[1] != table.build_id:
            raise BadSpecification(
                f"--symbols {self.symbols}: they are of another build (build-id {table.build_id.hex()}) than "
                f"{self.image} ({image[1].hex()}): give the xen-syms of the same build"
            )
        if crash_kernel and not table.has("kexec_crash", TEXT):
            raise BadSpecification(
                f"{self.image} was built without CONFIG_KEXEC ({self.symbols} has no kexec_crash), and cannot start "
                "a crash kernel: build it with CONFIG_KEXEC=y"
            )

    def _table(self) -> SymbolTable:
        try:
            return load_symbols(str(self.symbols))
        except Undecidable as error:
            raise BadSpecification(f"--symbols {error}") from None


def own_xen(image: str | Path, symbols: str | Path | None = None, efi: bool = False) -> OwnXen:
    """The Xen of an image; where its symbols are not given, they are looked for. Raises BadSpecification."""
    path = Path(image).absolute()
    if symbols is not None:
        return OwnXen(path, Path(symbols).absolute(), efi)
    if efi:  # beside it, or the image's own
        others = [path.parent / folder / f"{path.name}.{kind}" for folder in _SYMBOLS_IN for kind in ("elf", "map")]
        return OwnXen(path, next(filter(Path.is_file, others), path), efi)
    version = path.name.removesuffix(".gz").removeprefix("xen")  # of an installed one: xen-4.22.0.gz
    wanted = [path.parent / folder / name for folder in _SYMBOLS_IN for name in (f"xen-syms{version}", "xen-syms")]
    found = next((candidate for candidate in wanted if candidate.is_file()), None)
    if found is None:
        _ = OwnXen(path, path).plain  # a wrong file has none beside it
        raise BadSpecification(
            f"--xen-image {image}: no {' or '.join(dict.fromkeys(p.name for p in wanted))} beside it: "
            "give the xen-syms of the same build as --symbols"
        )
    return OwnXen(path, found)
