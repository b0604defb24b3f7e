"""The symbol tables of real Xens, each compared symbol by symbol with what nm(1) reads from the same xen-syms."""

from __future__ import annotations

import gzip
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from xen_symbols.absence import Unreadable
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.crashpath.missing import missing
from xen_symbols.symbols import embedded
from xen_symbols.symbols.table import Symbol, SymbolAmbiguous, SymbolTable, load_symbols
from xencrash.lab.images import members
from xencrash.lab.packages import Cache
from xencrash.lab.rows import SUITES, XENS

pytestmark = pytest.mark.live

Row = tuple[int, str, str]


@dataclass(frozen=True)
class Build:
    """One packaged Xen: its symbol files, and nm's reading of xen-syms as (address, letter, name)."""

    name: str
    elf: SymbolTable
    map: SymbolTable
    image: SymbolTable  # the image as packaged: stripped, gzip-compressed
    nm: list[Row]


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
    symbols = (folder / "xen-syms").read_bytes()
    plain = folder / "plain"
    plain.write_bytes(gzip.decompress(symbols) if symbols[:2] == b"\x1f\x8b" else symbols)
    listing = subprocess.run(["nm", plain], check=True, capture_output=True, text=True).stdout
    nm = [(int(address, 16), kind, name) for address, kind, name in (line.split() for line in listing.splitlines())]
    return Build(row.name, *tables, nm=nm)


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
    # 4.14's build listed section symbols too, which nm does not, and of xen-syms only what lies in text.
    assert sorted(symbol.name for symbol in extra) == ([".init.text", ".text"] if build.name == "4.14" else [])
    assert build.map.text_only is (build.name == "4.14")
    if build.map.text_only:
        assert [symbol.name for symbol in missing if symbol.kind in "tT"] == ["__image_base__"]
    else:
        assert sorted(symbol.name for symbol in missing) == ["FIXADDR_X_SIZE", "start_pa"]


def test_the_embedded_table_is_the_elf_tables_without_absolute_symbols(build: Build) -> None:
    assert build.image.source == "table embedded in Xen"
    assert not build.image.text_only
    extra = with_files(rows(build.image)) - with_files(rows(build.elf))
    missing = with_files(rows(build.elf)) - with_files(rows(build.image))
    assert all(symbol.name.startswith(".") for symbol in extra)
    assert sum(extra.values()) == (9 if build.name == "4.14" else 0)
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
    for table in (build.elf, build.image):
        assert table.find("traps.c#nmi_callback").kind == "d"
        assert table.find("kexec.c#crashing_cpu").name.startswith("crashing_cpu.")
        assert not table.has("crashing_cpu")  # crash.c's is dropped by the compiler
        functions = [s for s in table.candidates("nmi_callback") if s.kind == "t"]
        # The profiler is built by default until 4.19.
        assert len(functions) == (0 if build.name == "4.20" else 1)


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
