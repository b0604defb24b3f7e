"""The symbol tables of real Xens, each compared symbol by symbol with what nm(1) reads from the same xen-syms.

Where builds differ, what each must show follows from what nm and readelf read: a new row of the lab needs nothing here.
"""

from __future__ import annotations

import gzip
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.crashpath.missing import missing
from xen_symbols.symbols import embedded
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import Symbol, SymbolAmbiguous, SymbolTable
from xencrash.lab.images import members
from xencrash.lab.packages import Cache
from xencrash.lab.rows import SUITES, XENS

pytestmark = pytest.mark.live

Row = tuple[int, str, str]


@dataclass(frozen=True)
class Build:
    """One packaged Xen: its symbol files, and what is read of them without this project.

    `nm` is nm's reading of xen-syms as (address, letter, name); `sections` the section symbols that only readelf
    lists, by name and address, of which the first Xens of the lab's have some; `letters` those in the map's text.
    """

    name: str
    elf: SymbolTable
    map: SymbolTable
    image: SymbolTable  # the image as packaged: stripped, gzip-compressed
    nm: list[Row]
    sections: dict[str, int]
    letters: set[str]


@pytest.fixture(scope="module", params=[row.name for row in XENS.values() if not SUITES[row.suite].moving])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    row = XENS[request.param]
    cache = Cache()
    with cache.lock():
        packages = cache.collect(row.suite, lambda at: at.packages(row.suite, row.packages))
        found = members(packages.values(), (row.image, row.symbols, "usr/lib/debug/*xen-syms-*.map*"))
    folder = tmp_path_factory.mktemp(f"xen-{row.name}")
    paths = {}
    for name, data in found.items():
        path = folder / ("map" if ".map" in name else "xen-syms" if "xen-syms" in name else "xen")
        path.write_bytes(data)
        paths[path.name] = str(path)
    assert sorted(paths) == ["map", "xen", "xen-syms"]
    tables = [load_symbols(paths[name]) for name in ("xen-syms", "map", "xen")]
    plain = folder / "plain"
    plain.write_bytes(uncompressed(folder / "xen-syms"))
    listing = subprocess.run(["nm", plain], check=True, capture_output=True, text=True).stdout
    nm = [(int(address, 16), kind, name) for address, kind, name in (line.split() for line in listing.splitlines())]
    listing = subprocess.run(["readelf", "-sW", plain], check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in listing.splitlines() if " SECTION " in line]
    sections = {words[7]: int(words[1], 16) for words in lines if int(words[1], 16)}
    letters = {line.split()[1] for line in uncompressed(folder / "map").decode().splitlines()}
    return Build(row.name, *tables, nm, sections, letters)


def uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def rows(table: SymbolTable) -> list[Symbol]:
    return [table.rows.symbol(row) for row, name in enumerate(table.rows.names()) if name]


def bare(symbols: Iterable[Symbol]) -> Counter[Row]:
    return Counter((symbol.address, symbol.kind, symbol.name) for symbol in symbols)


def with_files(symbols: Iterable[Symbol]) -> Counter[Symbol]:
    return Counter(Symbol(s.address, s.name, s.file if s.local else None, s.kind) for s in symbols)


def test_the_elf_table_is_nms(build: Build) -> None:
    assert len(build.nm) > 6000
    assert bare(rows(build.elf)) == Counter(build.nm)


def test_the_map_is_the_elf_tables(build: Build) -> None:
    extra = with_files(rows(build.map)) - with_files(rows(build.elf))
    missing = with_files(rows(build.elf)) - with_files(rows(build.map))
    text_only = build.letters == {"t", "T"}
    assert build.map.text_only is text_only
    listed = {name: address for name, address in build.sections.items() if not text_only or name.endswith("text")}
    assert {symbol.name: symbol.address for symbol in extra} == listed
    start = build.elf.address("_start")
    # Absolute ones are missing, and __image_base__, which lies before the image.
    assert [s for s in missing if s.kind in build.letters - {"A"} and s.address >= start] == []
    assert build.letters <= {symbol.kind for symbol in rows(build.map)}


def test_the_embedded_table_is_the_elf_tables_without_absolute_symbols(build: Build) -> None:
    assert build.image.source == "table embedded in Xen"
    assert not build.image.text_only
    extra = with_files(rows(build.image)) - with_files(rows(build.elf))
    missing = with_files(rows(build.elf)) - with_files(rows(build.image))
    assert {symbol.name: symbol.address for symbol in extra} == build.sections
    assert sum(extra.values()) == len(build.sections)
    assert {symbol.kind for symbol in missing} == {"A"}


def test_the_same_build_shows_in_each(build: Build) -> None:
    assert build.elf.build_id is not None and len(build.elf.build_id) == 20
    assert build.image.build_id == build.elf.build_id
    assert build.elf.note_address == build.elf.address("__note_gnu_build_id_start")
    assert build.image.note_address == build.elf.note_address


def test_the_table_in_memory_is_the_images(build: Build) -> None:
    image = build.elf.image
    assert image is not None
    start = build.elf.address("_start")
    table = embedded.load_memory("memory", image.read, start, start + (8 << 20))
    assert rows(table) == rows(build.image)
    assert (table.build_id, table.note_address) == (build.elf.build_id, build.elf.note_address)


def test_every_name_finds_its_symbols(build: Build) -> None:
    places: dict[str, set[int]] = {}
    for address, _, name in build.nm:
        places.setdefault(name, set()).add(address)
    several = 0
    for name, addresses in places.items():
        assert {symbol.address for symbol in build.elf.candidates(name)} == addresses
        if len(addresses) == 1:
            assert build.elf.address(name) in addresses
        else:
            several += 1
            with pytest.raises(SymbolAmbiguous):
                build.elf.address(name)
    assert several > 50


def test_each_local_symbol_is_found_by_its_file(build: Build) -> None:
    qualified = Counter(symbol.qualified for symbol in rows(build.elf) if symbol.local and symbol.file)
    for symbol in rows(build.elf):
        if qualified[symbol.qualified] == 1:
            assert build.elf.find(symbol.qualified) == symbol


def test_every_text_symbol_is_described_by_a_name_at_its_address(build: Build) -> None:
    names: dict[int, set[str]] = {}
    for address, kind, name in build.nm:
        if kind in "tT":
            names.setdefault(address, set()).add(name)
    ends = {build.elf.address(name) for name in ("_etext", "_einittext")}
    for table in (build.elf, build.map, build.image):
        for address, here in names.items():
            described = table.describe(address)
            if address not in ends and build.elf.address("_start") <= address:
                assert described in here


def test_the_two_nmi_callbacks_and_the_two_crashing_cpus(build: Build) -> None:
    """By nm: the profiler's function, built by default until 4.19, beside the variable in traps.c; and kexec.c's static
    variable, which has a number, beside crash.c's where the compiler keeps that."""
    callbacks = {(address, kind) for address, kind, name in build.nm if name == "nmi_callback"}
    (variable,) = (found for found in callbacks if found[1] not in "tT")
    (numbered,) = (found for found in build.nm if found[2].startswith("crashing_cpu."))
    for table in (build.elf, build.image):
        assert {(symbol.address, symbol.kind) for symbol in table.candidates("nmi_callback")} == callbacks
        found = table.find("traps.c#nmi_callback")
        assert (found.address, found.kind) == variable
        found = table.find("kexec.c#crashing_cpu")
        assert (found.address, found.kind, found.name) == numbered
        assert table.has("crashing_cpu") is ("crashing_cpu" in {name for _, _, name in build.nm})


def test_a_functions_extent_ends_before_the_next_one(build: Build) -> None:
    exact = build.elf.extent("do_nmi_crash")
    for table in (build.map, build.image):
        start, end = table.extent("do_nmi_crash")
        assert start == exact[0]
        assert exact[1] <= end < exact[1] + 16  # functions are 16-aligned, and these tables have no sizes


def test_nothing_that_the_crash_path_needs_is_missing(build: Build) -> None:
    generation = BY_ID[XENS[build.name].generation]
    assert missing(build.elf, generation) == missing(build.image, generation) == []
    assert (missing(build.map, generation) == []) is not build.map.text_only


def test_the_images_content_is_the_packaged_ones(build: Build) -> None:
    assert build.elf.image is not None and build.image.image is not None
    start, end = build.elf.extent("do_nmi_crash")
    assert build.elf.image.read(start, end - start) == build.image.image.read(start, end - start)
    with pytest.raises(Unreadable):
        build.elf.image.read(build.elf.address("_end") - 8, 8)
